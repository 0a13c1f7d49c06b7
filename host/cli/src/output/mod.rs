//! Printing: lines, lists, the run printer, the progress bar, times.

pub(crate) mod list;
pub(crate) mod progress;
pub(crate) mod run_printer;
pub(crate) mod time;

use std::io::Write as _;

/// Prints one whole line on standard output. Ignores errors: a reader that went away does not stop processing.
pub(crate) fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}");
}
