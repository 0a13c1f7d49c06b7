//! Archive of the components that register steps, beside the store, by digest. The component that
//! registered a step compensates it, also after another version has replaced it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use futures_util::future::BoxFuture;
use hapax_core::{ComponentVersions, MessageProcessor, SagaLog, Scope, Store, StoreError};
use hapax_engine::{Engine, LoadOptions};
use parking_lot::Mutex;

/// Name of the archive's folder in the store's folder.
const FOLDER: &str = "components";
/// Maximum number of sagas read to find the components that are still needed. If there are more,
/// all components stay.
const SAGAS_READ_MAX: usize = 10_000;
/// Sagas read from the store at one time.
const PAGE: usize = 1_000;

/// Keeps components, and loads them for compensations.
#[derive(Clone)]
pub(crate) struct ComponentArchive(Arc<Inner>);

struct Inner {
    folder: PathBuf,
    engine: Engine,
    /// Load options of each processor.
    options: Mutex<BTreeMap<String, LoadOptions>>,
    /// Components loaded since the start, by processor and digest.
    loaded: Mutex<BTreeMap<(String, String), Arc<dyn MessageProcessor>>>,
}

impl ComponentArchive {
    /// Opens the archive of the store in the folder `store`.
    pub(crate) fn of(store: &Path, engine: Engine) -> Self {
        let folder = store.join(FOLDER);
        Self(Arc::new(Inner { folder, engine, options: Mutex::default(), loaded: Mutex::default() }))
    }

    /// Sets the options with which earlier components of a processor run: those of its present
    /// component, also if that registers no steps itself.
    pub(crate) fn run_as(&self, options: LoadOptions) {
        self.0.options.lock().insert(options.name.clone(), options);
    }

    /// Stores a component durably. Must return before the component can register its first step.
    pub(crate) fn keep(&self, digest: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let path = self.0.path(digest);
        if path.exists() {
            return Ok(());
        }
        let write = || -> std::io::Result<()> {
            std::fs::create_dir_all(&self.0.folder)?;
            let mut file = tempfile::NamedTempFile::new_in(&self.0.folder)?;
            file.write_all(bytes)?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            std::fs::File::open(&self.0.folder)?.sync_all()?;
            // The folder may be new: its own entry in the store's folder must be durable too.
            self.0.folder.parent().map_or(Ok(()), |store| std::fs::File::open(store)?.sync_all())
        };
        write().with_context(|| format!("cannot keep a copy of the component as {}", path.display()))
    }

    /// Removes the components that no saga needs, except those `at_work`.
    pub(crate) async fn clean(&self, store: &dyn Store, at_work: &BTreeSet<String>) -> Result<(), StoreError> {
        let Ok(entries) = std::fs::read_dir(&self.0.folder) else { return Ok(()) };
        let kept: BTreeSet<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        let at_work: BTreeSet<PathBuf> = at_work.iter().map(|digest| self.0.path(digest)).collect();
        let old: Vec<&PathBuf> = kept.difference(&at_work).collect();
        if old.is_empty() {
            return Ok(());
        }
        let Some(needed) = needed(store).await? else { return Ok(()) };
        let needed: BTreeSet<PathBuf> = needed.iter().map(|digest| self.0.path(digest)).collect();
        for path in old.into_iter().filter(|path| !needed.contains(*path)) {
            // A leftover file only takes space.
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!("cannot remove the component {}, which no saga needs: {error}", path.display());
            }
        }
        Ok(())
    }
}

/// Returns the digests of the components whose steps may still have to be compensated, or `None` if
/// there are more than [`SAGAS_READ_MAX`] unsettled sagas.
async fn needed(store: &dyn Store) -> Result<Option<BTreeSet<String>>, StoreError> {
    let log = SagaLog::new(store, &Scope::of(""));
    let (mut needed, mut read, mut after) = (BTreeSet::new(), 0, None);
    loop {
        let page = log.list(after.as_ref(), PAGE).await?;
        let Some(last) = page.last() else { return Ok(Some(needed)) };
        after = Some(last.id.clone());
        for saga in page.iter().filter(|saga| !saga.state.has_ended()) {
            read += 1;
            if read > SAGAS_READ_MAX {
                return Ok(None);
            }
            let members = log.read(&saga.id).await?.saga.members;
            needed.extend(members.iter().map(|member| member.component.to_string()));
        }
    }
}

impl Inner {
    fn path(&self, digest: &str) -> PathBuf {
        self.folder.join(format!("{}.wasm", digest.replace(':', "-")))
    }

    fn load(&self, processor: &str, digest: &str) -> Result<Arc<dyn MessageProcessor>, String> {
        let name = (processor.to_owned(), digest.to_owned());
        if let Some(loaded) = self.loaded.lock().get(&name) {
            return Ok(loaded.clone());
        }
        let path = self.path(digest);
        let cannot = |why: String| {
            format!(
                "the component {digest} of `{processor}`, which registered the step, cannot be loaded: {}: {why}",
                path.display()
            )
        };
        let bytes = std::fs::read(&path).map_err(|error| cannot(error.to_string()))?;
        let options = self.options.lock().get(processor).cloned().unwrap_or_default();
        let loaded = self.engine.load(&bytes, options).map_err(|error| cannot(error.to_string()))?;
        if loaded.digest() != digest {
            return Err(cannot(format!("the file holds another component, {}", loaded.digest())));
        }
        let loaded: Arc<dyn MessageProcessor> = Arc::new(loaded);
        self.loaded.lock().insert(name, loaded.clone());
        Ok(loaded)
    }
}

impl ComponentVersions for ComponentArchive {
    fn load<'a>(
        &'a self,
        processor: &'a str,
        digest: &'a str,
    ) -> BoxFuture<'a, Result<Arc<dyn MessageProcessor>, String>> {
        let inner = self.0.clone();
        let (processor, digest) = (processor.to_owned(), digest.to_owned());
        Box::pin(async move {
            // Compiling takes seconds, and would block the runtime.
            let loading = tokio::task::spawn_blocking(move || inner.load(&processor, &digest));
            loading.await.map_err(|error| format!("loading an earlier component failed: {error}"))?
        })
    }
}
