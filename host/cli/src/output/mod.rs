//! How results are printed: lines, the run printer, the progress bar, times.

pub(crate) mod progress;
pub(crate) mod run_printer;
pub(crate) mod time;
