//! The difference between what is wanted and what the kernel holds, in an order in
//! which no moment in between breaks traffic.

use std::collections::HashMap;

use super::objects::{ObjectKey, Objects};

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

/// Operations that bring `keys` from `applied` to `wanted`. An object that is not wanted
/// but already retired is left to [`super::Drain`].
pub fn diff<'k, K: ObjectKey + 'k>(
    keys: impl IntoIterator<Item = &'k K>,
    wanted: &Objects<K>,
    applied: &HashMap<K, K::Value>,
) -> Vec<Op<K>> {
    let mut ops: Vec<Op<K>> =
        keys.into_iter().filter_map(|key| difference(key, wanted, applied)).collect();
    // Sorted by key within a phase: the order of the operations is then the same in
    // every run, and requests about one virtual server stand together.
    ops.sort_unstable_by(|a, b| a.order().cmp(&b.order()).then_with(|| a.key().cmp(b.key())));
    ops.dedup();
    ops
}

fn difference<K: ObjectKey>(
    key: &K,
    wanted: &Objects<K>,
    applied: &HashMap<K, K::Value>,
) -> Option<Op<K>> {
    match (wanted.get(key), applied.get(key)) {
        (Some(value), None) => Some(Op::Create(key.clone(), value.clone())),
        (Some(value), Some(held)) if value != held => Some(Op::Update(key.clone(), value.clone())),
        (Some(_), Some(_)) | (None, None) => None,
        (None, Some(held)) => {
            let orphaned = key.parent().is_some_and(|parent| wanted.get(&parent).is_none());
            match key.retired(held) {
                Some(_) if orphaned => Some(Op::Delete(key.clone())),
                Some(retired) if retired != *held => Some(Op::Retire(key.clone(), retired)),
                Some(_) => None,
                None => Some(Op::Delete(key.clone())),
            }
        }
    }
}
