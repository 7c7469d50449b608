//! Element changes as few, bounded transactions.

use std::collections::BTreeMap;

use nix::libc::{EINVAL, ENOENT};

use crate::kernel::netlink::{Errno, Message, Netlink};
use crate::kernel::nftables::{ElementBytes, Operation, Shape, Table, batch};
use crate::model::Family;

use super::element::{Element, Set};
use super::{Ruleset, RulesetError, table};

/// Changes per transaction. With the longest keys, each deleted after being added, that
/// is 106 KiB: below the default send buffer (`net.core.wmem_default`), which a
/// transaction has to fit into whole.
const CHUNK: usize = 1024;
/// Refusals that are searched for the element at fault before the whole message is
/// reported: log2 of a message's elements each, so this is enough for a dozen.
const MAX_SPLITS: usize = 128;

/// A change of one element, once per transaction.
#[derive(Debug, Clone)]
struct Item {
    operation: Operation,
    element: Element,
    bytes: ElementBytes,
    /// Which of the caller's changes it answers.
    answers: Vec<usize>,
}

/// A message of a transaction.
struct Part<'a> {
    message: Message,
    items: &'a [Item],
}

impl<N: Netlink> Ruleset<N> {
    /// Adds and deletes elements; adding what is there and deleting what is not succeed.
    /// The results are in the order of `changes`. Up to [`CHUNK`] changes are one
    /// transaction, so packets see all of them or none; more are several, in order.
    ///
    /// When a transaction is refused, the elements at fault are reported and the others
    /// are applied without them.
    ///
    /// # Errors
    /// When the socket fails: nothing is known then, read back with
    /// [`Ruleset::elements`].
    pub fn apply(
        &mut self,
        changes: &[(Operation, Element)],
    ) -> Result<Vec<Result<(), Errno>>, RulesetError> {
        let mut results = vec![Ok(()); changes.len()];
        for (chunk, start) in changes.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
            let items = collect(chunk, start, &mut results);
            self.apply_items(items, &mut results)?;
        }
        Ok(results)
    }

    fn apply_items(
        &mut self,
        items: Vec<Item>,
        results: &mut [Result<(), Errno>],
    ) -> Result<(), RulesetError> {
        let mut queue = vec![items];
        let mut prepared = false;
        let mut splits = 0;
        while let Some(items) = queue.pop() {
            if items.is_empty() {
                continue;
            }
            let parts = parts(&items, prepared);
            let messages = batch(parts.iter().map(|part| part.message.clone()));
            let Err((index, errno)) = self.netlink.transaction(&messages)? else {
                continue;
            };
            // Index 0 is the frame, as is what lies behind the parts: the commit failed.
            let Some(part) = index.checked_sub(1).and_then(|index| parts.get(index)) else {
                report(&items, errno, results);
                continue;
            };
            let deletes = part.items.iter().all(|item| item.operation == Operation::Delete);
            // Of a map, and alone: it is not there.
            let in_map = part.items.iter().all(|item| item.element.set.shape() == Shape::Data);
            if errno.0 == ENOENT && deletes && prepared && in_map {
                queue.push(without(&items, part.items));
                continue;
            }
            if errno.0 == ENOENT && deletes && !prepared {
                prepared = true;
                queue.push(items);
                continue;
            }
            // Additions meet ENOENT when the table is gone, which is no element's fault.
            let divisible = part.items.len() > 1 && errno.0 != ENOENT && splits < MAX_SPLITS;
            let (left, right) = part.items.split_at(part.items.len() / 2);
            if divisible {
                splits += 1;
                queue.push(right.to_vec());
                queue.push(left.to_vec());
            } else {
                report(part.items, errno, results);
            }
            queue.push(without(&items, part.items));
        }
        Ok(())
    }
}

/// One item per element, in the order of [`key_of`]: of several changes to an element
/// the last one counts, as after applying them in order.
fn collect(
    chunk: &[(Operation, Element)],
    start: usize,
    results: &mut [Result<(), Errno>],
) -> Vec<Item> {
    let mut last: BTreeMap<Element, Item> = BTreeMap::new();
    for ((operation, element), index) in chunk.iter().zip(start..) {
        let Some(bytes) = element.encode() else {
            if let Some(result) = results.get_mut(index) {
                *result = Err(Errno(EINVAL));
            }
            continue;
        };
        let item = last.entry(*element).or_insert_with(|| Item {
            operation: *operation,
            element: *element,
            bytes,
            answers: Vec::new(),
        });
        item.operation = *operation;
        item.answers.push(index);
    }
    let mut items: Vec<_> = last.into_values().collect();
    items.sort_by_key(key_of);
    items
}

/// What may share a message.
const fn key_of(item: &Item) -> (Family, Set, Operation) {
    (item.element.family(), item.element.set, item.operation)
}

fn parts(items: &[Item], prepared: bool) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    for alike in items.chunk_by(|a, b| key_of(a) == key_of(b)) {
        let Some(first) = alike.first() else { continue };
        let (family, set, operation) = key_of(first);
        let shape = set.shape();
        let prepare = prepared && operation == Operation::Delete;
        // A map takes no addition of a key whose data is not known: each deletion alone
        // then, so that the one that finds nothing stops no other.
        let alone = prepare && shape == Shape::Data;
        let most = if alone { 1 } else { Table::elements_per_message(&first.bytes) };
        for items in alike.chunks(most) {
            let elements: Vec<_> = items.iter().map(|item| &item.bytes).collect();
            let mut push = |operation| {
                let messages =
                    table(family).change_elements(operation, set.name(), shape, &elements);
                parts.extend(messages.into_iter().map(|message| Part { message, items }));
            };
            // Added first, so that deleting finds it in any case. Understood by every
            // kernel, unlike `NFT_MSG_DESTROYSETELEM` (6.3).
            if prepare && !alone {
                push(Operation::Add);
            }
            push(operation);
        }
    }
    parts
}

fn report(items: &[Item], errno: Errno, results: &mut [Result<(), Errno>]) {
    for index in items.iter().flat_map(|item| &item.answers) {
        if let Some(result) = results.get_mut(*index) {
            *result = Err(errno);
        }
    }
}

fn without(items: &[Item], removed: &[Item]) -> Vec<Item> {
    let gone: std::collections::HashSet<_> = removed.iter().map(|item| item.element).collect();
    items.iter().filter(|item| !gone.contains(&item.element)).cloned().collect()
}
