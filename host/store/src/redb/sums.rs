//! Sums: for each table the seals of all its rows, combined by exclusive or. A row that is lost or
//! doubled, which no seal of its own can tell, shows when the table is walked. Brought up to date
//! by the transaction that changes the table.

use std::collections::BTreeMap;

use hapax_core::StoreError;
use redb::{ReadableTable, WriteTransaction};

use crate::format::layout;
use crate::format::seal::{Sealed, Seals, seal_of};
use crate::redb::open::running_error;

/// Changes of sums in one transaction, by table.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    of: BTreeMap<String, u64>,
    gone: Vec<String>,
}

impl Changes {
    /// Notes the seal of a row that comes, goes, or takes another's place.
    pub(crate) fn note(&mut self, table: &str, seal: u64) {
        match self.of.get_mut(table) {
            Some(sum) => *sum ^= seal,
            None => drop(self.of.insert(table.to_owned(), seal)),
        }
    }

    /// Notes the old value of a row, if there was one.
    pub(crate) fn note_old(&mut self, table: &str, old: Option<&[u8]>) {
        if let Some(old) = old {
            self.note(table, seal_of(old));
        }
    }

    /// Notes that a table is dropped.
    pub(crate) fn drop_table(&mut self, table: String) {
        self.gone.push(table);
    }

    pub(crate) fn write(self, txn: &WriteTransaction, seals: &Seals) -> Result<(), StoreError> {
        let mut sums = txn.open_table(layout::SUMS).map_err(running_error)?;
        for table in &self.gone {
            sums.remove(&table[..]).map_err(running_error)?;
        }
        let mut sealed = Vec::new();
        for (table, change) in self.of.iter().filter(|(table, _)| !self.gone.contains(table)) {
            let sum = read(&sums, seals, table)? ^ change;
            let sealed = seals.seal(Sealed::Sums, &[table.as_bytes()], &sum.to_le_bytes(), &mut sealed);
            sums.insert(&table[..], sealed).map_err(running_error)?;
        }
        Ok(())
    }
}

/// Returns the stored sum of a table; 0 if it never had a row.
pub(crate) fn read(
    sums: &impl ReadableTable<&'static str, &'static [u8]>,
    seals: &Seals,
    table: &str,
) -> Result<u64, StoreError> {
    let Some(sealed) = sums.get(table).map_err(running_error)? else { return Ok(0) };
    let sum = seals.open(Sealed::Sums, &[table.as_bytes()], sealed.value())?;
    Ok(sum.first_chunk().map_or(0, |chunk| u64::from_le_bytes(*chunk)))
}

/// Stores a fact about the store, sealed.
pub(crate) fn write_fact(txn: &WriteTransaction, seals: &Seals, name: &str, fact: &[u8]) -> Result<(), StoreError> {
    let mut meta = txn.open_table(layout::META).map_err(running_error)?;
    let mut sealed = Vec::new();
    meta.insert(name, seals.seal(Sealed::Meta, &[name.as_bytes()], fact, &mut sealed)).map_err(running_error)?;
    Ok(())
}
