//! Synchronisation of the core's threads: parking_lot's mutex, std's channels and threads. Under
//! the feature `shuttle`, which is for tests only, they are shuttle's, which tries one interleaving
//! after the other. Adds nothing of its own.

#[cfg(not(feature = "shuttle"))]
pub(crate) use parking_lot::{Mutex, MutexGuard};
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::{sync::mpsc, thread};

#[cfg(feature = "shuttle")]
pub(crate) use explored::Mutex;
#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::{MutexGuard, mpsc};
#[cfg(feature = "shuttle")]
pub(crate) use shuttle::thread;

#[cfg(feature = "shuttle")]
mod explored {
    /// Shuttle's mutex with parking_lot's interface: a panic while it is held ends the test, and so
    /// it is never poisoned.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> shuttle::sync::MutexGuard<'_, T> {
            self.0.lock().expect("nobody panics while it is held")
        }
    }
}
