//! The outbox to a file: CloudEvents, one a line, appended and synced a batch at a time. Knows
//! nothing of what was sent before this process but what the file's end says.
//!
//! A batch that was written and not yet marked as sent when the host died is handed over again,
//! first of all. The relay has one batch of bounded size under way, so the ids at the end of the
//! file are enough to drop it. Standard output, pipes and devices cannot be read back: there, a
//! batch may come twice after a crash.

use std::collections::HashSet;
use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};

use futures_util::future::BoxFuture;
use hapax_core::{Message, Publisher, TransportError};
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::cloudevents;

/// Bytes at the end of the file whose ids are remembered.
const TAIL_BYTES: u64 = 64 << 20;

/// Appends to a file, or writes to standard output.
pub struct JsonlPublisher {
    path: PathBuf,
    to: To,
    /// Ids at the file's end when it was opened; none as soon as a batch holds none of them.
    written: HashSet<String>,
}

enum To {
    /// Ours alone: its lock is held.
    File(File),
    /// A pipe or a device.
    Stream(File),
    Stdout,
}

impl JsonlPublisher {
    /// Opens `path` for appending, and creates it where it is absent; `-` is standard output. A
    /// last line that a crash cut short is removed: its message was never marked as sent.
    pub fn open(path: &Path) -> Result<Self, TransportError> {
        let opened = if path.as_os_str() == "-" { Ok((To::Stdout, HashSet::new())) } else { open(path) };
        let (to, written) = opened.map_err(|error| broken(path, &error))?;
        Ok(Self { path: path.into(), to, written })
    }

    fn append(&mut self, batch: &[Message]) -> io::Result<()> {
        // What is handed over again comes first and in order: a batch without any of it is the end
        // of it.
        if !batch.iter().any(|message| self.written.contains(&message.id)) {
            self.written = HashSet::new();
        }
        let mut lines = Vec::new();
        for message in batch.iter().filter(|message| !self.written.contains(&message.id)) {
            lines.extend(cloudevents::to_json(message));
            lines.push(b'\n');
        }
        match &mut self.to {
            To::Stdout => write_stream(&mut io::stdout().lock(), &lines),
            To::Stream(stream) => write_stream(stream, &lines),
            To::File(file) => write_durably(file, &lines),
        }
    }
}

impl Publisher for JsonlPublisher {
    fn publish<'a>(&'a mut self, batch: &'a [Message]) -> BoxFuture<'a, Result<(), TransportError>> {
        // Blocks for one append and one sync of a batch of up to a thousand messages.
        Box::pin(async move { blocking(|| self.append(batch)).map_err(|error| broken(&self.path, &error)) })
    }
}

/// Runs what blocks here, and has the runtime's other tasks moved away where it has threads for
/// them.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

fn write_stream(out: &mut impl Write, lines: &[u8]) -> io::Result<()> {
    out.write_all(lines)?;
    out.flush()
}

fn write_durably(file: &mut File, lines: &[u8]) -> io::Result<()> {
    let end = file.stream_position()?;
    let written = file.write_all(lines).and_then(|()| file.sync_data());
    if written.is_err() {
        // What is there of the batch will be written again: it must not stand twice.
        let _ = file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end)).map(drop));
    }
    written
}

fn broken(path: &Path, error: &io::Error) -> TransportError {
    let help = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "Free some space and start again",
        io::ErrorKind::ResourceBusy => "Stop that process, or name another file",
        _ => "Fix the path and start again",
    };
    TransportError::Broken(
        format!("the outbox {}: {error}. {help}; what was not sent stays in the outbox", path.display()).into(),
    )
}

fn open(path: &Path) -> io::Result<(To, HashSet<String>)> {
    let absent = !path.exists();
    if !absent && !path.metadata()?.is_file() {
        return Ok((To::Stream(File::options().write(true).open(path)?), HashSet::new()));
    }
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    // Two writers would each write over what the other has written. A filesystem without locks
    // cannot tell.
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another process writes to it"));
    }
    if absent {
        sync_folder(path)?;
    }
    let written = read_end(&mut file)?;
    Ok((To::File(file), written))
}

/// A new file's name must outlive a power loss as its lines do.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// Cuts a torn last line, leaves the file at its end, and answers the ids that stand there.
fn read_end(file: &mut File) -> io::Result<HashSet<String>> {
    let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(start))?;
    file.read_to_end(&mut tail)?;
    let whole = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    if whole < tail.len() {
        if whole == 0 && start > 0 {
            return Err(io::Error::other("its last line is longer than any message: it is no outbox file"));
        }
        if !is_torn(&tail[whole..]) {
            return Err(io::Error::other("its last line is no part of a CloudEvent: it is no outbox file"));
        }
        file.set_len(start + whole as u64)?;
    }
    file.seek(SeekFrom::End(0))?;
    let lines = tail[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    // The first line of the tail may begin in its middle; it is too old to matter.
    Ok(lines.filter_map(|line| cloudevents::parse(line).ok()).map(|message| message.id).collect())
}

/// Returns `true` if this may be the beginning of a line that a crash cut short. The check keeps a
/// file that is not an outbox from losing its last line. Zeros are what some filesystems leave of
/// an append that a power loss cut short.
fn is_torn(line: &[u8]) -> bool {
    let begin = cloudevents::LINE_BEGIN;
    let common = line.len().min(begin.len());
    line[..common] == begin[..common] || line.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(ids: &[&str]) -> Vec<Message> {
        ids.iter().map(|id| Message::new(*id, "/s", "t")).collect()
    }

    fn ids(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).expect("text");
        text.lines().map(|line| cloudevents::parse(line.as_bytes()).expect(line).id).collect()
    }

    async fn send(publisher: &mut JsonlPublisher, ids: &[&str]) {
        publisher.publish(&messages(ids)).await.expect("written");
    }

    fn refusal(path: &Path) -> String {
        JsonlPublisher::open(path).map(drop).expect_err("refused").to_string()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_batch_handed_over_again_is_not_written_twice() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("outbox");
        send(&mut JsonlPublisher::open(&path).expect("new"), &["a", "b"]).await;
        let whole = std::fs::read(&path).expect("there");
        // Torn by a crash, anywhere; or grown by a power loss.
        let line = cloudevents::to_json(&messages(&["c"])[0]);
        let torn = (0..=line.len()).map(|length| line[..length].to_vec()).chain([vec![0; 4_096]]);
        for rest in torn {
            std::fs::write(&path, [&whole[..], &rest].concat()).expect("torn");
            let mut again = JsonlPublisher::open(&path).expect("again");
            send(&mut again, &["b", "c"]).await;
            send(&mut again, &["d"]).await;
            assert_eq!(ids(&path), ["a", "b", "c", "d"]);
        }
    }

    #[tokio::test]
    async fn ids_of_the_file_are_forgotten_when_nothing_comes_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("outbox");
        send(&mut JsonlPublisher::open(&path).expect("new"), &["a", "b", "c"]).await;
        let mut again = JsonlPublisher::open(&path).expect("again");
        send(&mut again, &["b"]).await;
        send(&mut again, &["c", "d"]).await;
        assert_eq!((ids(&path).len(), again.written.len()), (4, 3));
        send(&mut again, &["e"]).await;
        assert_eq!((ids(&path).len(), again.written.len()), (5, 0));
    }

    #[tokio::test]
    async fn a_file_has_one_writer() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("outbox");
        let mut first = JsonlPublisher::open(&path).expect("new");
        assert!(refusal(&path).contains("another process writes to it. Stop that process"), "{}", refusal(&path));
        send(&mut first, &["a"]).await;
        drop(first);
        send(&mut JsonlPublisher::open(&path).expect("free again"), &["b"]).await;
        assert_eq!(ids(&path), ["a", "b"]);
    }

    #[tokio::test]
    async fn what_is_no_outbox_file_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("letter");
        std::fs::write(&path, "Dear all,\nhello").expect("a letter");
        assert!(refusal(&path).contains("it is no outbox file"), "{}", refusal(&path));
        assert_eq!(std::fs::read_to_string(&path).expect("still there"), "Dear all,\nhello");
        assert!(refusal(folder.path()).contains("directory"), "{}", refusal(folder.path()));
        assert!(refusal(&folder.path().join("no/such")).contains("Fix the path"));
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn devices_are_written_to_and_a_full_one_says_what_to_do() {
        send(&mut JsonlPublisher::open(Path::new("/dev/null")).expect("a device"), &["a"]).await;
        let mut full = JsonlPublisher::open(Path::new("/dev/full")).expect("a device");
        let error = full.publish(&messages(&["a"])).await.expect_err("full").to_string();
        assert!(error.contains("/dev/full") && error.contains("Free some space"), "{error}");
    }
}
