//! The `events` import: event streams through the message's `Context`. An error there ends the run.
//! Linked by hand and not through the generated trait, so that data is not copied on its way to the
//! guest's memory.

use bytes::Bytes;
use hapax_core::{AppendConflict, StreamEvent};
use wasmtime::component::{ComponentType, Lift, Linker, Lower};
use wasmtime::{Error, StoreContextMut};

use super::HostState;

type Store<'a> = StoreContextMut<'a, HostState>;
type Append = (String, Option<u64>, Vec<NewEvent>);

/// `new-event` of the contract.
#[derive(ComponentType, Lift)]
#[component(record)]
struct NewEvent {
    #[component(name = "type")]
    kind: String,
    data: Bytes,
}

/// `event` of the contract.
#[derive(ComponentType, Lower)]
#[component(record)]
struct Event {
    id: String,
    version: u64,
    #[component(name = "type")]
    kind: String,
    data: Bytes,
}

/// `conflict` of the contract.
#[derive(ComponentType, Lower)]
#[component(record)]
struct Conflict {
    #[component(name = "actual-version")]
    actual_version: u64,
}

/// All of them may wait for the store.
pub(crate) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut instance = linker.instance("hapax:processor/events@0.1.0")?;
    instance.func_wrap_async("append", |mut store: Store<'_>, (stream, expected, events): Append| {
        Box::new(async move {
            let events =
                events.into_iter().map(|event: NewEvent| hapax_core::NewEvent { kind: event.kind, data: event.data });
            let appended = store.data_mut().context()?.append(&stream, expected, events.collect()).await;
            let conflict = |conflict: AppendConflict| Conflict { actual_version: conflict.actual_version };
            Ok((appended.map_err(Error::new)?.map_err(conflict),))
        })
    })?;
    instance.func_wrap_async("read", |mut store: Store<'_>, (stream, after, limit): (String, u64, u32)| {
        Box::new(async move {
            let read = store.data_mut().context()?.events(&stream, after, limit as usize).await.map_err(Error::new)?;
            Ok((read.into_iter().map(Event::from).collect::<Vec<_>>(),))
        })
    })?;
    instance.func_wrap_async("version", |mut store: Store<'_>, (stream,): (String,)| {
        Box::new(async move { Ok((store.data_mut().context()?.stream_version(&stream).await.map_err(Error::new)?,)) })
    })
}

impl From<StreamEvent> for Event {
    fn from(event: StreamEvent) -> Self {
        let StreamEvent { id, version, kind, data } = event;
        Self { id, version, kind, data }
    }
}
