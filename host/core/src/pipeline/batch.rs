//! Batches: many messages that are delivered together. Each message has its own outcome. A message
//! that is to be delivered again holds up only the messages that must not overtake it.

use std::collections::BTreeMap;

use tokio::task::JoinSet;

use crate::message::Message;
use crate::pipeline::IdempotentConsumer;
use crate::pipeline::delivery::{Accepted, Handling};
use crate::pipeline::outcome::Outcome;
use crate::support::error::StoreError;
use crate::support::fault;

/// Least retry delay of a message that has not run because one before it is to be delivered again,
/// in milliseconds.
const BEHIND_MS: u64 = 1_000;

/// Outcome of one message, with its index in the batch.
type Ended = (usize, Result<Outcome, StoreError>);

impl IdempotentConsumer {
    /// Processes the messages of a batch. Returns one outcome for each message, in their order.
    ///
    /// Messages of one ordering key run one after the other. Once one of them is to be delivered
    /// again, the rest of that key does not run and is to be delivered again behind it.
    pub async fn handle_all(&self, messages: Vec<Message>, handling: Handling) -> Vec<Result<Outcome, StoreError>> {
        let count = messages.len();
        let mut lines = JoinSet::new();
        for line in self.in_lines(messages, handling) {
            lines.spawn(self.clone().one_after_the_other(line));
        }
        let mut ended: Vec<Ended> = Vec::with_capacity(count);
        while let Some(line) = lines.join_next().await {
            ended.extend(line.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())));
        }
        ended.sort_unstable_by_key(|(place, _)| *place);
        ended.into_iter().map(|(_, outcome)| outcome).collect()
    }

    /// Accepts the messages in their order, and sorts them by ordering key. A message without an
    /// ordering key is a line of its own.
    fn in_lines(&self, messages: Vec<Message>, handling: Handling) -> Vec<Vec<(usize, Accepted)>> {
        let mut keyed: BTreeMap<String, Vec<(usize, Accepted)>> = BTreeMap::new();
        let mut lines = Vec::new();
        for (place, message) in messages.into_iter().enumerate() {
            let key = self.options().ordering.key(&message).map(str::to_owned);
            let accepted = (place, self.accept(message, handling));
            match key {
                Some(key) => keyed.entry(key).or_default().push(accepted),
                None => lines.push(vec![accepted]),
            }
        }
        lines.extend(keyed.into_values());
        lines
    }

    async fn one_after_the_other(self, line: Vec<(usize, Accepted)>) -> Vec<Ended> {
        let mut ended = Vec::with_capacity(line.len());
        let mut held_up = false;
        for (place, accepted) in line {
            if held_up && !fault::mutated("batch-overtakes") {
                let error =
                    "a message before it in the batch has its ordering key and is to come again; send it behind that";
                ended.push((place, Ok(Outcome::Retry { error: error.to_owned(), after_ms: BEHIND_MS })));
                continue;
            }
            let outcome = self.process(accepted).await;
            held_up = !outcome.as_ref().is_ok_and(Outcome::is_settled);
            ended.push((place, outcome));
        }
        ended
    }
}
