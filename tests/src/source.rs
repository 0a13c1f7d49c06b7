//! A source over a list of messages: counts what is pulled, remembers how each delivery was
//! settled.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::future::{BoxFuture, ready};
use hapax_core::{Delivery, Message, Observer, Outcome, Received, Report, Source, TransportError};
use parking_lot::Mutex;

/// Results of the deliveries of a [`ListSource`], and of its messages; cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct Seen(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    pulled: usize,
    settled: Vec<(String, &'static str)>,
    ended: Vec<(String, Outcome)>,
}

impl Seen {
    /// Messages that were pulled.
    pub fn pulled(&self) -> usize {
        self.0.lock().pulled
    }

    /// Ids by how their deliveries were settled (`ack`, `nack`, `dead-letter`), in the order in
    /// which they were.
    pub fn settled(&self, how: &str) -> Vec<String> {
        let inner = self.0.lock();
        inner.settled.iter().filter(|(_, settled)| *settled == how).map(|(id, _)| id.clone()).collect()
    }

    /// Ids of the messages that ended under this name, in the order in which they did.
    pub fn ended(&self, name: &str) -> Vec<String> {
        let inner = self.0.lock();
        inner.ended.iter().filter(|(_, outcome)| outcome.name() == name).map(|(id, _)| id.clone()).collect()
    }

    /// All endings that were told.
    pub fn outcomes(&self) -> usize {
        self.0.lock().ended.len()
    }
}

impl Observer for Seen {
    fn ended(&self, report: Report<'_>) {
        if let Report::Ended { message, outcome } = report {
            self.0.lock().ended.push((message.id.clone(), outcome.clone()));
        }
    }
}

/// Hands out the messages of a list, in order.
pub struct ListSource {
    messages: VecDeque<Message>,
    seen: Seen,
}

impl ListSource {
    /// A source over `messages`.
    pub fn new(messages: impl IntoIterator<Item = Message>, seen: &Seen) -> Self {
        Self { messages: messages.into_iter().collect(), seen: seen.clone() }
    }
}

impl Source for ListSource {
    fn recv(&mut self) -> BoxFuture<'_, Result<Option<Received>, TransportError>> {
        let delivery = self.messages.pop_front().map(|message| {
            self.seen.0.lock().pulled += 1;
            Received::Delivery(Box::new(Listed { message, seen: self.seen.clone() }))
        });
        Box::pin(ready(Ok(delivery)))
    }
}

struct Listed {
    message: Message,
    seen: Seen,
}

impl Listed {
    fn settle(self, how: &'static str) -> BoxFuture<'static, Result<(), TransportError>> {
        self.seen.0.lock().settled.push((self.message.id, how));
        Box::pin(ready(Ok(())))
    }
}

impl Delivery for Listed {
    fn message(&self) -> &Message {
        &self.message
    }

    fn ack(self: Box<Self>) -> BoxFuture<'static, Result<(), TransportError>> {
        self.settle("ack")
    }

    fn nack(self: Box<Self>, _: u64) -> BoxFuture<'static, Result<(), TransportError>> {
        self.settle("nack")
    }

    fn dead_letter(self: Box<Self>, _: &str) -> BoxFuture<'static, Result<(), TransportError>> {
        self.settle("dead-letter")
    }
}
