//! Inside a component: the host's imports behind `Context`, the way in from the export, panics to the log.
//! Not compiled for tests.

use std::sync::Once;

use crate::bindings::exports::hapax::processor::handler;
use crate::bindings::hapax::processor::{config, log, outbox, state, types};
use crate::host::{Entry, Host};
use crate::{Context, Failure, Level, Message, Outcome, Outgoing};

/// The host, as the component imports it. What a processor does not use is not imported.
pub(crate) struct Imports;

impl Host for Imports {
    fn get(&self, key: &str) -> Option<Vec<u8>> {
        state::get(key)
    }

    fn set(&self, key: &str, value: &[u8]) {
        state::set(key, value);
    }

    fn delete(&self, key: &str) {
        state::delete(key);
    }

    fn compare_and_set(&self, key: &str, expected: Option<&[u8]>, value: Option<&[u8]>) -> bool {
        state::compare_and_set(key, expected, value)
    }

    fn scan(&self, start: &str, end: Option<&str>, limit: u32) -> Vec<Entry> {
        state::scan(start, end, limit)
    }

    fn send(&self, message: Outgoing) {
        let Outgoing { kind: type_, subject, content_type, data, extensions } = message;
        outbox::send(&outbox::Outgoing { type_, subject, content_type, data, extensions });
    }

    fn log(&self, level: Level, text: &str) {
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

/// What the component's export does, around the processor's function.
pub fn run(
    message: &types::Message,
    processor: fn(Message, &mut Context) -> Result<Outcome, Failure>,
) -> Result<handler::Outcome, handler::Failure> {
    panics_to_the_log();
    let message = Message {
        attributes: message.attributes(),
        data: message.data(),
        idempotency_key: message.idempotency_key(),
        attempt: message.attempt(),
        now_ms: message.now_ms(),
        seed: message.seed(),
    };
    let mut context = Context::new(Imports, &message);
    match processor(message, &mut context) {
        Ok(Outcome { content_type, data }) => Ok(handler::Outcome { content_type, data }),
        Err(failure) => Err(told(failure)),
    }
}

fn told(failure: Failure) -> handler::Failure {
    match failure {
        Failure::Retry { reason, after } => {
            let after_ms = after.map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX));
            handler::Failure::Retry(types::RetryLater { reason, after_ms })
        }
        Failure::Reject(reason) => handler::Failure::Reject(reason),
        Failure::Invalid(reason) => handler::Failure::Invalid(reason),
    }
}

/// A panic ends as a trap, which carries no text; without WASI there is no standard error either.
fn panics_to_the_log() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        std::panic::set_hook(Box::new(|panic| log::write(log::Level::Error, &panic.to_string())));
    });
}
