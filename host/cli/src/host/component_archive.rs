//! The components of processors that take steps, kept beside the store under their digests: the one that registered a step undoes it, also
//! when another one has taken its place long ago.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use futures_util::future::BoxFuture;
use hapax_core::{ComponentVersions, MessageProcessor, SagaLog, Scope, Store, StoreError};
use hapax_engine::{Engine, LoadOptions};
use parking_lot::Mutex;

/// In the store's folder.
const FOLDER: &str = "components";
/// Sagas that are read to find out which components are still needed; where there are more, all are kept.
const SAGAS_READ_MAX: usize = 10_000;
/// Sagas listed at one time.
const PAGE: usize = 1_000;

/// Keeps components and loads them again.
#[derive(Clone)]
pub(crate) struct KeptComponents(Arc<Inner>);

struct Inner {
    folder: PathBuf,
    engine: Engine,
    /// How each processor's components are run here.
    options: Mutex<BTreeMap<String, LoadOptions>>,
    /// Those that were needed since the start, by processor and digest.
    loaded: Mutex<BTreeMap<(String, String), Arc<dyn MessageProcessor>>>,
}

impl KeptComponents {
    /// Those of the store in the folder `store`.
    pub(crate) fn of(store: &Path, engine: Engine) -> Self {
        let folder = store.join(FOLDER);
        Self(Arc::new(Inner { folder, engine, options: Mutex::default(), loaded: Mutex::default() }))
    }

    /// Has the earlier components of a processor be run as its present one is, whether or not that takes steps itself.
    pub(crate) fn run_as(&self, options: LoadOptions) {
        self.0.options.lock().insert(options.name.clone(), options);
    }

    /// Keeps a component, durably, before its first step can be registered.
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
            // The folder itself may be new.
            self.0.folder.parent().map_or(Ok(()), |store| std::fs::File::open(store)?.sync_all())
        };
        write().with_context(|| format!("cannot keep a copy of the component as {}", path.display()))
    }

    /// Removes the components that no saga needs any more, but for those at work.
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
            // What cannot be removed takes space, and does no harm.
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!("cannot remove the component {}, which nothing needs: {error}", path.display());
            }
        }
        Ok(())
    }
}

/// Digests of the components that registered steps which may still have to be undone; `None` where there are too many sagas to tell.
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
                "the component {digest} of `{processor}`, which registered the step, cannot be had: {}: {why}",
                path.display()
            )
        };
        let bytes = std::fs::read(&path).map_err(|error| cannot(error.to_string()))?;
        let options = self.options.lock().get(processor).cloned().unwrap_or_default();
        let loaded = self.engine.load(&bytes, options).map_err(|error| cannot(error.to_string()))?;
        if loaded.digest() != digest {
            return Err(cannot(format!("it is another one, {}", loaded.digest())));
        }
        let loaded: Arc<dyn MessageProcessor> = Arc::new(loaded);
        self.loaded.lock().insert(name, loaded.clone());
        Ok(loaded)
    }
}

impl ComponentVersions for KeptComponents {
    fn load<'a>(
        &'a self,
        processor: &'a str,
        digest: &'a str,
    ) -> BoxFuture<'a, Result<Arc<dyn MessageProcessor>, String>> {
        let inner = self.0.clone();
        let (processor, digest) = (processor.to_owned(), digest.to_owned());
        Box::pin(async move {
            // Compiling takes long.
            let loading = tokio::task::spawn_blocking(move || inner.load(&processor, &digest));
            loading.await.map_err(|error| format!("loading an earlier component failed: {error}"))?
        })
    }
}
