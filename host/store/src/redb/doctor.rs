//! Checks a store that no process has open, and repairs its journal: for a store that refuses to
//! open. Changes nothing unless asked to, and keeps the old journal.

use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase as _};

use crate::StoreOptions;
use crate::format::layout::{self, Applied};
use crate::format::seal::Seals;
use crate::journal::{self, JournalError, Survey};
use crate::redb::folder;
use crate::redb::open::{self, JOURNAL, OpenError};
use crate::redb::view::fact;

/// Report of a check of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Examination {
    /// The store's identity.
    pub store_id: String,
    /// True if every page of the database holds the bytes that were written.
    pub database_is_whole: bool,
    /// Sequence number of the last frame that the tables have.
    pub applied_frames: u64,
    /// Whole frames of the journal that the tables do not have yet; opening the store applies them.
    pub unapplied_frames: u64,
    /// Damage of the journal, if any. A frame torn by a crash is no damage: no commit of it was
    /// acknowledged.
    pub journal_damage: Option<String>,
}

/// A journal that was cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Frames that the new journal holds.
    pub kept_frames: u64,
    /// Path of the old journal, if there was one.
    pub damaged: Option<PathBuf>,
}

/// Reads all of a store. Takes as long as reading its database takes.
pub fn examine(path: &Path) -> Result<Examination, OpenError> {
    open::guarded(path, || examine_folder(path))
}

fn examine_folder(path: &Path) -> Result<Examination, OpenError> {
    let mut database = open::open_database(path, &StoreOptions::default())?;
    // First, before anything is read that may be damaged.
    let integrity = database.check_integrity();
    let database_is_whole = integrity.map_err(|error| open::database_error(path, error))?;
    let (store_id, applied) = facts(path, &database)?;
    let survey = survey(path, &store_id, &applied)?;
    let (unapplied_frames, journal_damage) = (survey.frames.len() as u64, survey.damage);
    Ok(Examination { store_id, database_is_whole, applied_frames: applied.sequence, unapplied_frames, journal_damage })
}

/// Makes a damaged or missing journal readable: keeps the frames up to the damage. What was
/// acknowledged after it is lost, and its messages count as new. The old journal stays beside the
/// new one. `None`: it needs no cutting.
pub fn cut_journal(path: &Path) -> Result<Option<Cut>, OpenError> {
    let io = |error: std::io::Error| open::io_error(path, &error);
    let database = open::open_database(path, &StoreOptions::default())?;
    let (store_id, applied) = facts(path, &database)?;
    let Survey { frames, damage: Some(_), .. } = survey(path, &store_id, &applied)? else { return Ok(None) };
    let journal = path.join(JOURNAL);
    let new = path.join("journal.new");
    std::fs::write(&new, journal::rebuilt(&store_id, applied.sequence, &frames)).map_err(io)?;
    std::fs::File::open(&new).and_then(|file| file.sync_all()).map_err(io)?;
    let damaged = journal.exists().then(|| {
        let name = |number: u32| path.join(format!("journal.damaged-{number}"));
        (1..).map(name).find(|path| !path.exists()).expect("numbers do not end")
    });
    if let Some(damaged) = &damaged {
        // A second name, not another one: were this killed before the next line, the frames that
        // are kept would else be in no file under the journal's name, and the next cut lose them.
        match hapax_core::fault::mutated("cut-renames-the-journal") {
            true => std::fs::rename(&journal, damaged).map_err(io)?,
            false => std::fs::hard_link(&journal, damaged).map_err(io)?,
        }
    }
    hapax_core::fault::point("journal-kept");
    std::fs::rename(&new, &journal).map_err(io)?;
    folder::sync(path).map_err(io)?;
    Ok(Some(Cut { kept_frames: frames.len() as u64, damaged }))
}

/// Returns unused space to the disk. Returns the database's size before and after, in bytes.
pub fn compact(path: &Path) -> Result<(u64, u64), OpenError> {
    let length = || std::fs::metadata(path.join(open::DATABASE)).map_or(0, |metadata| metadata.len());
    let before = length();
    let mut database = open::open_database(path, &StoreOptions::default())?;
    facts(path, &database)?;
    database.compact().map_err(|error| open::storage_error(path, &error.into()))?;
    drop(database);
    Ok((before, length()))
}

fn facts(path: &Path, database: &Database) -> Result<(String, Applied), OpenError> {
    let id = open::identify(path, database, false)?;
    let seals = Seals::new(&id);
    let meta = || -> Result<_, redb::Error> { Ok(database.begin_read()?.open_table(layout::META)?) };
    let meta = meta().map_err(|error| open::storage_error(path, &error))?;
    let applied = fact(&meta, &seals, layout::META_APPLIED, Applied::decode);
    let applied = applied.map_err(|error| open::damaged(path, error.to_string()))?;
    let applied = applied.ok_or_else(|| open::damaged(path, "it does not say how far it was applied".into()))?;
    Ok((id, applied))
}

/// Returns the contents of the journal, also of a damaged or missing one. Fails if the file cannot
/// be read, or if another version of Hapax wrote it: that journal must not be cut.
fn survey(path: &Path, store_id: &str, applied: &Applied) -> Result<Survey, OpenError> {
    let file = match open::open_journal(path)? {
        Some(file) => file,
        None => return Ok(Survey { frames: Vec::new(), end: 0, damage: Some("it is missing".into()), promises: None }),
    };
    match journal::survey(&*file, store_id, applied) {
        // Frames have their own checksums, keyed for this store: what is whole behind a damaged
        // header is kept.
        Err(JournalError::Damaged(damage)) => {
            let frames = journal::survey_frames(&*file, store_id, applied, None);
            let frames = frames.map_err(|error| open::io_error(path, &error))?;
            Ok(Survey { damage: Some(damage), ..frames })
        }
        other => other.map_err(|error| open::journal_error(path, error)),
    }
}
