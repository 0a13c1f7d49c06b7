//! Instances that wait for their processor's next message (`InstanceMode::Reuse`): one list for the
//! engine, bounded; when it is full, the one that has waited longest goes. Runs nothing.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::instance::Instance;

/// The instances of all processors that wait.
pub(crate) struct IdleInstances {
    /// Slots of the pool that the list may hold; the pool has this many beside those of running
    /// instances.
    slots_max: u32,
    list: Mutex<List>,
}

/// Longest waiting first.
#[derive(Default)]
struct List {
    waiting: VecDeque<Waiting>,
    /// Slots of the pool that `waiting` holds.
    slots: u32,
}

struct Waiting {
    /// The processor it is an instance of.
    of: u64,
    /// Slots of the pool it takes.
    slots: u32,
    instance: Box<Instance>,
}

impl IdleInstances {
    pub(crate) fn new(slots_max: u32) -> Self {
        Self { slots_max, list: Mutex::default() }
    }

    /// Takes out the instance of processor `of` that ran last: its memory is the warmest. It is now
    /// the caller's alone.
    pub(crate) fn take(&self, of: u64) -> Option<Box<Instance>> {
        let mut list = self.list();
        let place = list.waiting.iter().rposition(|waiting| waiting.of == of)?;
        let taken = list.waiting.remove(place)?;
        list.slots -= taken.slots;
        Some(taken.instance)
    }

    /// Keeps an instance of processor `of`.
    pub(crate) fn put(&self, of: u64, slots: u32, instance: Box<Instance>) {
        if slots > self.slots_max {
            return;
        }
        let mut list = self.list();
        // Unmapping takes its time: those that go are dropped once the list is free again.
        let mut gone = Vec::new();
        while list.slots + slots > self.slots_max
            && let Some(oldest) = list.waiting.pop_front()
        {
            list.slots -= oldest.slots;
            gone.push(oldest);
        }
        list.slots += slots;
        list.waiting.push_back(Waiting { of, slots, instance });
        drop(list);
        drop(gone);
    }

    /// Drops what waits for processor `of`, which is no more.
    pub(crate) fn forget(&self, of: u64) {
        let mut list = self.list();
        let (gone, rest): (VecDeque<_>, VecDeque<_>) = list.waiting.drain(..).partition(|waiting| waiting.of == of);
        list.waiting = rest;
        list.slots -= gone.iter().map(|waiting| waiting.slots).sum::<u32>();
        drop(list);
        drop(gone);
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
