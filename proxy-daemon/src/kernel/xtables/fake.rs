//! Tables in memory. Clones share them, so that a test keeps one and hands on the other.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Family, Table, XTables, XTablesError};

#[derive(Debug, Default)]
pub struct State {
    pub tables: BTreeMap<(Family, String), Table>,
    /// How many tables were put back.
    pub replaced: usize,
}

#[derive(Debug, Clone, Default)]
pub struct FakeXTables(Arc<Mutex<State>>);

impl FakeXTables {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl XTables for FakeXTables {
    fn tables(&mut self, family: Family) -> Result<Vec<String>, XTablesError> {
        let state = self.state();
        let names = state.tables.keys().filter(|(of, _)| *of == family);
        Ok(names.map(|(_, name)| name.clone()).collect())
    }

    fn edit(
        &mut self,
        family: Family,
        table: &str,
        change: &mut dyn FnMut(&mut Table) -> bool,
    ) -> Result<bool, XTablesError> {
        let mut state = self.state();
        let Some(held) = state.tables.get(&(family, table.to_owned())) else { return Ok(false) };
        let mut new = held.clone();
        if !change(&mut new) {
            return Ok(false);
        }
        new.write().map_err(|source| XTablesError::Malformed {
            family,
            table: table.to_owned(),
            source,
        })?;
        state.tables.insert((family, table.to_owned()), new);
        state.replaced += 1;
        Ok(true)
    }
}
