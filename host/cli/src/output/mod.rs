//! Printing: lines, lists, the run printer, the progress bar, times. No other folder prints: what
//! is printed here is free of control characters (`printable.rs`).

pub(crate) mod list;
pub(crate) mod printable;
pub(crate) mod progress;
pub(crate) mod run_printer;
pub(crate) mod time;
pub(crate) mod waiting;

use std::io::Write as _;
use std::process::ExitCode;

use crate::exit;
use crate::output::printable::printable;
use crate::output::progress::Stderr;

/// Prints one whole line on standard output. Ignores errors: a reader that went away does not stop
/// processing.
pub(crate) fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", printable(text));
}

/// Prints one line of columns, with tabs between them, on standard output.
pub(crate) fn columns(texts: &[&str]) {
    let texts: Vec<_> = texts.iter().map(|text| printable(text)).collect();
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", texts.join("\t"));
}

/// Prints one whole line on standard error, above the progress bar.
pub(crate) fn note(text: &str) {
    let _ = Stderr.write_all(format!("{text}\n").as_bytes());
}

/// Prints the error that ended a command, and returns its exit code. The further lines of an error
/// are indented: none of them can be taken for a line of its own.
pub(crate) fn report(error: &anyhow::Error, json: bool) -> ExitCode {
    let (code, text) = (exit::code(error), format!("{error:#}"));
    if json {
        line(&serde_json::json!({ "error": { "code": code, "message": text } }).to_string());
    }
    for (index, part) in text.lines().enumerate() {
        note(&format!("{}{part}", if index == 0 { "error: " } else { "       " }));
    }
    ExitCode::from(code)
}
