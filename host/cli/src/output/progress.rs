//! The progress bar of `hapax run`, and a standard error that writes whole lines above it. There is
//! one terminal, so there is one bar.

use std::io::{self, IsTerminal as _, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use crate::output::printable::printable;

/// The bar on the terminal, if there is one.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Shows a bar on the terminal until it is dropped.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// Makes a bar for `total` bytes of input, or a spinner if the size is unknown. Returns `None`
    /// if standard error is not a terminal.
    pub(crate) fn on_terminal(total: Option<u64>) -> Option<Self> {
        if !io::stderr().is_terminal() {
            return None;
        }
        let bar = match total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::new_spinner(),
        };
        let template = match total {
            Some(_) => "{bar:30.cyan/dim} {percent:>3} %  {msg}  {eta} left",
            None => "{spinner:.cyan}  {msg}  {elapsed}",
        };
        bar.set_style(ProgressStyle::with_template(template).expect("the template is a constant"));
        bar.enable_steady_tick(Duration::from_millis(200));
        *BAR.lock() = Some(bar.clone());
        Some(Self(bar))
    }

    /// Moves the bar to `bytes` of input read.
    pub(crate) fn set(&self, bytes: u64, message: String) {
        self.0.set_position(bytes);
        self.0.set_message(message);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        *BAR.lock() = None;
        self.0.finish_and_clear();
    }
}

/// Standard error, above the bar. Takes whole lines, one at a time: what is not the end of the line
/// is escaped.
pub(crate) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let line = format!("{}\n", printable(text.strip_suffix('\n').unwrap_or(&text)));
        let bar = BAR.lock().clone();
        match bar {
            Some(bar) => bar.suspend(|| io::stderr().write_all(line.as_bytes()))?,
            None => io::stderr().write_all(line.as_bytes())?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
