//! The xtables kernel interface, which the legacy variant of iptables uses: a table is
//! read whole and replaced whole.

mod blob;
mod fake;
mod socket;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

pub use blob::{Chain, HOOKS, Info, Malformed, Rule, Table};
pub use fake::FakeXTables;
pub use socket::XTablesSockets;

use super::netlink::Errno;
use crate::model::Family;

#[derive(Debug, thiserror::Error)]
pub enum XTablesError {
    #[error("xtables table {table} of {family}: cannot {operation}: {errno}")]
    Refused { operation: &'static str, family: Family, table: String, errno: Errno },
    #[error("xtables table {table} of {family} cannot be read: {source}")]
    Malformed { family: Family, table: String, source: Malformed },
    #[error("cannot read {}: {source}", path.display())]
    Names { path: PathBuf, source: std::io::Error },
    #[error("xtables table {table} of {family} was changed by others {tries} times in a row")]
    Contended { family: Family, table: String, tries: u32 },
    #[error("an iptables command holds {} for too long", path.display())]
    Locked { path: PathBuf },
}

/// The seam; [`FakeXTables`] is the other implementation.
pub trait XTables: Send {
    /// The tables that exist in the network namespace. None when the kernel has no legacy
    /// iptables, or has not loaded it; asking does not load it.
    ///
    /// # Errors
    /// When the list cannot be read.
    fn tables(&mut self, family: Family) -> Result<Vec<String>, XTablesError>;

    /// Reads a table, lets `change` change it, and puts it back when that says so.
    /// Packets meet the old table or the new one, and the counters of what stays go on.
    /// Only for tables that [`XTables::tables`] names: others would be made.
    ///
    /// # Errors
    /// When the table cannot be read or is not taken back: it is as it was.
    fn edit(
        &mut self,
        family: Family,
        table: &str,
        change: &mut dyn FnMut(&mut Table) -> bool,
    ) -> Result<bool, XTablesError>;
}
