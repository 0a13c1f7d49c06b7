//! The outbox to a file: CloudEvents, one a line, appended and synced a batch at a time. Knows nothing of what was sent
//! before this process but what the file's end says.
//!
//! A batch that was written and not yet marked as sent when the host died is handed over again. The relay has one batch of
//! bounded size under way, so the ids at the end of the file are enough to drop it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};

use futures_util::future::BoxFuture;
use hapax_core::Message;
use hapax_core::transport::{Publisher, TransportError};

use crate::cloudevents;

/// Bytes at the end of the file whose ids are remembered.
const TAIL_BYTES: u64 = 64 << 20;

/// Appends to a file, or writes to standard output.
pub struct JsonlPublisher {
    path: PathBuf,
    /// `None`: standard output, which cannot be read back; a batch may come twice after a crash.
    file: Option<File>,
    /// Ids at the file's end when it was opened.
    written: HashSet<String>,
}

impl JsonlPublisher {
    /// Opens `path` for appending, and creates it where it is absent; `-` is standard output. A last line that a crash cut
    /// short is removed: its message was never marked as sent.
    pub fn open(path: &Path) -> Result<Self, TransportError> {
        if path.as_os_str() == "-" {
            return Ok(Self { path: path.into(), file: None, written: HashSet::new() });
        }
        let (file, written) = open_file(path).map_err(|error| broken(path, &error))?;
        Ok(Self { path: path.into(), file: Some(file), written })
    }

    fn append(&mut self, batch: &[Message]) -> io::Result<()> {
        let mut lines = Vec::new();
        for message in batch {
            if self.written.contains(&message.id) {
                continue;
            }
            lines.extend(cloudevents::to_json(message));
            lines.push(b'\n');
        }
        match &mut self.file {
            None => {
                let mut out = io::stdout().lock();
                out.write_all(&lines)?;
                out.flush()
            }
            Some(file) => {
                let end = file.stream_position()?;
                let written = file.write_all(&lines).and_then(|()| file.sync_data());
                if written.is_err() {
                    // What is there of the batch will be written again: it must not stand twice.
                    let _ = file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end)).map(drop));
                }
                written
            }
        }
    }
}

impl Publisher for JsonlPublisher {
    fn publish<'a>(&'a mut self, batch: &'a [Message]) -> BoxFuture<'a, Result<(), TransportError>> {
        // Blocks for one append and one sync of a batch of up to a thousand messages.
        Box::pin(async move { tokio::task::block_in_place(|| self.append(batch)).map_err(|e| broken(&self.path, &e)) })
    }
}

fn broken(path: &Path, error: &io::Error) -> TransportError {
    let text = format!(
        "{}: {error}. Make room or mend the path, and start again; what was not sent stays in the outbox",
        path.display()
    );
    TransportError::Broken(text.into())
}

fn open_file(path: &Path) -> io::Result<(File, HashSet<String>)> {
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    let length = file.metadata()?.len();
    let start = length.saturating_sub(TAIL_BYTES);
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(start))?;
    file.read_to_end(&mut tail)?;
    let whole = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    if whole < tail.len() {
        if whole == 0 && start > 0 {
            return Err(io::Error::other("its last line is longer than any message: it is no outbox file"));
        }
        file.set_len(start + whole as u64)?;
    }
    file.seek(SeekFrom::End(0))?;
    let lines = tail[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    // The first line of the tail may begin in its middle; it is too old to matter.
    let ids = lines.filter_map(|line| cloudevents::parse(line).ok()).map(|message| message.id).collect();
    Ok((file, ids))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_batch_handed_over_again_is_not_written_twice() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("outbox");
        let message = |id: &str| Message::new(id, "/s", "t");
        JsonlPublisher::open(&path).expect("new").publish(&[message("a"), message("b")]).await.expect("written");
        // Torn by a crash.
        let mut content = std::fs::read(&path).expect("there");
        content.extend(br#"{"specversion":"1.0","id":"c","#);
        std::fs::write(&path, content).expect("torn");
        let mut again = JsonlPublisher::open(&path).expect("again");
        again.publish(&[message("b"), message("c")]).await.expect("written");
        let text = std::fs::read_to_string(&path).expect("text");
        let ids: Vec<_> = text.lines().map(|line| cloudevents::parse(line.as_bytes()).expect(line).id).collect();
        assert_eq!(ids, ["a", "b", "c"]);
    }
}
