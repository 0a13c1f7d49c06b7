//! Runs other programs: output collected, progress told line by line. Decides nothing about them.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Command, Stdio};

use crate::{BuildError, Progress};

/// Number of the last lines of cargo's errors that an error message carries.
const STDERR_LINES_MAX: usize = 60;

/// Variables that would change a guest's build: from the cargo that runs this program, or from the
/// user's settings for the host.
const LEAKS: [&str; 10] = [
    "RUSTC",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTFLAGS",
    "RUSTDOCFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS",
    "CARGO_PRIMARY_PACKAGE",
    "RUSTC_BOOTSTRAP",
];

/// Result of a program.
pub(crate) struct Ran {
    pub(crate) success: bool,
    pub(crate) stdout: Vec<u8>,
    /// The last lines of its complaints.
    pub(crate) stderr: String,
}

/// The cargo that runs us, else the one on PATH, free of what concerns only the host's build.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for name in LEAKS {
        command.env_remove(name);
    }
    // Empty also overrules a wrapper that a cargo configuration names.
    command.env("RUSTC_WRAPPER", "").env("CARGO_TERM_COLOR", "never");
    command
}

/// Runs cargo. What it is at goes to `progress` as it comes; what it complains of, at the end if it
/// succeeds.
pub(crate) fn run(command: &mut Command, progress: Progress<'_>) -> Result<Ran, BuildError> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(|source| {
            BuildError::Start { program: command.get_program().to_string_lossy().into_owned(), source }
        })?;
    let mut stdout = child.stdout.take().expect("standard output was piped");
    let stderr = child.stderr.take().expect("standard error was piped");
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| bytes)
    });
    let mut complaints = VecDeque::new();
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if is_status(&line) {
            progress(&line);
        } else {
            complaints.push_back(line);
        }
        if complaints.len() > STDERR_LINES_MAX {
            complaints.pop_front();
        }
    }
    let name = command.get_program().to_owned();
    let stdout = reader.join().expect("reading bytes does not panic").map_err(BuildError::file(&name))?;
    let success = child.wait().map_err(BuildError::file(&name))?.success();
    if success {
        complaints.iter().for_each(|line| progress(line));
    }
    Ok(Ran { success, stdout, stderr: Vec::from(complaints).join("\n").trim_end().to_owned() })
}

/// Returns true if the line is one of cargo's progress lines: a verb that ends in column 12.
fn is_status(line: &str) -> bool {
    let verb = line.trim_start().split(' ').next().unwrap_or_default();
    line.starts_with(' ') && verb.starts_with(char::is_uppercase) && line.find(verb).unwrap_or(0) + verb.len() == 12
}

/// The trimmed output of a program that only answers a question; what went wrong, in words.
pub(crate) fn ask(command: &mut Command) -> Result<String, String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{}: {error}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_told_from_a_complaint() {
        assert!(is_status("   Compiling shop v0.1.0 (/shop)"));
        assert!(is_status("    Blocking waiting for file lock on build directory"));
        for complaint in
            ["", "error: no", "  --> src/lib.rs:1:39", "   = note: Required", "    Some code", "12 | Compiling"]
        {
            assert!(!is_status(complaint), "{complaint}");
        }
    }
}
