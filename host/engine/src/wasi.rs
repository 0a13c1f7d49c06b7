//! WASI 0.2 for components that import it: a clock and randomness seeded by the message, output to
//! the log, calls over HTTP through the pipeline, and nothing else: no files, no sockets, no
//! environment, no arguments.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hapax_core::Invocation;
use rand_core::TryRng;
use tokio::io::AsyncWrite;
use wasmtime::component::{Linker, ResourceTable};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{DynOutputStream, OutputStream, Pollable, StreamResult};
use wasmtime_wasi::{HostMonotonicClock, HostWallClock, WasiCtx, WasiCtxView, WasiView};

use crate::bindings::hapax::processor::log::Level;
use crate::host::http::{self, Http};
use crate::host::log::{Granted, LogBudget, emit};
use crate::host::{HostState, Shared};

/// Open handles (streams, pollables) an instance may have.
const MAX_HANDLES: usize = 10_000;
/// Random bytes one call may ask for.
const MAX_RANDOM_BYTES: u64 = 1 << 20;
/// Step of the monotonic clock at each reading: the clock always advances, and gives the same
/// readings on every re-run.
const MONOTONIC_STEP_NS: u64 = 1_000;
/// Most bytes that a stream takes in one write.
const WRITE_BYTES: usize = 64 << 10;
/// A line without an end is cut here.
const LINE_BYTES: usize = 8 << 10;

/// Offers the granted part of WASI to the linker.
pub(crate) fn add_imports(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    wasmtime_wasi::p2::add_to_linker_async(linker)?;
    http::add_to_linker(linker)
}

/// One instance's WASI, for one message at a time.
pub(crate) struct Wasi {
    ctx: WasiCtx,
    table: ResourceTable,
    http: Http,
    stdout: Output,
    stderr: Output,
    /// Log budget of the message, which both streams share.
    budget: Arc<Mutex<LogBudget>>,
}

impl Wasi {
    /// For a call with `messages` messages that begins with the clock and the randomness of
    /// `invocation`.
    pub(crate) fn new(shared: &Arc<Shared>, invocation: &Invocation, messages: usize) -> Self {
        let budget = Arc::new(Mutex::new(LogBudget::new(shared.limits.log_bytes.saturating_mul(messages))));
        let output = |level| Output {
            lines: Arc::new(Mutex::new(Lines {
                level,
                shared: Arc::clone(shared),
                message_id: invocation.message.id.clone(),
                budget: Arc::clone(&budget),
                partial: Vec::new(),
            })),
        };
        let (stdout, stderr) = (output(Level::Info), output(Level::Warn));
        let mut table = ResourceTable::new();
        table.set_max_capacity(MAX_HANDLES);
        Self { ctx: seeded(invocation, &stdout, &stderr), table, http: Http::default(), stdout, stderr, budget }
    }

    /// The table of handles, and the state of outbound calls.
    pub(crate) fn http(&mut self) -> (&mut ResourceTable, &mut Http) {
        (&mut self.table, &mut self.http)
    }

    /// Another call's clock, randomness and log. Standard output and error stay open: a language
    /// runtime opens them once; what is written to them from here on is this call's.
    pub(crate) fn begin(&mut self, shared: &Shared, invocation: &Invocation, messages: usize) {
        let budget = LogBudget::new(shared.limits.log_bytes.saturating_mul(messages));
        *self.budget.lock().unwrap_or_else(PoisonError::into_inner) = budget;
        self.turn_to(invocation);
    }

    /// The clock, the randomness and the log of another message of the call.
    pub(crate) fn turn_to(&mut self, invocation: &Invocation) {
        for output in [&self.stdout, &self.stderr] {
            output.lines().end();
            output.lines().message_id.clone_from(&invocation.message.id);
        }
        self.ctx = seeded(invocation, &self.stdout, &self.stderr);
    }

    /// Ends the message's last lines. Whether nothing of it is left: no handle is open but those of
    /// output.
    pub(crate) fn end(&mut self) -> bool {
        for output in [&self.stdout, &self.stderr] {
            output.lines().end();
        }
        let within = self.budget.lock().unwrap_or_else(PoisonError::into_inner).is_within();
        within && self.table.iter_mut().all(|entry| entry.is::<DynOutputStream>())
    }
}

/// The clock and the randomness of a message.
fn seeded(invocation: &Invocation, stdout: &Output, stderr: &Output) -> WasiCtx {
    WasiCtx::builder()
        .stdout(stdout.clone())
        .stderr(stderr.clone())
        .wall_clock(MessageTime(Duration::from_millis(invocation.message.now_ms())))
        .monotonic_clock(Steps(AtomicU64::new(0)))
        .secure_random(Seeded::new(invocation.seed, "secure"))
        .insecure_random(Seeded::new(invocation.seed, "insecure"))
        .insecure_random_seed(u128::from(invocation.seed))
        .max_random_size(MAX_RANDOM_BYTES)
        .allow_tcp(false)
        .allow_udp(false)
        .allow_ip_name_lookup(false)
        .build()
}

impl WasiView for HostState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        let wasi = self.wasi.as_mut().expect("WASI is linked only for components that import it");
        WasiCtxView { ctx: &mut wasi.ctx, table: &mut wasi.table }
    }
}

/// The wall clock: always shows the message's time.
struct MessageTime(Duration);

impl HostWallClock for MessageTime {
    fn resolution(&self) -> Duration {
        Duration::from_millis(1)
    }

    fn now(&self) -> Duration {
        self.0
    }
}

/// The monotonic clock: a step a reading.
struct Steps(AtomicU64);

impl HostMonotonicClock for Steps {
    fn resolution(&self) -> u64 {
        MONOTONIC_STEP_NS
    }

    fn now(&self) -> u64 {
        self.0.fetch_add(MONOTONIC_STEP_NS, Ordering::Relaxed)
    }
}

/// blake3's extendable output over the message's seed: as long as wanted, the same for ever.
struct Seeded(blake3::OutputReader);

impl Seeded {
    fn new(seed: u64, purpose: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"hapax wasi random ").update(purpose.as_bytes()).update(&seed.to_le_bytes());
        Self(hasher.finalize_xof())
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.fill(&mut bytes);
        bytes
    }
}

impl TryRng for Seeded {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(u32::from_le_bytes(self.take()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(u64::from_le_bytes(self.take()))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        self.0.fill(bytes);
        Ok(())
    }
}

/// Text on its way to the log, a line at a time.
struct Lines {
    level: Level,
    shared: Arc<Shared>,
    message_id: String,
    budget: Arc<Mutex<LogBudget>>,
    partial: Vec<u8>,
}

impl Lines {
    fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            for part in piece.chunks(LINE_BYTES) {
                self.partial.extend_from_slice(part);
                if part.ends_with(b"\n") || self.partial.len() >= LINE_BYTES {
                    self.end_line();
                }
            }
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.partial);
        let text = String::from_utf8_lossy(&line);
        let mut budget = self.budget.lock().unwrap_or_else(PoisonError::into_inner);
        match budget.take(line.len()) {
            Granted::Yes => emit(self.level, &self.shared.name, &self.message_id, text.trim_end()),
            Granted::Notice => emit(Level::Warn, &self.shared.name, &self.message_id, &budget.notice()),
            Granted::No => {}
        }
    }

    /// Ends a line that was left open.
    fn end(&mut self) {
        if !self.partial.is_empty() {
            self.end_line();
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.end();
    }
}

/// Standard output or error.
#[derive(Clone)]
struct Output {
    lines: Arc<Mutex<Lines>>,
}

impl Output {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lines(&self, bytes: &[u8]) {
        self.lines().write(bytes);
    }
}

impl IsTerminal for Output {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Output {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Output {
    async fn ready(&mut self) {}
}

impl OutputStream for Output {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.write_lines(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(WRITE_BYTES)
    }
}

impl AsyncWrite for Output {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        self.write_lines(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
