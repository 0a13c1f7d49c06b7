//! A file, or standard input, of CloudEvents, one a line. Reads and parses on a thread of its own, ahead of the pipeline by
//! a bounded number of messages. A file cannot deliver again: settling a delivery changes nothing.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::{BoxFuture, ready};
use hapax_core::Message;
use hapax_core::transport::{Delivery, Received, Source, TransportError};
use tokio::sync::mpsc;

use crate::cloudevents::{self, InvalidMessage};

/// Lines read ahead, at most.
const AHEAD: usize = 1_024;
const BUFFER_BYTES: usize = 256 << 10;

/// A source of lines.
pub struct JsonlSource {
    lines: mpsc::Receiver<Result<Line, TransportError>>,
    read: Arc<AtomicU64>,
    total: Option<u64>,
}

enum Line {
    Message(Box<Message>),
    Invalid { number: u64, error: InvalidMessage },
}

impl JsonlSource {
    /// Opens `path`; `-` is standard input. Lines over `max_bytes` are reported and skipped, and never held in memory.
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
        let (sender, lines) = mpsc::channel(AHEAD);
        let read = Arc::new(AtomicU64::new(0));
        let reader = Reader { input: BufReader::with_capacity(BUFFER_BYTES, input), max_bytes, read: read.clone() };
        std::thread::Builder::new().name("hapax-jsonl".into()).spawn(move || reader.run(&sender))?;
        Ok(Self { lines, read, total })
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
            Ok(match self.lines.recv().await.transpose()? {
                None => None,
                Some(Line::Message(message)) => Some(Received::Delivery(Box::new(LineDelivery(message)))),
                Some(Line::Invalid { number, error }) => {
                    Some(Received::Invalid { position: format!("line {number}"), reason: error.to_string() })
                }
            })
        })
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
    fn run(mut self, lines: &mpsc::Sender<Result<Line, TransportError>>) {
        let mut line = Vec::new();
        for number in 1.. {
            let parsed = match self.next_line(&mut line) {
                Ok(0) => return,
                Ok(length) => {
                    self.read.fetch_add(length as u64, Ordering::Relaxed);
                    self.parse(number, &line, length)
                }
                Err(error) => {
                    let text = format!("line {number} cannot be read: {error}");
                    let _ = lines.blocking_send(Err(TransportError::Broken(text.into())));
                    return;
                }
            };
            // Nobody listens any more: the run was stopped.
            if parsed.is_some_and(|parsed| lines.blocking_send(Ok(parsed)).is_err()) {
                return;
            }
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

    /// The next line with its end, and its length; of a line that is too long, only its beginning is kept.
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
}
