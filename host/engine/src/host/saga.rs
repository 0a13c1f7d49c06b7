//! The `saga` import: steps of the message's saga, through its `Context`. An error there ends the
//! run.

use bytes::Bytes;
use wasmtime::component::Linker;
use wasmtime::{Error, StoreContextMut};

use super::HostState;

type Store<'a> = StoreContextMut<'a, HostState>;

/// All of them wait until what they write is durable, or was read.
pub(crate) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut instance = linker.instance("hapax:processor/saga@0.1.0")?;
    instance.func_wrap_async("step", |mut store: Store<'_>, (name, payload): (String, Bytes)| {
        Box::new(async move { store.data_mut().context()?.step(&name, payload).await.map_err(Error::new) })
    })?;
    instance.func_wrap_async("pivot", |mut store: Store<'_>, (): ()| {
        Box::new(async move { store.data_mut().context()?.pivot().await.map_err(Error::new) })
    })?;
    instance.func_wrap_async("join", |mut store: Store<'_>, (id,): (String,)| {
        Box::new(async move { store.data_mut().context()?.join_saga(&id).await.map_err(Error::new) })
    })?;
    instance.func_wrap_async("complete", |mut store: Store<'_>, (): ()| {
        Box::new(async move { store.data_mut().context()?.complete_saga().await.map_err(Error::new) })
    })
}
