//! The test kit: a host in memory, for plain `cargo test`. Not compiled into components.
//!
//! It keeps the promise that matters to a processor: what a message did is there if it succeeded,
//! and gone if not. It does not skip duplicates, has no limits and tries nothing again: those are
//! the host's.

use std::collections::BTreeMap;
use std::rc::Rc;

use serde::Serialize;

use crate::batch::Item;
use crate::host::Host as _;
use crate::world::World;
use crate::{
    Answers, Batch, BatchHandler, Compensate, Context, Event, Failure, Handler, HttpError, Level, Message, Outcome,
    Outgoing, Request, Response,
};

/// Runs messages, each in its own context; the contexts come back, with an answer each.
type Processor = dyn Fn(Vec<(Message, World)>) -> Vec<(World, Result<Outcome, Failure>)>;

/// Undoes a step of the message given, whose data is the step's payload.
type Undo = dyn Fn(Message, &mut Context) -> Result<(), Failure>;

/// A host in memory that runs one processor.
pub struct Harness {
    handler: Box<Processor>,
    world: World,
    undoes: BTreeMap<String, Box<Undo>>,
    /// Steps of messages that have joined a saga and completed, oldest first; each with its
    /// message.
    sagas: BTreeMap<String, Vec<Taken>>,
    undone: Vec<String>,
}

/// A registered step, with the message that registered it and its payload as that message's data.
type Taken = (String, Message);

impl Harness {
    /// A host for `handler`, with empty state.
    pub fn new<M>(handler: impl Handler<M> + 'static) -> Self {
        let one = move |(message, world): (Message, World)| {
            let mut context = Context::new(world, &message);
            let result = handler.handle(message, &mut context);
            (context.into_backend(), result)
        };
        Self::with(Box::new(move |items| items.into_iter().map(&one).collect()))
    }

    /// A host for a batch processor, with empty state.
    pub fn batches(handler: impl BatchHandler + 'static) -> Self {
        let all = move |items: Vec<(Message, World)>| {
            let worlds: Vec<World> = items.iter().map(|(_, world)| world.clone()).collect();
            let item = |(message, world): (Message, World)| Item { context: Context::new(world, &message), message };
            let Answers(answers) = handler.handle(Batch { items: items.into_iter().map(item).collect() });
            assert_eq!(answers.len(), worlds.len(), "a batch processor answers every message, and each once");
            worlds.into_iter().zip(answers).collect()
        };
        Self::with(Box::new(all))
    }

    fn with(handler: Box<Processor>) -> Self {
        let (undoes, sagas) = (BTreeMap::new(), BTreeMap::new());
        Self { handler, world: World::default(), undoes, sagas, undone: Vec::new() }
    }

    /// Sets `compensation` as the compensation of the step `step`.
    #[must_use]
    pub fn compensation<P>(mut self, step: &str, compensation: impl Compensate<P> + 'static) -> Self {
        let undo = move |message: Message, context: &mut Context| compensation.compensate(message, context);
        self.undoes.insert(step.to_owned(), Box::new(undo));
        self
    }

    /// Sets `outside` as the responder to the processor's outbound calls; without it, no call is
    /// granted.
    #[must_use]
    pub fn http(mut self, outside: impl Fn(&Request) -> Result<Response, HttpError> + 'static) -> Self {
        self.world.answer_by(Rc::new(outside));
        self
    }

    /// Starts with `text` under `key`.
    #[must_use]
    pub fn state(self, key: &str, text: &str) -> Self {
        self.world.set(key, text.as_bytes());
        self
    }

    /// Configures `key` as `value`.
    #[must_use]
    pub fn config(mut self, key: &str, value: &str) -> Self {
        self.world.configure(key, value);
        self
    }

    /// Runs the processor. What it did stays if it succeeds; only its log stays if it fails.
    pub fn deliver(&mut self, message: impl Into<Message>) -> Result<Outcome, Failure> {
        let message = message.into();
        self.world.early().begin(message.attribute("saga"));
        let (after, result) = (self.handler)(vec![(message.clone(), self.world.separate())]).remove(0);
        self.settle(&after, &result);
        self.world.release_all();
        self.settle_saga(message, &result);
        result
    }

    /// Settles the message's steps: they are held for the saga that the message has joined,
    /// forgotten, or compensated, the last one first.
    fn settle_saga(&mut self, message: Message, result: &Result<Outcome, Failure>) {
        let early = self.world.early().clone();
        let taken: Vec<Taken> =
            early.steps.into_iter().map(|(step, data)| (step, Message { data, ..message.clone() })).collect();
        for (step, _) in &taken {
            assert!(
                self.undoes.contains_key(step),
                "the step `{step}` has no compensation: give it one with `compensation`"
            );
        }
        let name = early.saga.unwrap_or_default();
        let before = self.sagas.remove(&name).unwrap_or_default();
        match result {
            Ok(_) if early.completes || name.is_empty() => {}
            Ok(_) => drop(self.sagas.insert(name, before.into_iter().chain(taken).collect())),
            Err(Failure::Retry { .. }) => drop(self.sagas.insert(name, before)),
            Err(_) if early.pivoted => {}
            Err(_) => before.into_iter().chain(taken).rev().for_each(|step| self.undo(step)),
        }
    }

    fn undo(&mut self, (step, message): Taken) {
        let mut context = Context::new(self.world.separate(), &message);
        let result = self.undoes[&step](message, &mut context);
        let after = context.into_backend();
        self.settle(&after, &result.clone().map(|()| Outcome::default()));
        result.unwrap_or_else(|failure| panic!("the step `{step}` could not be undone: {failure}"));
        self.undone.push(step);
    }

    /// Returns the compensated steps, in the order of their compensation.
    pub fn undone(&self) -> &[String] {
        &self.undone
    }

    /// The calls that were made, in order.
    pub fn calls(&self) -> Vec<Request> {
        self.world.calls()
    }

    /// Runs all messages in one call of a batch processor. Each succeeds or fails by itself; one
    /// that has read what an earlier one of the call has changed is run again, alone, as the host
    /// does it.
    pub fn deliver_all<M: Into<Message>>(
        &mut self,
        messages: impl IntoIterator<Item = M>,
    ) -> Vec<Result<Outcome, Failure>> {
        let messages: Vec<Message> = messages.into_iter().map(Into::into).collect();
        let items = messages.iter().map(|message| (message.clone(), self.world.separate())).collect();
        let mut results = Vec::with_capacity(messages.len());
        for ((after, result), message) in (self.handler)(items).into_iter().zip(messages) {
            results.push(if after.stands(&self.world) {
                self.settle(&after, &result);
                result
            } else {
                self.deliver(message)
            });
        }
        results
    }

    fn settle(&mut self, after: &World, result: &Result<Outcome, Failure>) {
        match result {
            Ok(_) => self.world.take_over(after),
            Err(_) => self.world.take_logs(after),
        }
    }

    /// The events of `stream`, oldest first.
    pub fn events(&self, stream: &str) -> Vec<Event> {
        self.world.events(stream, 0, u32::MAX)
    }

    /// Returns the sent messages, in order.
    pub fn sent(&self) -> Vec<Outgoing> {
        self.world.sent()
    }

    /// The text under `key`. Panics if it is no text.
    pub fn state_text(&self, key: &str) -> Option<String> {
        let bytes = self.state_bytes(key)?;
        Some(String::from_utf8(bytes).unwrap_or_else(|error| panic!("state `{key}` holds no text: {error}")))
    }

    /// The bytes under `key`.
    pub fn state_bytes(&self, key: &str) -> Option<Vec<u8>> {
        self.world.get(key)
    }

    /// The whole state, in key order.
    pub fn entries(&self) -> Vec<(String, Vec<u8>)> {
        self.world.scan("", None, u32::MAX)
    }

    /// Returns the logged lines, in order.
    pub fn logs(&self) -> Vec<(Level, String)> {
        self.world.logs()
    }

    /// Returns a kit over this world with another processor.
    #[cfg(test)]
    pub(crate) fn with_handler<M>(&self, handler: impl Handler<M> + 'static) -> Self {
        Self { world: self.world.clone(), ..Self::new(handler) }
    }

    /// Goes on in the world that `other` left.
    #[cfg(test)]
    pub(crate) fn take_world(&mut self, other: Self) {
        self.world = other.world;
    }
}

/// Begins a message of type `kind`: id `m-1`, source `/test`, first attempt, no data.
pub fn message(kind: &str) -> MessageBuilder {
    MessageBuilder(Message {
        attributes: Vec::new(),
        data: Vec::new(),
        idempotency_key: String::new(),
        attempt: 1,
        now_ms: 0,
        seed: 0,
        step_key: None,
    })
    .attribute("source", "/test")
    .attribute("type", kind)
    .id("m-1")
}

/// A message in the making; [`Harness::deliver`] takes it as it is.
#[derive(Debug, Clone)]
pub struct MessageBuilder(Message);

impl MessageBuilder {
    /// The id, and with it the idempotency key.
    #[must_use]
    pub fn id(mut self, id: &str) -> Self {
        self.0.idempotency_key = id.to_owned();
        self.attribute("id", id)
    }

    /// The subject.
    #[must_use]
    pub fn subject(self, subject: &str) -> Self {
        self.attribute("subject", subject)
    }

    /// Any attribute, by its CloudEvents name.
    #[must_use]
    pub fn attribute(mut self, name: &str, value: &str) -> Self {
        self.0.attributes.retain(|(of, _)| of != name);
        self.0.attributes.push((name.to_owned(), value.to_owned()));
        self
    }

    /// `value` as JSON data. Panics if serde cannot write it.
    #[must_use]
    pub fn json<T: Serialize + ?Sized>(self, value: &T) -> Self {
        let data = serde_json::to_vec(value).unwrap_or_else(|error| panic!("no JSON: {error}"));
        self.data("application/json", data)
    }

    /// Data of some content type.
    #[must_use]
    pub fn data(mut self, content_type: &str, data: impl Into<Vec<u8>>) -> Self {
        self.0.data = data.into();
        self.attribute("datacontenttype", content_type)
    }

    /// Sets the number of the attempt.
    #[must_use]
    pub fn attempt(mut self, attempt: u32) -> Self {
        self.0.attempt = attempt;
        self
    }

    /// The message's clock. The host reads it from the `time` attribute.
    #[must_use]
    pub fn now_ms(mut self, now_ms: u64) -> Self {
        self.0.now_ms = now_ms;
        self
    }

    /// The seed of the message's random numbers.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.0.seed = seed;
        self
    }
}

impl From<MessageBuilder> for Message {
    fn from(builder: MessageBuilder) -> Self {
        builder.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(message: Message, ctx: &mut Context) -> Result<Outcome, Failure> {
        ctx.state().set("seen", message.id())?;
        ctx.send(Outgoing::new("seen").text(message.id()).extension("hop", "1"));
        ctx.info(format!("attempt {}", message.attempt()));
        let wanted = ctx.config("wanted").ok_or_else(|| Failure::retry("not configured"))?;
        if message.kind() == wanted { Ok(Outcome::text(message.id())) } else { Err(Failure::reject("unwanted")) }
    }

    #[test]
    fn a_success_stays() {
        let mut harness = Harness::new(busy).config("wanted", "t");
        assert_eq!(harness.deliver(message("t").id("a")), Ok(Outcome::text("a")));
        assert_eq!(harness.state_text("seen").as_deref(), Some("\"a\""));
        assert_eq!(harness.sent(), [Outgoing::new("seen").text("a").extension("hop", "1")]);
    }

    #[test]
    fn of_a_failure_only_the_log_stays() {
        let mut harness = Harness::new(busy).config("wanted", "t").state("before", "1");
        assert_eq!(harness.deliver(message("other").attempt(2)), Err(Failure::reject("unwanted")));
        assert_eq!(harness.entries(), [("before".to_owned(), b"1".to_vec())]);
        assert_eq!(harness.sent(), []);
        assert_eq!(harness.logs(), [(Level::Info, "attempt 2".to_owned())]);
    }

    #[test]
    fn time_and_chance_are_the_messages() {
        let draw = |_: Message, ctx: &mut Context| Outcome::json(&(ctx.now_ms(), ctx.rng().next_u64()));
        let mut harness = Harness::new(draw);
        let first = harness.deliver(message("t").now_ms(9).seed(3)).expect("drawn");
        assert_eq!(harness.deliver(message("t").now_ms(9).seed(3)).expect("drawn"), first);
        assert_ne!(harness.deliver(message("t").now_ms(9).seed(4)).expect("drawn"), first);
        assert_eq!(first.json_value::<(u64, u64)>().expect("two numbers").0, 9);
    }
}
