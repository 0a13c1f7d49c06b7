//! Many messages in one call: each with a context of its own, and each with its own answer. Shares
//! nothing between them but the call.

use crate::{Context, Failure, FromMessage, Message, Outcome};

/// The messages of one call. Each is committed and reported by itself, and sees no other one's
/// writes.
///
/// A message whose ordering key is that of another one is never in the same call.
pub struct Batch {
    pub(crate) items: Vec<Item>,
}

/// A message and where its effects go.
pub(crate) struct Item {
    pub(crate) message: Message,
    pub(crate) context: Context,
}

/// One answer a message, in the order of the batch.
#[derive(Debug)]
pub struct Answers(pub(crate) Vec<Result<Outcome, Failure>>);

impl Batch {
    /// Returns the number of messages; at least one.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Returns true if there are no messages.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The messages, in order: to work out what they share before each is handled.
    pub fn messages(&self) -> impl Iterator<Item = &Message> {
        self.items.iter().map(|item| &item.message)
    }

    /// Handles each message with `handle`, which is as a processor's function for one message.
    pub fn each<M: FromMessage>(self, mut handle: impl FnMut(M, &mut Context) -> Result<Outcome, Failure>) -> Answers {
        let answer = |Item { message, mut context }| handle(M::from_message(message)?, &mut context);
        Answers(self.items.into_iter().map(answer).collect())
    }
}

impl FromIterator<Result<Outcome, Failure>> for Answers {
    /// As many as there are messages: the host refuses a call with any other number.
    fn from_iter<I: IntoIterator<Item = Result<Outcome, Failure>>>(answers: I) -> Self {
        Self(answers.into_iter().collect())
    }
}

/// A function that handles a batch.
#[diagnostic::on_unimplemented(
    message = "this is no batch processor",
    label = "write `fn(batch: Batch) -> Answers`, which `batch.each(...)` makes"
)]
pub trait BatchHandler {
    /// Handles `batch`.
    fn handle(&self, batch: Batch) -> Answers;
}

impl<F: Fn(Batch) -> Answers> BatchHandler for F {
    fn handle(&self, batch: Batch) -> Answers {
        self(batch)
    }
}

/// Calls a batch processor's function.
pub fn call_batch(handler: impl BatchHandler, batch: Batch) -> Answers {
    handler.handle(batch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Harness, message};

    /// Adds one to the key that is the subject.
    fn count(batch: Batch) -> Answers {
        let all = batch.len();
        batch.each(|message: Message, ctx: &mut Context| {
            let key = message.subject().unwrap_or_default();
            let count: u32 = ctx.state().get(key)?.unwrap_or(0) + 1;
            ctx.state().set(key, &count)?;
            if message.kind() == "refused" { Err(Failure::reject("on purpose")) } else { Outcome::json(&(all, count)) }
        })
    }

    #[test]
    fn each_message_of_a_call_succeeds_or_fails_by_itself() {
        let mut harness = Harness::batches(count);
        let results = harness.deliver_all([
            message("t").subject("a"),
            message("refused").subject("b"),
            message("t").subject("b"),
            // Rests on what the first one has changed: it runs again, alone.
            message("t").subject("a"),
        ]);
        let texts: Vec<_> =
            results.iter().map(|result| result.as_ref().map(|outcome| outcome.data.as_slice())).collect();
        assert_eq!(texts[0], Ok(&b"[4,1]"[..]));
        assert_eq!(texts[1], Err(&Failure::reject("on purpose")));
        assert_eq!(texts[2..], [Ok(&b"[4,1]"[..]), Ok(&b"[1,2]"[..])]);
        assert_eq!((harness.state_text("a").as_deref(), harness.state_text("b").as_deref()), (Some("2"), Some("1")));
        assert_eq!(harness.deliver(message("t").subject("a")), Outcome::json(&(1, 3)));
    }
}
