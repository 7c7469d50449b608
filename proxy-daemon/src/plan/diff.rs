//! The difference between what is wanted and what the kernel holds, in an order in
//! which no moment in between breaks traffic.

use super::ledger::Ledger;
use super::objects::{ObjectKey, Standing};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op<K: ObjectKey> {
    Create(K, K::Value),
    Update(K, K::Value),
    /// Gives the object its retired value: no new connections, old ones go on.
    Retire(K, K::Value),
    Delete(K),
}

impl<K: ObjectKey> Op<K> {
    pub const fn key(&self) -> &K {
        match self {
            Self::Create(key, _)
            | Self::Update(key, _)
            | Self::Retire(key, _)
            | Self::Delete(key) => key,
        }
    }

    /// Creations, then retirements, then deletions.
    fn order(&self) -> (u8, u8) {
        match self {
            Self::Delete(key) if key.deleted_first() => (0, 0),
            Self::Create(key, _) | Self::Update(key, _) => (1, key.create_phase()),
            Self::Retire(..) => (2, 0),
            Self::Delete(key) => (3, key.delete_phase()),
        }
    }
}

/// Operations that bring `keys` to what is wanted of them. An object that is not wanted
/// but already retired is left to [`super::Drain`]. How endpoints stand is asked for those only
/// that frontends do not lead to any more.
pub fn diff<'k, K: ObjectKey>(
    keys: impl IntoIterator<Item = &'k K>,
    ledger: &Ledger<K>,
    mut standing: impl FnMut(&K) -> Standing,
) -> Vec<Op<K>> {
    let ops = keys.into_iter().filter_map(|key| difference(key, ledger, &mut standing)).collect();
    in_order(ops)
}

/// Deletes the keys, all of which the kernel holds and none of which is wanted, whatever
/// connections they have.
pub fn deletions<K: ObjectKey>(keys: impl IntoIterator<Item = K>) -> Vec<Op<K>> {
    in_order(keys.into_iter().map(Op::Delete).collect())
}

/// Sorted by key within a phase: the order of the operations is then the same in every
/// run, and requests about one virtual server stand together.
fn in_order<K: ObjectKey>(mut ops: Vec<Op<K>>) -> Vec<Op<K>> {
    ops.sort_unstable_by(|a, b| a.order().cmp(&b.order()).then_with(|| a.key().cmp(b.key())));
    ops.dedup();
    ops
}

fn difference<K: ObjectKey>(
    key: &K,
    ledger: &Ledger<K>,
    standing: &mut impl FnMut(&K) -> Standing,
) -> Option<Op<K>> {
    match (ledger.wanted(key), ledger.held(key)) {
        (Some(value), None) => Some(Op::Create(key.clone(), value.clone())),
        (Some(value), Some(held)) if value != held => Some(Op::Update(key.clone(), value.clone())),
        (Some(_), Some(_)) | (None, None) => None,
        (None, Some(held)) => {
            let orphaned = key.parent().is_some_and(|parent| ledger.wanted(&parent).is_none());
            match key.retired(held, standing(key)) {
                Some(_) if orphaned => Some(Op::Delete(key.clone())),
                Some(retired) if retired != *held => Some(Op::Retire(key.clone(), retired)),
                Some(_) => None,
                None => Some(Op::Delete(key.clone())),
            }
        }
    }
}
