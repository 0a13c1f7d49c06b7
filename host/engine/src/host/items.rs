//! The messages of one call, each with its own context, and which of them the guest works on. One
//! alone is always selected; of a batch, the guest says which. Decides nothing about them.

use hapax_core::{Context, Invocation, fault};
use wasmtime::component::Linker;
use wasmtime::{Error, StoreContextMut};

use super::HostState;

/// A message with the context that its effects go to.
pub(crate) struct Item {
    pub(crate) invocation: Invocation,
    pub(crate) context: Context,
}

/// Messages that one call works on.
#[expect(clippy::large_enum_variant, reason = "nearly every one is `One`, on the hot path")]
pub(crate) enum Items {
    /// One message.
    One(Item),
    /// Many, and the one that was selected last.
    Batch {
        /// In the order in which the guest has them.
        items: Vec<Item>,
        /// `None` until the guest selects one: before that, an effect belongs to no message.
        selected: Option<usize>,
    },
}

/// An effect that belongs to no message.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotSelected {
    #[error("it used state, events or outbox before it selected a message of the batch (`batch.select`)")]
    Nothing,
    #[error("it selected message {index} of a call that has {count} (`batch.select`, counted from 0)")]
    Past { index: u32, count: usize },
}

impl Items {
    /// Many messages, none of them selected.
    pub(crate) fn batch(items: Vec<Item>) -> Self {
        Self::Batch { items, selected: None }
    }

    /// Returns the number of messages.
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Batch { items, .. } => items.len(),
        }
    }

    /// The one that is selected.
    pub(crate) fn selected(&self) -> Option<&Item> {
        match self {
            Self::One(item) => Some(item),
            Self::Batch { items, selected } => items.get((*selected)?),
        }
    }

    fn selected_mut(&mut self) -> Option<&mut Item> {
        match self {
            Self::One(item) => Some(item),
            Self::Batch { items, selected } => items.get_mut((*selected)?),
        }
    }

    /// Returns the message behind a message handle.
    pub(crate) fn at(&self, index: u32) -> Option<&Item> {
        match self {
            Self::One(item) => Some(item),
            Self::Batch { items, .. } => items.get(index as usize),
        }
    }

    fn select(&mut self, index: u32) -> Result<(), NotSelected> {
        let count = self.count();
        if index as usize >= count {
            return Err(NotSelected::Past { index, count });
        }
        if let Self::Batch { selected, .. } = self {
            *selected = Some(if fault::mutated("batch-select-ignored") { 0 } else { index as usize });
        }
        Ok(())
    }
}

impl HostState {
    /// Where effects go: the context of the message that is selected.
    pub(crate) fn context(&mut self) -> wasmtime::Result<&mut Context> {
        match self.items.selected_mut() {
            Some(item) => Ok(&mut item.context),
            None => Err(Error::new(NotSelected::Nothing)),
        }
    }
}

pub(crate) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut batch = linker.instance("hapax:processor/batch@0.1.0")?;
    batch.func_wrap("select", |mut store: StoreContextMut<'_, HostState>, (index,): (u32,)| {
        let state = store.data_mut();
        state.items.select(index).map_err(Error::new)?;
        if let (Some(wasi), Some(item)) = (&mut state.wasi, state.items.selected()) {
            wasi.turn_to(&item.invocation);
        }
        Ok(())
    })
}
