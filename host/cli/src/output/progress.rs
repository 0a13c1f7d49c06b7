//! The progress bar of `hapax run`, and standard error as its neighbours write to it: what they say goes above the bar, whole.
//! There is one terminal, so there is one bar. Counts nothing.

use std::io::{self, IsTerminal as _, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;

/// The bar that stands on the terminal, if one does.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// A bar on the terminal until it is dropped.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// A bar over `total` bytes of input, or over what comes if they are not known; none if standard error is no terminal.
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

/// Standard error, above the bar.
pub(crate) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bar = BAR.lock().clone();
        match bar {
            Some(bar) => bar.suspend(|| io::stderr().write_all(bytes))?,
            None => io::stderr().write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
