//! Runs other programs: output collected, errors told line by line. Decides nothing about them.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Command, Stdio};

use crate::{BuildError, Progress};

/// How many of the last lines of standard error an error message carries.
const STDERR_LINES_MAX: usize = 40;

/// What would reach into a guest's build from the one that runs us, or from the user's own settings for the host.
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

/// What a program left behind.
pub(crate) struct Ran {
    pub(crate) success: bool,
    pub(crate) stdout: Vec<u8>,
    /// The last lines of standard error.
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

/// Runs `command`; each line of its standard error goes to `progress` as it comes.
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
    let mut last = std::collections::VecDeque::new();
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if !line.is_empty() {
            progress(&line);
        }
        last.push_back(line);
        if last.len() > STDERR_LINES_MAX {
            last.pop_front();
        }
    }
    let name = command.get_program().to_owned();
    let stdout = reader.join().expect("reading bytes does not panic").map_err(BuildError::file(&name))?;
    let success = child.wait().map_err(BuildError::file(&name))?.success();
    Ok(Ran { success, stdout, stderr: Vec::from(last).join("\n") })
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
