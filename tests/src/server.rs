//! `hapax up`, the real binary, in a folder that outlives it; and the commands that operators ask
//! it with.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::process::{guest, hapax};

/// Time after which a test that hangs fails.
const HUNG: Duration = Duration::from_secs(60);

/// A host that runs. Dropped, it is killed.
pub struct Server {
    child: Child,
    /// Address and port.
    pub address: String,
    folder: PathBuf,
}

/// Output and exit of a command.
#[derive(Debug)]
pub struct Printed {
    /// Its exit code; `None` if it was killed.
    pub code: Option<i32>,
    /// On standard output.
    pub out: String,
    /// On standard error.
    pub err: String,
}

impl Printed {
    /// Returns the output of `command`.
    pub fn by(command: &mut Command) -> Self {
        let Output { status, stdout, stderr } = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: status.code(), out: text(stdout), err: text(stderr) }
    }

    /// The lines of standard output, as JSON; it must have ended well.
    pub fn lines(&self) -> Vec<Value> {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// It was refused with this code, in these words.
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for word in words {
            assert!(self.err.contains(word), "`{word}` is not in: {}", self.err);
        }
    }
}

/// Writes `hapax.toml`: one processor, `odd`, of fixtures, with these settings.
pub fn configure(folder: &Path, odd: &str) {
    let component = guest("hapax-fixtures");
    let config =
        format!("store = \"store\"\nlisten = \"127.0.0.1:0\"\n[processors.odd]\ncomponent = {component:?}\n{odd}\n");
    std::fs::write(folder.join("hapax.toml"), config).unwrap();
}

/// An operator's command on the store in a folder whose host is stopped.
pub fn on_store(folder: &Path, arguments: &[&str]) -> Printed {
    Printed::by(hapax().args(arguments).arg("--store").arg(folder.join("store")))
}

impl Server {
    /// `hapax up` in a folder that is configured; with this fault point, if any.
    pub fn start(folder: &Path, fault: Option<&str>) -> Self {
        let mut command = hapax();
        command.args(["up", "--json", "--config"]).arg(folder.join("hapax.toml")).stderr(Stdio::null());
        command.envs(fault.map(|fault| ("HAPAX_FAULT", fault)));
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        let first: Value = serde_json::from_str(&first).unwrap();
        let address = first["listening"].as_str().unwrap().to_owned();
        Self { child, address, folder: folder.to_owned() }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// An operator's command to this host.
    pub fn asked(&self, arguments: &[&str]) -> Printed {
        Printed::by(hapax().args(arguments).args(["--host", &self.url()]))
    }

    /// Posts a CloudEvent to `odd`; status and body.
    pub fn post(&self, event: &str) -> (u16, String) {
        self.ask("POST /v1/processors/odd/messages", &["content-type: application/cloudevents+json"], event)
    }

    /// One request; status and body.
    pub fn ask(&self, what: &str, headers: &[&str], body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let mut head = format!("{what} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
        headers.iter().for_each(|header| head += &format!("{header}\r\n"));
        write!(stream, "{head}\r\n{body}").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// Asks until `wanted` holds of the answer, which the host must come to by itself.
    pub fn until(&self, arguments: &[&str], wanted: impl Fn(&Printed) -> bool) -> Printed {
        let since = Instant::now();
        loop {
            let printed = self.asked(arguments);
            if wanted(&printed) {
                return printed;
            }
            assert!(since.elapsed() < HUNG, "it never came to what was wanted: {printed:?}");
        }
    }

    /// Sends it a signal, such as `HUP`.
    pub fn signal(&self, name: &str) {
        assert!(
            Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap().success()
        );
    }

    /// Returns true if the process has died.
    pub fn has_died(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Tells it to stop, waits, and answers its exit code.
    pub fn stop(mut self) -> Option<i32> {
        self.signal("TERM");
        self.child.wait().unwrap().code()
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
