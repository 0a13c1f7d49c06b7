//! A small service of payments, reservations, shipments and bookings for tests. It remembers
//! idempotency keys, keeps books of all that it was asked for, and can be told to misbehave. Its
//! books are what a test believes: they are written before an answer goes out, and survive its
//! death.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Orders whose name begins so are never shipped: who needs a refusal at the last step names them
/// so.
const UNSHIPPABLE: &str = "unshippable";

/// There never is one: who needs a trip that fails wants a car.
const CAR: &str = "car";

/// One request, as the books have it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// `/charges`, ...
    pub path: String,
    /// Its `Idempotency-Key`.
    pub key: String,
    /// Its body.
    pub body: Value,
    /// Status of the answer.
    pub status: u16,
    /// True if the request took effect now: it was the first under its key, and was not refused.
    pub applied: bool,
    /// Its `traceparent`.
    pub trace: String,
}

/// Faulty answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misbehaviour {
    /// With this status, and no effect.
    Status(u16),
    /// It takes effect, and the connection closes without an answer.
    NoAnswer,
    /// It takes effect, and is answered twice.
    TwoAnswers,
    /// It takes effect, and the answer never comes: the connection stays open.
    Hang,
}

/// A service that runs in a thread, until it is dropped.
pub struct Payments {
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    books: PathBuf,
    /// Answers by key, each with the body that it belongs to.
    answered: Mutex<BTreeMap<String, (Value, u16)>>,
    /// Faults for the next requests of a path, in order.
    misbehaviour: Mutex<BTreeMap<String, Vec<Misbehaviour>>>,
}

impl Payments {
    /// A service on a free loopback port, with books in `folder`.
    pub fn start(folder: &Path) -> Self {
        Self::listen(SocketAddr::from(([127, 0, 0, 1], 0)), folder)
    }

    /// Starts the server at the given address.
    pub fn listen(address: SocketAddr, folder: &Path) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State::open(folder.join("books.jsonl")));
        let serving = state.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let state = serving.clone();
                // A test that has ended drops the state's other owner; the thread then waits for a
                // connection that never comes.
                std::thread::spawn(move || state.serve(connection.unwrap()));
            }
        });
        Self { address, state }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Has the next requests of `path` answered so, one after the other.
    pub fn misbehave(&self, path: &str, how: &[Misbehaviour]) {
        self.state.misbehaviour.lock().unwrap().entry(path.to_owned()).or_default().extend(how);
    }

    /// All requests so far, in order.
    pub fn books(&self) -> Vec<Entry> {
        read(&self.state.books)
    }

    /// The paths of those that took effect, for the order or trip `name`.
    pub fn applied(&self, name: &str) -> Vec<String> {
        let about = |entry: &Entry| entry.body["order_id"] == name || entry.body["trip"] == name;
        self.books().into_iter().filter(|entry| entry.applied && about(entry)).map(|entry| entry.path).collect()
    }
}

fn read(books: &Path) -> Vec<Entry> {
    let text = std::fs::read_to_string(books).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

impl State {
    fn open(books: PathBuf) -> Self {
        let answered = read(&books).into_iter().filter(|entry| is_final(entry.status));
        let answered = answered.map(|entry| (entry.key, (entry.body, entry.status))).collect();
        Self { books, answered: Mutex::new(answered), misbehaviour: Mutex::default() }
    }

    fn serve(&self, connection: TcpStream) {
        let mut reader = BufReader::new(connection);
        while let Some(asked) = Asked::read(&mut reader) {
            let how = self.next_misbehaviour(&asked.path);
            let status = self.answer(asked, how);
            let text =
                format!("HTTP/1.1 {status} So\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n{{}}");
            match how {
                Some(Misbehaviour::NoAnswer) => return,
                Some(Misbehaviour::Hang) => {
                    // Until the other side gives up.
                    let _ = reader.read(&mut [0]);
                    return;
                }
                Some(Misbehaviour::TwoAnswers) => drop(reader.get_mut().write_all(format!("{text}{text}").as_bytes())),
                Some(Misbehaviour::Status(_)) | None => drop(reader.get_mut().write_all(text.as_bytes())),
            }
        }
    }

    fn next_misbehaviour(&self, path: &str) -> Option<Misbehaviour> {
        let mut all = self.misbehaviour.lock().unwrap();
        let of_path = all.get_mut(path)?;
        if of_path.is_empty() { None } else { Some(of_path.remove(0)) }
    }

    /// Decides, and writes it down before anybody hears of it.
    fn answer(&self, asked: Asked, how: Option<Misbehaviour>) -> u16 {
        let mut answered = self.answered.lock().unwrap();
        let (status, applied) = match (answered.get(&asked.key), how) {
            (_, Some(Misbehaviour::Status(status))) => (status, false),
            (Some((body, _)), _) if *body != asked.body => (422, false),
            (Some((_, status)), _) => (*status, false),
            (None, _) => {
                let status = asked.decided();
                (status, status < 300)
            }
        };
        let Asked { path, key, body, trace } = asked;
        if is_final(status) {
            answered.entry(key.clone()).or_insert_with(|| (body.clone(), status));
        }
        let line = serde_json::to_string(&Entry { path, key, body, status, applied, trace }).unwrap();
        let mut books = std::fs::OpenOptions::new().create(true).append(true).open(&self.books).unwrap();
        books.write_all(format!("{line}\n").as_bytes()).unwrap();
        status
    }
}

/// Returns true if an answer is remembered under its key; a client that gets any other answer is
/// asked to retry.
fn is_final(status: u16) -> bool {
    !matches!(status, 408 | 425 | 429 | 500..)
}

struct Asked {
    path: String,
    key: String,
    body: Value,
    trace: String,
}

impl Asked {
    /// The next request on a connection.
    fn read(reader: &mut BufReader<TcpStream>) -> Option<Self> {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|bytes| *bytes > 0)?;
        let path = line.split_whitespace().nth(1)?.to_owned();
        let (mut length, mut key, mut trace) = (0, String::new(), String::new());
        loop {
            line.clear();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim().split_once(':') else { break };
            let value = value.trim().to_owned();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().ok()?,
                "idempotency-key" => key = value,
                "traceparent" => trace = value,
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).ok()? };
        Some(Self { path, key, body, trace })
    }

    fn decided(&self) -> u16 {
        let order = self.body["order_id"].as_str().unwrap_or_default();
        match self.path.as_str() {
            "/shipments" if order.starts_with(UNSHIPPABLE) => 422,
            "/bookings" if self.body["kind"] == CAR => 409,
            _ => 200,
        }
    }
}
