//! Opening a store folder: creates one where there is nothing, and refuses what is lost, damaged,
//! of another version or in use. Never serves an empty store where there was one.
//!
//! A store is a folder: `records.redb`, the database; `journal`, the frames not in it yet; and
//! `STORE`, its identity in text. A folder with an identity and without its database has lost it,
//! and that is what the identity is for.

use std::collections::VecDeque;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hapax_core::{CrashTracker, NoCrashTracker, StoreError};
use parking_lot::{Condvar, Mutex, RwLock};
use redb::backends::FileBackend;
use redb::{Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, StorageBackend};

use crate::format::layout::{self, Applied, FeedFacts, META};
use crate::format::seal::{Sealed, Seals};
use crate::journal::{self, Journal, JournalError, Recovered};
use crate::redb::buckets::{Bucket, Catalogue};
use crate::redb::core::{Closing, Core, Progress};
use crate::redb::crash_file::RunningFile;
use crate::redb::folder;
use crate::redb::memtable::Memtable;
use crate::redb::sums;
use crate::redb::view::{Snapshot, View};
use crate::{RedbStore, StoreOptions};

pub(crate) const DATABASE: &str = "records.redb";
pub(crate) const JOURNAL: &str = "journal";
const RUNNING: &str = "running";
const IDENTITY: &str = "STORE";
/// Buckets of the last run with fewer rows than this take more; their filters are built before the
/// first message.
const REOPENED_ROWS_MAX: u64 = 1 << 17;

/// Reason why a store was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no store, and the caller asked not to create one.
    #[error("{0} holds no store. Check the path; `hapax run` and `hapax up` create one")]
    Missing(PathBuf),
    /// The path is no store folder.
    #[error("{path} is not a store: {reason}. Give a folder that is empty, does not exist yet, or holds a store")]
    NotAStore {
        /// The path given.
        path: PathBuf,
        /// The reason.
        reason: &'static str,
    },
    /// Another process has it open.
    #[error("{0} is in use by another process. Stop that process, or use a store of your own")]
    Locked(PathBuf),
    /// Another version of Hapax wrote it.
    #[error(
        "{path} has format {found}; this hapax reads format {expected}. Use the hapax that wrote it, or another store"
    )]
    Version {
        /// The store.
        path: PathBuf,
        /// The format found.
        found: u32,
        /// The format that this build reads.
        expected: u32,
    },
    /// The stored bytes are not those that were written. Nothing was changed.
    #[error(
        "{path} is damaged: {reason}. Nothing was changed. `hapax doctor` tells more and mends a journal; else put back a \
         backup of the folder. Do not delete {IDENTITY} to go on empty, for then every message would count as new"
    )]
    Damaged {
        /// The store.
        path: PathBuf,
        /// The damage found.
        reason: String,
    },
    /// The disk has no room.
    #[error("{path}: the disk is full ({reason}). Free some space and start again; nothing is lost")]
    Full {
        /// The store.
        path: PathBuf,
        /// The error of the operating system.
        reason: String,
    },
    /// The operating system refused.
    #[error("{path}: {reason}. Check that the folder and its disk can be read and written")]
    Io {
        /// The store.
        path: PathBuf,
        /// The error of the operating system.
        reason: String,
    },
}

/// Permission to create a store that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Create {
    /// Created where the folder is empty or absent.
    IfAbsent,
    /// Must be there.
    Never,
}

pub(crate) fn open(path: &Path, create: Create, options: StoreOptions) -> Result<RedbStore, OpenError> {
    guarded(path, || open_folder(path, create, options))
}

/// Returns redb's panics as errors: redb panics on some damage, as if it were a bug of its own.
pub(crate) fn guarded<T>(path: &Path, work: impl FnOnce() -> Result<T, OpenError>) -> Result<T, OpenError> {
    let contradicts = || damaged(path, format!("the pages of {DATABASE} contradict each other"));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| Err(contradicts()))
}

fn open_folder(path: &Path, create: Create, options: StoreOptions) -> Result<RedbStore, OpenError> {
    let io = |error: std::io::Error| io_error(path, &error);
    let file = path.join(DATABASE);
    let identity = read_identity(path)?;
    let length = match std::fs::metadata(&file) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => return Err(io(error)),
    };
    match (&identity, length) {
        (Some(_), 0) => return Err(damaged(path, format!("it has an identity, but {DATABASE} is missing or empty"))),
        (None, 0) if create == Create::Never => return Err(OpenError::Missing(path.into())),
        (None, 0) => {
            create_folder(path)?;
            create_files(path, &file, &options)?;
        }
        // An identity is written last: a creation that was cut short has whole files and none.
        (None | Some(_), _) => {}
    }
    let database = builder(&options).create(&file).map_err(|error| database_error(path, error))?;
    let found = identify(path, &database, false)?;
    if let Some(expected) = identity.as_ref().filter(|expected| **expected != found) {
        return Err(damaged(path, format!("{DATABASE} belongs to store {found}, the folder to store {expected}")));
    }
    let named = journal_is_named(&database).map_err(|error| storage_error(path, &error))?;
    if !named && !path.join(JOURNAL).exists() {
        // A creation was cut short between the database's name and the journal's: nothing was
        // acknowledged.
        let new = path.join(format!("{JOURNAL}.{}.new", std::process::id()));
        make_journal(path, &new, &found)?;
        name_journal(path, &new)?;
        folder::sync(path).map_err(io)?;
    }
    // After the database, whose lock says that nobody else is here.
    let running = Arc::new(RunningFile::open(&path.join(RUNNING)).map_err(io)?);
    let missing = || damaged(path, format!("the {JOURNAL} is missing, and with it what was acknowledged last"));
    let journal = open_journal(path)?.ok_or_else(missing)?;
    if !named {
        // From now on a missing journal is a lost one, also where the identity is lost with it.
        note_journal(&database).map_err(|error| storage_error(path, &error))?;
    }
    let store = join(path, database, journal, &found, options, running)?;
    if identity.is_none() {
        write_identity(path, &found).map_err(io)?;
    }
    Ok(store)
}

/// Opens the database of a store that must be there, and nothing else of it.
pub(crate) fn open_database(path: &Path, options: &StoreOptions) -> Result<Database, OpenError> {
    match std::fs::metadata(path.join(DATABASE)) {
        Ok(metadata) if metadata.len() > 0 => {}
        _ if read_identity(path)?.is_some() => {
            return Err(damaged(path, format!("it has an identity, but {DATABASE} is missing or empty")));
        }
        _ => return Err(OpenError::Missing(path.into())),
    }
    builder(options).open(path.join(DATABASE)).map_err(|error| database_error(path, error))
}

/// Opens or creates a store on backends of the caller's; for tests that lose writes.
pub(crate) fn open_backends(
    database: impl StorageBackend,
    journal: Box<dyn StorageBackend>,
    options: StoreOptions,
) -> Result<RedbStore, OpenError> {
    let path = Path::new("(backend)");
    let io = |error: std::io::Error| io_error(path, &error);
    let empty = database.len().map_err(io)? == 0;
    let database = builder(&options).create_with_backend(database).map_err(|error| database_error(path, error))?;
    let id = identify(path, &database, empty)?;
    if empty {
        Journal::create(&*journal, &id).map_err(io)?;
    }
    join(path, database, journal, &id, options, Arc::new(NoCrashTracker))
}

/// Takes in what the journal has and the tables have not, and starts the applier.
fn join(
    path: &Path,
    database: Database,
    journal: Box<dyn StorageBackend>,
    id: &str,
    options: StoreOptions,
    running: Arc<dyn CrashTracker>,
) -> Result<RedbStore, OpenError> {
    let told = |error: StoreError| damaged(path, error.to_string());
    let seals = Seals::new(id);
    let buckets = found_buckets(&database, &seals).map_err(told)?;
    let snapshot = Snapshot::open(&database, seals, buckets.iter().cloned()).map_err(told)?;
    let recovered = Journal::recover(journal, id, options.journal_bytes, &snapshot.applied);
    let Recovered { journal, frames } = recovered.map_err(|error| journal_error(path, error))?;
    let next_id = buckets.last().map_or(0, |bucket| bucket.id + 1);
    let mut catalogue = Catalogue { open: reopened(&snapshot, &options).map_err(told)?, next_id };
    let mut view = View { active: Memtable::default(), frozen: VecDeque::new(), snapshot: Arc::new(snapshot) };
    for (frame, after) in frames {
        let read = view.active.insert(&frame, after);
        read.map_err(|_| damaged(path, format!("frame {} of the {JOURNAL} cannot be decoded", frame.sequence)))?;
        if view.active.bytes() >= options.memtable_bytes {
            view.freeze();
        }
    }
    view.freeze();
    for id in view.frozen.iter().flat_map(|memtable| &memtable.buckets_gone) {
        // Removed by the first transactions, once.
        for bucket in buckets.iter().filter(|bucket| bucket.id == *id) {
            bucket.goes();
        }
        catalogue.close(*id);
    }
    let core = Core {
        database: Closing::new(database),
        options,
        seals,
        closed: AtomicBool::new(false),
        view: RwLock::new(view),
        catalogue: Mutex::new(catalogue),
        progress: Mutex::new(Progress::default()),
        changed: Condvar::new(),
        work: Condvar::new(),
        stopping: Condvar::new(),
    };
    RedbStore::over(Arc::new(core), journal, running).map_err(|error| io_error(path, &error))
}

/// Returns the buckets of the database, oldest first.
fn found_buckets(database: &Database, seals: &Seals) -> Result<Vec<Arc<Bucket>>, StoreError> {
    let txn = database.begin_read().map_err(running_error)?;
    let table = txn.open_table(layout::BUCKETS).map_err(running_error)?;
    let (mut buckets, mut sum) = (Vec::new(), 0);
    for row in table.iter().map_err(running_error)? {
        let (id, facts) = row.map_err(running_error)?;
        let (end_ms, rows, seal) = facts.value();
        if layout::bucket_seal(seals, id.value(), end_ms, rows) != seal {
            return Err(StoreError::Damaged("the facts of a bucket are not what was written".into()));
        }
        sum ^= seal;
        buckets.push(Arc::new(Bucket::found(id.value(), end_ms, rows)));
    }
    let sums = txn.open_table(layout::SUMS).map_err(running_error)?;
    if sums::read(&sums, seals, "buckets")? != sum {
        return Err(StoreError::Damaged("the list of buckets is not what was written".into()));
    }
    Ok(buckets)
}

/// The buckets that take more records: of each window the newest, if it is small. Their filters are
/// whole before anything is inserted.
fn reopened(snapshot: &Snapshot, options: &StoreOptions) -> Result<Vec<Arc<Bucket>>, StoreError> {
    let rows_max = options.bucket_rows_max.min(REOPENED_ROWS_MAX);
    let mut open: Vec<Arc<Bucket>> = Vec::new();
    for tables in snapshot.buckets.iter().rev() {
        let bucket = &tables.bucket;
        let small = bucket.rows.load(std::sync::atomic::Ordering::Relaxed) < rows_max;
        if small && open.iter().all(|newer| newer.end_ms != bucket.end_ms) {
            if options.filters {
                bucket.build_filter(&tables.index, options.bucket_rows_max, &|| false)?;
            }
            open.push(bucket.clone());
        }
    }
    Ok(open)
}

/// The journal's file, if there is one.
pub(crate) fn open_journal(path: &Path) -> Result<Option<Box<dyn StorageBackend>>, OpenError> {
    match std::fs::File::options().read(true).write(true).open(path.join(JOURNAL)) {
        Ok(file) => Ok(Some(Box::new(FileBackend::new(file).map_err(|error| database_error(path, error))?))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error(path, &error)),
    }
}

pub(crate) fn journal_error(path: &Path, error: JournalError) -> OpenError {
    match error {
        JournalError::Io(error) => io_error(path, &error),
        JournalError::Format(found) => {
            OpenError::Version { path: path.join(JOURNAL), found, expected: journal::FORMAT }
        }
        other => damaged(path, format!("the {JOURNAL}: {other}")),
    }
}

fn builder(options: &StoreOptions) -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(options.page_cache_bytes);
    builder
        .set_repair_callback(|session| tracing::info!("store: recovering, {:.0} % done", session.progress() * 100.0));
    builder
}

/// Checks version and identity of the database; gives it both when it is new.
pub(crate) fn identify(path: &Path, database: &Database, new: bool) -> Result<String, OpenError> {
    let read = || -> Result<Option<(u32, String)>, redb::Error> {
        let txn = database.begin_read()?;
        let meta = match txn.open_table(META) {
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            other => other?,
        };
        let format =
            meta.get(layout::META_FORMAT)?.and_then(|value| value.value().try_into().ok().map(u32::from_le_bytes));
        let id = meta.get(layout::META_STORE_ID)?.map(|value| String::from_utf8_lossy(value.value()).into_owned());
        Ok(format.zip(id))
    };
    match read().map_err(|error| storage_error(path, &error))? {
        Some((layout::FORMAT, id)) => Ok(id),
        Some((found, _)) => Err(OpenError::Version { path: path.into(), found, expected: layout::FORMAT }),
        // A creation may have been cut short between the empty database and its first transaction.
        None if new || is_untouched(database) => initialise(database).map_err(|error| storage_error(path, &error)),
        None => Err(damaged(path, format!("{DATABASE} is a redb database, but not one of Hapax"))),
    }
}

fn is_untouched(database: &Database) -> bool {
    database.begin_read().is_ok_and(|txn| txn.list_tables().is_ok_and(|mut tables| tables.next().is_none()))
}

fn initialise(database: &Database) -> Result<String, redb::Error> {
    let id = new_id();
    let mut txn = database.begin_write()?;
    txn.set_quick_repair(true);
    {
        let mut meta = txn.open_table(META)?;
        meta.insert(layout::META_FORMAT, &layout::FORMAT.to_le_bytes()[..])?;
        meta.insert(layout::META_STORE_ID, id.as_bytes())?;
        let (seals, mut sealed) = (Seals::new(&id), Vec::new());
        let facts: [(&str, &[u8]); 2] =
            [(layout::META_APPLIED, &Applied::default().encode()), (layout::META_FEED, &FeedFacts::default().encode())];
        for (name, fact) in facts {
            meta.insert(name, seals.seal(Sealed::Meta, &[name.as_bytes()], fact, &mut sealed))?;
        }
        txn.open_table(layout::SUMS)?;
        txn.open_table(layout::KEPT)?;
        txn.open_table(layout::BUCKETS)?;
        txn.open_table(layout::OUTBOX)?;
        txn.open_table(layout::DEAD_LETTERS)?;
        txn.open_table(layout::FEED)?;
    }
    txn.commit()?;
    Ok(id)
}

/// 32 hex digits that no other store has: the standard library's per-process random keys, twice.
fn new_id() -> String {
    use std::hash::{BuildHasher, RandomState};
    format!("{:016x}{:016x}", RandomState::new().hash_one(1), RandomState::new().hash_one(2))
}

/// Returns true if the store's journal was once found under its name.
fn journal_is_named(database: &Database) -> Result<bool, redb::Error> {
    if hapax_core::fault::mutated("journal-made-anew") {
        return Ok(false);
    }
    Ok(database.begin_read()?.open_table(META)?.get(layout::META_JOURNAL)?.is_some())
}

fn note_journal(database: &Database) -> Result<(), redb::Error> {
    let mut txn = database.begin_write()?;
    txn.set_quick_repair(true);
    txn.open_table(META)?.insert(layout::META_JOURNAL, &[][..])?;
    Ok(txn.commit()?)
}

fn create_folder(path: &Path) -> Result<(), OpenError> {
    if path.is_file() {
        return Err(OpenError::NotAStore { path: path.into(), reason: "it is a file" });
    }
    folder::create(path).map_err(|error| io_error(path, &error))?;
    let strangers =
        std::fs::read_dir(path).map_err(|error| io_error(path, &error))?.filter_map(Result::ok).any(|entry| {
            let name = entry.file_name();
            ![DATABASE, JOURNAL, RUNNING].iter().any(|message_key| name.to_string_lossy().starts_with(message_key))
        });
    if strangers {
        return Err(OpenError::NotAStore { path: path.into(), reason: "the folder holds other files" });
    }
    Ok(())
}

/// Makes the journal, then the database under another name, then gives it its own: the store is
/// there whole or not at all. A link, unlike a rename, never replaces what another process made
/// meanwhile.
fn create_files(path: &Path, file: &Path, options: &StoreOptions) -> Result<(), OpenError> {
    let io = |error: std::io::Error| io_error(path, &error);
    let message_key = std::process::id();
    let new = path.join(format!("{DATABASE}.{message_key}.new"));
    let new_journal = path.join(format!("{JOURNAL}.{message_key}.new"));
    for entry in std::fs::read_dir(path).map_err(io)?.filter_map(Result::ok) {
        // Left by a creation that was cut short; nothing was ever acknowledged from it.
        if entry.file_name().to_string_lossy().ends_with(".new") {
            std::fs::remove_file(entry.path()).map_err(io)?;
        }
    }
    let database = builder(options).create(&new).map_err(|error| database_error(path, error))?;
    let id = identify(path, &database, true)?;
    drop(database);
    make_journal(path, &new_journal, &id)?;
    match std::fs::hard_link(&new, file) {
        // Another process was quicker: its files are the store.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            std::fs::remove_file(&new_journal).map_err(io)?;
        }
        Err(error) => return Err(io(error)),
        Ok(()) => name_journal(path, &new_journal)?,
    }
    std::fs::remove_file(&new).map_err(io)?;
    folder::sync(path).map_err(io)
}

fn make_journal(path: &Path, new: &Path, id: &str) -> Result<(), OpenError> {
    let io = |error: std::io::Error| io_error(path, &error);
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(new).map_err(io)?;
    let file = FileBackend::new(file).map_err(|error| database_error(path, error))?;
    Journal::create(&file, id).map_err(io)
}

/// Gives a new journal its name, unless it has been made already.
fn name_journal(path: &Path, new: &Path) -> Result<(), OpenError> {
    match std::fs::hard_link(new, path.join(JOURNAL)) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(io_error(path, &error)),
        _ => {}
    }
    std::fs::remove_file(new).map_err(|error| io_error(path, &error))
}

fn read_identity(path: &Path) -> Result<Option<String>, OpenError> {
    match std::fs::read_to_string(path.join(IDENTITY)) {
        Ok(text) => match text.lines().find_map(|line| line.strip_prefix("id = ")) {
            Some(id) => Ok(Some(id.to_owned())),
            None => Err(damaged(path, format!("{IDENTITY} names no id"))),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(_) if path.is_file() => Err(OpenError::NotAStore { path: path.into(), reason: "it is a file" }),
        Err(error) => Err(io_error(path, &error)),
    }
}

/// Temporary file, rename, and both synced: the identity is there whole or not at all.
fn write_identity(path: &Path, id: &str) -> std::io::Result<()> {
    let new = path.join("STORE.new");
    let mut file = std::fs::File::create(&new)?;
    writeln!(
        file,
        "This folder is a Hapax store. Do not edit or delete this file.\nformat = {}\nid = {id}",
        layout::FORMAT
    )?;
    file.sync_all()?;
    std::fs::rename(&new, path.join(IDENTITY))?;
    folder::sync(path)
}

pub(crate) fn damaged(path: &Path, reason: String) -> OpenError {
    OpenError::Damaged { path: path.into(), reason }
}

pub(crate) fn database_error(path: &Path, error: DatabaseError) -> OpenError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => OpenError::Locked(path.into()),
        DatabaseError::UpgradeRequired(_) => damaged(path, "another version of redb wrote it".into()),
        other => storage_error(path, &other.into()),
    }
}

pub(crate) fn storage_error(path: &Path, error: &redb::Error) -> OpenError {
    match error {
        redb::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => damaged(path, error.to_string()),
        redb::Error::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            damaged(path, "it is cut short".into())
        }
        redb::Error::Io(error) => io_error(path, error),
        other => damaged(path, other.to_string()),
    }
}

pub(crate) fn io_error(path: &Path, error: &std::io::Error) -> OpenError {
    let (path, reason) = (path.to_owned(), error.to_string());
    if is_full(error) { OpenError::Full { path, reason } } else { OpenError::Io { path, reason } }
}

/// No room on the disk, over the quota, or over the limit of a file's size.
pub(crate) fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// An error of the journal's file while the store runs.
pub(crate) fn io_store_error(error: &std::io::Error) -> StoreError {
    if is_full(error) { StoreError::Full(error.to_string().into()) } else { StoreError::Io(error.to_string().into()) }
}

/// An error of the running store, by what the host can do about it.
pub(crate) fn running_error(error: impl Into<redb::Error>) -> StoreError {
    match error.into() {
        redb::Error::Io(error) => io_store_error(&error),
        redb::Error::Corrupted(reason) => StoreError::Damaged(reason.into()),
        redb::Error::PreviousIo => StoreError::Closed("an earlier write failed".into()),
        other => StoreError::Io(other.to_string().into()),
    }
}
