//! Inside a component: the host's imports behind `Context`, the way in from the export, panics to
//! the log. Not compiled for tests.

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::batch::Item;
use crate::batch_bindings::hapax::processor::batch;
use crate::bindings::hapax::processor::{config, events, lock, log, outbox, saga, state, types};
use crate::compensation::Undoes;
use crate::host::{Entry, Host};
use crate::http::{HttpError, Request, Response};
use crate::wasm_http;
use crate::{Answers, Batch, Context, Event, Failure, Level, Message, NewEvent, Outcome, Outgoing};

/// The host, as the component imports it. What a processor does not use is not imported.
#[derive(Clone, Copy)]
pub(crate) struct Imports {
    /// In a batch: which message the effects belong to, and how the host is told. Told by a
    /// pointer, so that a component without batches does not import what selects one.
    item: Option<(u32, fn(u32))>,
}

impl Imports {
    fn select(self) {
        if let Some((index, select)) = self.item {
            select(index);
        }
    }
}

/// Nothing is selected.
const NOTHING: u32 = u32::MAX;
/// Index of the message that the guest selected last.
static SELECTED: AtomicU32 = AtomicU32::new(NOTHING);

fn select(index: u32) {
    if SELECTED.swap(index, Ordering::Relaxed) != index {
        batch::select(index);
    }
}

impl Host for Imports {
    fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.select();
        state::get(key)
    }

    fn set(&self, key: &str, value: &[u8]) {
        self.select();
        state::set(key, value);
    }

    fn delete(&self, key: &str) {
        self.select();
        state::delete(key);
    }

    fn compare_and_set(&self, key: &str, expected: Option<&[u8]>, value: Option<&[u8]>) -> bool {
        self.select();
        state::compare_and_set(key, expected, value)
    }

    fn scan(&self, start: &str, end: Option<&str>, limit: u32) -> Vec<Entry> {
        self.select();
        state::scan(start, end, limit)
    }

    fn append(&self, stream: &str, expected: Option<u64>, events: &[NewEvent]) -> Result<u64, u64> {
        self.select();
        let event = |event: &NewEvent| events::NewEvent { type_: event.kind.clone(), data: event.data.clone() };
        let events: Vec<_> = events.iter().map(event).collect();
        events::append(stream, expected, &events).map_err(|conflict| conflict.actual_version)
    }

    fn events(&self, stream: &str, after: u64, limit: u32) -> Vec<Event> {
        self.select();
        let event = |event| {
            let events::Event { id, version, type_: kind, data } = event;
            Event { id, version, kind, data }
        };
        events::read(stream, after, limit).into_iter().map(event).collect()
    }

    fn version(&self, stream: &str) -> u64 {
        self.select();
        events::version(stream)
    }

    fn send(&self, message: Outgoing) {
        self.select();
        let Outgoing { kind: type_, subject, content_type, data, extensions } = message;
        outbox::send(&outbox::Outgoing { type_, subject, content_type, data, extensions });
    }

    fn step(&self, name: &str, payload: &[u8]) {
        saga::step(name, payload);
    }

    fn pivot(&self) {
        saga::pivot();
    }

    fn join(&self, saga: &str) {
        saga::join(saga);
    }

    fn complete(&self) {
        saga::complete();
    }

    fn acquire(&self, name: &str, ttl_ms: u64) -> Result<u64, u64> {
        self.select();
        lock::acquire(name, ttl_ms).map(|token| token.fence).map_err(|busy| busy.retry_after_ms)
    }

    fn extend(&self, name: &str, fence: u64, ttl_ms: u64) -> bool {
        self.select();
        lock::extend(&lock::Token { name: name.to_owned(), fence }, ttl_ms).is_ok()
    }

    fn release(&self, name: &str, fence: u64) {
        self.select();
        lock::release(&lock::Token { name: name.to_owned(), fence });
    }

    fn call(&self, request: &Request) -> Result<Response, HttpError> {
        self.select();
        wasm_http::call(request)
    }

    fn log(&self, level: Level, text: &str) {
        self.select();
        let level = match level {
            Level::Trace => log::Level::Trace,
            Level::Debug => log::Level::Debug,
            Level::Info => log::Level::Info,
            Level::Warn => log::Level::Warn,
            Level::Error => log::Level::Error,
        };
        log::write(level, text);
    }

    fn config(&self, key: &str) -> Option<String> {
        config::get(key)
    }
}

/// Runs the component's export around the processor's function.
pub fn run(
    message: &types::Message,
    processor: fn(Message, &mut Context) -> Result<Outcome, Failure>,
) -> Result<types::Outcome, types::Failure> {
    panics_to_the_log();
    let message = read(message);
    let mut context = Context::new(Imports { item: None }, &message);
    told(processor(message, &mut context))
}

/// Runs the component's compensation export around the processor's compensations.
pub fn compensate(
    step: &str,
    payload: Vec<u8>,
    message: &types::Message,
    undoes: &[Undoes],
) -> Result<(), types::Failure> {
    panics_to_the_log();
    let Some((_, undo)) = undoes.iter().find(|(name, _)| *name == step) else {
        return Err(types::Failure::Reject(format!("there is no compensation for the step `{step}`")));
    };
    let message = Message { data: payload, step_key: message.step_key(), ..read(message) };
    let mut context = Context::new(Imports { item: None }, &message);
    undo(message, &mut context).map_err(failure)
}

/// Runs an export that takes many messages around the processor's function.
pub fn run_batch(
    messages: &[types::Message],
    processor: fn(Batch) -> Answers,
) -> Vec<Result<types::Outcome, types::Failure>> {
    panics_to_the_log();
    SELECTED.store(NOTHING, Ordering::Relaxed);
    let item = |(index, message): (usize, &types::Message)| {
        let message = read(message);
        let context = Context::new(Imports { item: Some((index as u32, select)) }, &message);
        Item { message, context }
    };
    let batch = Batch { items: messages.iter().enumerate().map(item).collect() };
    processor(batch).0.into_iter().map(told).collect()
}

fn read(message: &types::Message) -> Message {
    Message {
        attributes: message.attributes(),
        data: message.data(),
        idempotency_key: message.idempotency_key(),
        attempt: message.attempt(),
        now_ms: message.now_ms(),
        seed: message.seed(),
        step_key: None,
    }
}

fn told(result: Result<Outcome, Failure>) -> Result<types::Outcome, types::Failure> {
    let Outcome { content_type, data } = result.map_err(failure)?;
    Ok(types::Outcome { content_type, data })
}

fn failure(failure: Failure) -> types::Failure {
    match failure {
        Failure::Retry { reason, after } => {
            let after_ms = after.map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX));
            types::Failure::Retry(types::RetryLater { reason, after_ms })
        }
        Failure::Reject(reason) => types::Failure::Reject(reason),
        Failure::Invalid(reason) => types::Failure::Invalid(reason),
    }
}

/// A panic ends as a trap, which carries no text; without WASI there is no standard error either.
fn panics_to_the_log() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        std::panic::set_hook(Box::new(|panic| log::write(log::Level::Error, &panic.to_string())));
    });
}
