//! Reading back what the kernel holds, in pieces.

use super::PlaneError;
use crate::plan::ObjectKey;

/// Objects in one piece: folding them in takes about a millisecond.
const PIECE: usize = 2048;

/// A part of what the kernel holds. An object may come more than once.
#[derive(Debug)]
pub struct Piece<K: ObjectKey> {
    /// Objects that carry our mark of ownership.
    pub ours: Vec<(K, K::Value)>,
    /// Others of the same kind: adopted if wanted; if not, never touched unless
    /// [`super::Dataplane::superseded`] names them.
    pub foreign: Vec<(K, K::Value)>,
}

impl<K: ObjectKey> Default for Piece<K> {
    fn default() -> Self {
        Self { ours: Vec::new(), foreign: Vec::new() }
    }
}

/// Takes a piece.
pub type Give<'a, K> = &'a mut dyn FnMut(Piece<K>);

/// Reads everything, beside the operations that go on meanwhile, and gives it piece by
/// piece.
pub type Reader<K> = Box<dyn FnOnce(Give<'_, K>) -> Result<(), PlaneError> + Send>;

/// Cuts what is read into pieces.
pub struct Pieces<'a, K: ObjectKey> {
    piece: Piece<K>,
    give: Give<'a, K>,
}

impl<K: ObjectKey> std::fmt::Debug for Pieces<'_, K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pieces").field("piece", &self.piece).finish_non_exhaustive()
    }
}

impl<'a, K: ObjectKey> Pieces<'a, K> {
    pub fn new(give: Give<'a, K>) -> Self {
        Self { piece: Piece::default(), give }
    }

    pub fn put(&mut self, ours: bool, key: K, value: K::Value) {
        let side = if ours { &mut self.piece.ours } else { &mut self.piece.foreign };
        side.push((key, value));
        if self.piece.ours.len() + self.piece.foreign.len() >= PIECE {
            (self.give)(std::mem::take(&mut self.piece));
        }
    }

    /// Gives the rest.
    pub fn end(self) {
        (self.give)(self.piece);
    }
}
