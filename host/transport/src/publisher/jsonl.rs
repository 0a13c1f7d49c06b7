//! The outbox to a file: CloudEvents, one a line, appended and synced a batch at a time. Knows
//! nothing of what was sent before this process but what the file's end says.
//!
//! A batch that was written and not yet marked as sent when the host died is handed over again. No
//! batch has more lines than [`BATCH_BYTES_MAX`] bytes, or it is one line: the ids in that much of
//! the file's end are enough to drop what comes again. Standard output, pipes and devices cannot be
//! read back: there, a batch may come twice after a crash.
//!
//! The file is opened for append, so whoever truncates it loses no later line and leaves no hole.
//! Whoever renames it asks for a new one with a [`Reopen`].

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::BoxFuture;
use hapax_core::{BATCH_BYTES_MAX, Message, Published, Publisher, SendAnswer, TransportError, fault};
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::cloudevents;
use crate::publisher::file_end::{self, WrittenIds};

/// Appends to a file, or writes to standard output.
pub struct JsonlPublisher {
    path: PathBuf,
    to: To,
    /// Ids at the file's end when it was opened.
    written: WrittenIds,
    reopen: Reopen,
}

enum To {
    /// Ours alone: its lock is held.
    File(File),
    /// A pipe or a device.
    Stream(File),
    Stdout,
}

/// Request to close the file and open its path again, for whoever has renamed the file.
#[derive(Debug, Clone, Default)]
pub struct Reopen(Arc<AtomicBool>);

impl Reopen {
    /// Asks for it: the next batch goes to the file that is at the path then.
    pub fn ask(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl JsonlPublisher {
    /// Opens `path` for appending, and creates it where it is absent; `-` is standard output. A
    /// last line that a crash cut short is completed if its message is whole, and else removed: it
    /// was never marked as sent.
    pub fn open(path: &Path) -> Result<Self, TransportError> {
        let mut written = WrittenIds::default();
        let opened = if path.as_os_str() == "-" { Ok(To::Stdout) } else { open(path, &mut written) };
        let to = opened.map_err(|error| broken(path, &error))?;
        Ok(Self { path: path.into(), to, written, reopen: Reopen::default() })
    }

    /// Returns the request to open the file again; none if it is no file.
    pub fn reopen(&self) -> Option<Reopen> {
        matches!(self.to, To::File(_)).then(|| self.reopen.clone())
    }

    /// Opens the path again if that was asked for. Otherwise, and if it fails, the old file stays:
    /// nothing is lost, and the next batch tries again.
    fn reopen_if_asked(&mut self) {
        if !self.reopen.0.swap(false, Ordering::SeqCst) {
            return;
        }
        match self
            .renamed()
            .and_then(|renamed| if renamed { open(&self.path, &mut self.written).map(Some) } else { Ok(None) })
        {
            Ok(Some(to)) => self.to = to,
            Ok(None) => {}
            Err(error) => {
                tracing::error!(
                    "outbox: {} cannot be opened again: {error}; the old file gets the messages",
                    self.path.display()
                );
                self.reopen.ask();
            }
        }
    }

    /// Returns true if the path names another file than the open one, or none.
    fn renamed(&self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt as _;
        let To::File(file) = &self.to else { return Ok(false) };
        let now = file.metadata()?;
        match self.path.metadata() {
            Ok(at_path) => Ok((at_path.dev(), at_path.ino()) != (now.dev(), now.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Appends as much of the batch as it takes, and returns the number of messages that are there
    /// then.
    fn append(&mut self, batch: &[Message]) -> io::Result<usize> {
        self.reopen_if_asked();
        let (mut lines, mut taken, mut bytes) = (Vec::new(), 0, 0);
        for message in batch {
            // Lines that are there already count as well: they are not marked as sent either.
            let start = lines.len();
            lines.extend(cloudevents::to_json(message));
            lines.push(b'\n');
            bytes += lines.len() - start;
            let is_over = bytes > BATCH_BYTES_MAX && !fault::mutated("outbox-batch-unbounded");
            let is_over = is_over && taken > 0;
            if is_over || self.written.has(&message.id) {
                lines.truncate(start);
            }
            if is_over {
                break;
            }
            taken += 1;
        }
        if !lines.is_empty() {
            match &mut self.to {
                To::Stdout => write_stream(&mut io::stdout().lock(), &lines),
                To::Stream(stream) => write_stream(stream, &lines),
                To::File(file) => write_durably(file, &lines),
            }?;
            self.written.written_behind(lines.len());
        }
        Ok(taken)
    }
}

impl Publisher for JsonlPublisher {
    fn publish<'a>(&'a mut self, batch: &'a [Message]) -> BoxFuture<'a, Result<Published, TransportError>> {
        // Blocks for one append and one sync of a batch of bounded size.
        Box::pin(async move {
            let taken = blocking(|| self.append(batch)).map_err(|error| broken(&self.path, &error))?;
            let mut published = Published::all(batch.len());
            published.answers[taken..].fill(SendAnswer::NotSent);
            Ok(published)
        })
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
    let end = file.metadata()?.len();
    let written = file.write_all(lines).and_then(|()| file.sync_data());
    if written.is_err() && file.metadata().is_ok_and(|now| now.len() > end) {
        // Some of the batch is there, and will be written again: it must not stand twice.
        let _ = file.set_len(end);
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

/// Opens a file, or the pipe or device that the path names.
fn open(path: &Path, written: &mut WrittenIds) -> io::Result<To> {
    if path.exists() && !path.metadata()?.is_file() {
        return Ok(To::Stream(File::options().write(true).open(path)?));
    }
    file_end::open(path, written).map(To::File)
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
    async fn a_whole_last_line_without_its_end_is_completed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("outbox");
        send(&mut JsonlPublisher::open(&path).expect("new"), &["a", "b"]).await;
        let whole = std::fs::read(&path).expect("there");
        std::fs::write(&path, &whole[..whole.len() - 1]).expect("without its end");
        let mut again = JsonlPublisher::open(&path).expect("again");
        assert_eq!(std::fs::read(&path).expect("there"), whole);
        send(&mut again, &["b", "c"]).await;
        assert_eq!(ids(&path), ["a", "b", "c"]);
    }

    /// A host that dies after each batch, before it is marked: each batch comes again to the next.
    #[tokio::test]
    async fn no_line_stands_twice_however_large_the_messages_are() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("outbox");
        // JSON takes six bytes for each of these; the last message alone is more than a batch.
        let sizes = [[300_000; 12].as_slice(), &[BATCH_BYTES_MAX / 5]].concat();
        let all: Vec<_> = (0_usize..)
            .zip(sizes)
            .map(|(number, size)| {
                let data = vec![1_u8; size];
                Message::new(number.to_string(), "/s", "t").with_data("text/plain", data)
            })
            .collect();
        let (mut marked, mut batches) = (0, 0);
        while marked < all.len() {
            let mut taken = 0;
            for _ in 0..2 {
                let mut publisher = JsonlPublisher::open(&path).expect("opened");
                let published = publisher.publish(&all[marked..]).await.expect("written");
                taken = published.answers.iter().filter(|answer| **answer == SendAnswer::Delivered).count();
                assert!(taken > 0 && published.answers[..taken].iter().all(|answer| *answer == SendAnswer::Delivered));
            }
            marked += taken;
            batches += 1;
        }
        assert!(batches >= 3, "{batches}");
        assert_eq!(ids(&path), (0..all.len()).map(|number| number.to_string()).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_file_that_is_truncated_has_no_hole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("outbox");
        let mut publisher = JsonlPublisher::open(&path).expect("new");
        send(&mut publisher, &["a", "b"]).await;
        File::options().write(true).open(&path).expect("opened").set_len(0).expect("truncated");
        send(&mut publisher, &["c"]).await;
        assert_eq!(ids(&path), ["c"]);
    }

    #[tokio::test]
    async fn a_renamed_file_is_left_when_that_is_asked_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, old) = (folder.path().join("outbox"), folder.path().join("outbox.1"));
        let mut publisher = JsonlPublisher::open(&path).expect("new");
        let reopen = publisher.reopen().expect("it is a file");
        send(&mut publisher, &["a"]).await;
        reopen.ask();
        send(&mut publisher, &["b"]).await;
        std::fs::rename(&path, &old).expect("renamed");
        send(&mut publisher, &["c"]).await;
        reopen.ask();
        send(&mut publisher, &["d"]).await;
        assert_eq!((ids(&old), ids(&path)), (vec!["a".into(), "b".into(), "c".into()], vec!["d".to_owned()]));
        assert!(refusal(&path).contains("another process"), "the new file is locked");
    }

    #[tokio::test]
    async fn where_the_path_cannot_be_opened_again_the_old_file_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, old) = (folder.path().join("outbox"), folder.path().join("outbox.1"));
        let mut publisher = JsonlPublisher::open(&path).expect("new");
        std::fs::rename(&path, &old).expect("renamed");
        std::fs::write(&path, "Dear all,\nhello").expect("a letter");
        publisher.reopen().expect("it is a file").ask();
        send(&mut publisher, &["a"]).await;
        assert_eq!(ids(&old), ["a"]);
        std::fs::remove_file(&path).expect("removed");
        send(&mut publisher, &["b"]).await;
        assert_eq!((ids(&old), ids(&path)), (vec!["a".to_owned()], vec!["b".to_owned()]));
    }

    #[tokio::test]
    async fn ids_of_the_file_are_forgotten_once_as_much_stands_behind_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("outbox");
        send(&mut JsonlPublisher::open(&path).expect("new"), &["a", "b", "c"]).await;
        let mut again = JsonlPublisher::open(&path).expect("again");
        for batch in [["b", "d"], ["e", "f"], ["c", "g"]] {
            send(&mut again, &batch).await;
        }
        assert_eq!((ids(&path).len(), again.written.ids.len()), (7, 3));
        let large = Message::new("h", "/s", "t").with_data("text/plain", vec![b'x'; BATCH_BYTES_MAX]);
        again.publish(&[large]).await.expect("written");
        assert_eq!(again.written.ids.len(), 0);
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
