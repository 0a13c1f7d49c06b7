//! A file, or standard input, of CloudEvents, one a line. Reads and parses on a thread of its own,
//! ahead of the pipeline by a bounded number of bytes. A file cannot deliver again: settling a
//! delivery changes nothing.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::vec;

use futures_util::future::{BoxFuture, ready};
use hapax_core::{Delivery, Message, Received, Source, TransportError};
use tokio::sync::mpsc;

use crate::cloudevents::{self, InvalidMessage};

/// Batches read ahead, at most.
const AHEAD: usize = 16;
/// A batch is handed over as soon as it has so many lines,
const BATCH_LINES: usize = 64;
/// or so many bytes, or the next line is not there yet.
const BATCH_BYTES: usize = 256 << 10;
const BUFFER_BYTES: usize = 256 << 10;

/// A source of lines.
pub struct JsonlSource {
    batches: mpsc::Receiver<Batch>,
    batch: vec::IntoIter<Result<Line, TransportError>>,
    read: Arc<AtomicU64>,
    total: Option<u64>,
}

/// Lines in order. A failure to read stands in its place, the last.
type Batch = Vec<Result<Line, TransportError>>;

enum Line {
    Message(Box<Message>),
    Invalid { number: u64, error: InvalidMessage },
}

impl JsonlSource {
    /// Opens `path`; `-` is standard input. Lines over `max_bytes` are reported and skipped, and
    /// never held in memory.
    pub fn open(path: &Path, max_bytes: usize) -> io::Result<Self> {
        let (input, total): (Box<dyn Read + Send>, _) = if path.as_os_str() == "-" {
            (Box::new(io::stdin()), None)
        } else {
            let file = File::open(path)?;
            let total = file.metadata()?;
            if total.is_dir() {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            (Box::new(file), Some(total.len()).filter(|length| *length > 0))
        };
        Self::from_reader(input, total, max_bytes)
    }

    /// Reads lines from `input`, of which `total` bytes are expected.
    fn from_reader(input: Box<dyn Read + Send>, total: Option<u64>, max_bytes: usize) -> io::Result<Self> {
        let (sender, batches) = mpsc::channel(AHEAD);
        let read = Arc::new(AtomicU64::new(0));
        let reader = Reader { input: BufReader::with_capacity(BUFFER_BYTES, input), max_bytes, read: read.clone() };
        std::thread::Builder::new().name("hapax-jsonl".into()).spawn(move || reader.run(&sender))?;
        Ok(Self { batches, batch: Vec::new().into_iter(), read, total })
    }

    /// Bytes read so far.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        self.read.clone()
    }

    /// Bytes of the file, where they are known.
    pub fn total_bytes(&self) -> Option<u64> {
        self.total
    }
}

impl Source for JsonlSource {
    fn recv(&mut self) -> BoxFuture<'_, Result<Option<Received>, TransportError>> {
        Box::pin(async {
            loop {
                if let Some(line) = self.batch.next() {
                    return line.map(|line| Some(line.received()));
                }
                match self.batches.recv().await {
                    Some(batch) => self.batch = batch.into_iter(),
                    None => return Ok(None),
                }
            }
        })
    }
}

impl Line {
    fn received(self) -> Received {
        match self {
            Self::Message(message) => Received::Delivery(Box::new(LineDelivery(message))),
            Self::Invalid { number, error } => {
                Received::Invalid { position: format!("line {number}"), reason: error.to_string() }
            }
        }
    }
}

struct LineDelivery(Box<Message>);

impl Delivery for LineDelivery {
    fn message(&self) -> &Message {
        &self.0
    }

    fn ack(self: Box<Self>) -> BoxFuture<'static, Result<(), TransportError>> {
        Box::pin(ready(Ok(())))
    }

    fn nack(self: Box<Self>, _: u64) -> BoxFuture<'static, Result<(), TransportError>> {
        Box::pin(ready(Ok(())))
    }

    fn dead_letter(self: Box<Self>, _: &str) -> BoxFuture<'static, Result<(), TransportError>> {
        Box::pin(ready(Ok(())))
    }
}

struct Reader {
    input: BufReader<Box<dyn Read + Send>>,
    max_bytes: usize,
    read: Arc<AtomicU64>,
}

impl Reader {
    fn run(mut self, batches: &mpsc::Sender<Batch>) {
        let (mut line, mut batch, mut batch_bytes) = (Vec::new(), Vec::new(), 0);
        for number in 1.. {
            match self.next_line(&mut line) {
                Ok(0) => break,
                Ok(length) => {
                    self.read.fetch_add(length as u64, Ordering::Relaxed);
                    batch.extend(self.parse(number, &line, length).map(Ok));
                    batch_bytes += line.len();
                }
                Err(error) => {
                    let text = format!("line {number} cannot be read: {error}");
                    batch.push(Err(TransportError::Broken(text.into())));
                    break;
                }
            }
            // The next read may wait for somebody at a terminal: what is there goes first.
            let full = batch.len() >= BATCH_LINES || batch_bytes >= BATCH_BYTES;
            if !batch.is_empty() && (full || !self.input.buffer().contains(&b'\n')) {
                batch_bytes = 0;
                if batches.blocking_send(std::mem::take(&mut batch)).is_err() {
                    return; // Nobody listens any more: the run was stopped.
                }
            }
        }
        if !batch.is_empty() {
            let _ = batches.blocking_send(batch);
        }
    }

    fn parse(&self, number: u64, line: &[u8], length: usize) -> Option<Line> {
        if length > self.max_bytes.saturating_add(2) {
            let error = InvalidMessage::TooLarge { bytes: length, limit: self.max_bytes };
            return Some(Line::Invalid { number, error });
        }
        // A byte order mark is no part of the first message.
        let line = line.strip_prefix(b"\xef\xbb\xbf").filter(|_| number == 1).unwrap_or(line).trim_ascii();
        if line.is_empty() {
            return None;
        }
        Some(match cloudevents::parse(line) {
            Ok(message) => Line::Message(Box::new(message)),
            Err(error) => Line::Invalid { number, error },
        })
    }

    /// The next line with its end, and its length; of a line that is too long, only its beginning
    /// is kept.
    fn next_line(&mut self, line: &mut Vec<u8>) -> io::Result<usize> {
        line.clear();
        let mut length = 0;
        loop {
            let buffer = match self.input.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            let end = buffer.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(buffer.len(), |end| end + 1);
            if length <= self.max_bytes {
                line.extend_from_slice(&buffer[..taken]);
            }
            let ended = end.is_some() || taken == 0;
            self.input.consume(taken);
            length += taken;
            if ended {
                return Ok(length);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::time::Duration;

    use super::*;

    async fn read(content: &[u8], max_bytes: usize) -> Vec<String> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("in");
        std::fs::write(&path, content).expect("a file");
        let mut source = JsonlSource::open(&path, max_bytes).expect("it opens");
        let mut seen = Vec::new();
        while let Some(received) = source.recv().await.expect("it reads") {
            seen.push(match received {
                Received::Delivery(delivery) => delivery.message().id.clone(),
                Received::Invalid { position, reason } => format!("{position}: {reason}"),
            });
        }
        seen
    }

    #[tokio::test]
    async fn lines_become_messages_and_the_rest_is_named() {
        let line = |id: &str| format!(r#"{{"id":"{id}","source":"/s","type":"t"}}"#);
        let long = format!(r#"{{"id":"long","source":"/s","type":"t","data":"{}"}}"#, "x".repeat(300 << 10));
        let content = format!("\u{feff}{}\r\n\n{long}\nnonsense\n{}", line("a"), line("last"));
        let seen = read(content.as_bytes(), 1_000).await;
        assert_eq!((&*seen[0], &*seen[3], seen.len()), ("a", "last", 4));
        assert!(seen[1].starts_with("line 3: ") && seen[1].contains("limit of 1000"), "{}", seen[1]);
        assert!(seen[2].starts_with("line 4: not JSON"), "{}", seen[2]);
        assert_eq!(read(b"", 10).await.len(), 0);
        assert!(read(b"\xff\xfe\n", 10).await[0].starts_with("line 1: not JSON"));
    }

    #[tokio::test]
    async fn a_line_is_handed_over_while_the_next_is_not_there_yet() {
        let (input, mut output) = io::pipe().expect("a pipe");
        let mut source = JsonlSource::from_reader(Box::new(input), None, 1_000).expect("it opens");
        for id in ["a", "b"] {
            // Dropping the future loses nothing, and the beginning of the next line changes
            // nothing.
            assert!(tokio::time::timeout(Duration::from_millis(5), source.recv()).await.is_err(), "nothing is there");
            output
                .write_all(format!("{{\"id\":\"{id}\",\"source\":\"/s\",\"type\":\"t\"}}\n ").as_bytes())
                .expect("written");
            let next = tokio::time::timeout(Duration::from_secs(5), source.recv()).await;
            let Ok(Ok(Some(Received::Delivery(delivery)))) = next else { panic!("it waits for the next line") };
            assert_eq!(delivery.message().id, id);
        }
        drop(output);
        assert!(matches!(source.recv().await, Ok(None)));
    }

    #[tokio::test]
    async fn all_lines_come_in_order_and_are_counted() {
        let line =
            |n: usize| format!("{{\"id\":\"{n}\",\"source\":\"/s\",\"type\":\"t\",\"data\":\"{}\"}}\n", "x".repeat(n));
        let content: String = (0..2_000).map(line).collect();
        let seen = read(content.as_bytes(), 3_000).await;
        assert_eq!(seen, (0..2_000).map(|n| n.to_string()).collect::<Vec<_>>());
        let length = content.len() as u64;
        let mut source =
            JsonlSource::from_reader(Box::new(io::Cursor::new(content)), Some(length), 3_000).expect("it opens");
        while source.recv().await.expect("it reads").is_some() {}
        assert_eq!((source.bytes_read().load(Ordering::Relaxed), source.total_bytes()), (length, Some(length)));
    }

    #[tokio::test]
    async fn a_failing_disk_is_told_after_what_was_read() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("bad sector"))
            }
        }
        let line = io::Cursor::new("{\"id\":\"a\",\"source\":\"/s\",\"type\":\"t\"}\n");
        let mut source = JsonlSource::from_reader(Box::new(line.chain(Failing)), None, 1_000).expect("it opens");
        assert!(matches!(source.recv().await, Ok(Some(Received::Delivery(_)))));
        let error = source.recv().await.map(drop).expect_err("it fails").to_string();
        assert_eq!(error, "line 2 cannot be read: bad sector");
        assert!(matches!(source.recv().await, Ok(None)));
    }
}
