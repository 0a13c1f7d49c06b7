//! The `state` import: the processor's key-value state through the message's `Context`. An error
//! there ends the run. Linked by hand and not through the generated trait, so that values are not
//! copied on their way to the guest's memory.

use bytes::Bytes;
use wasmtime::component::Linker;
use wasmtime::{Error, StoreContextMut};

use super::HostState;

type Store<'a> = StoreContextMut<'a, HostState>;
type Range = (String, Option<String>, u32);
type Exchange = (String, Option<Bytes>, Option<Bytes>);

/// Adds the `state` imports. Functions that read the state may wait for the store.
pub(crate) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut state = linker.instance("hapax:processor/state@0.1.0")?;
    state.func_wrap_async("get", |mut store: Store<'_>, (key,): (String,)| {
        Box::new(async move { Ok((store.data_mut().context()?.get(&key).await.map_err(Error::new)?,)) })
    })?;
    state.func_wrap("set", |mut store: Store<'_>, (key, value): (String, Bytes)| {
        store.data_mut().context()?.set(&key, value).map_err(Error::new)
    })?;
    state.func_wrap("delete", |mut store: Store<'_>, (key,): (String,)| {
        store.data_mut().context()?.delete(&key).map_err(Error::new)
    })?;
    state.func_wrap_async("compare-and-set", |mut store: Store<'_>, (key, expected, value): Exchange| {
        Box::new(async move {
            let context = store.data_mut().context()?;
            Ok((context.compare_and_set(&key, expected.as_deref(), value).await.map_err(Error::new)?,))
        })
    })?;
    state.func_wrap_async("scan", |mut store: Store<'_>, (start, end, limit): Range| {
        Box::new(async move {
            let context = store.data_mut().context()?;
            Ok((context.scan(&start, end.as_deref(), limit as usize).await.map_err(Error::new)?,))
        })
    })
}
