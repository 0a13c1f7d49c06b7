//! Batches: many messages that are delivered together. Each message has its own outcome. A message
//! that is to be delivered again holds up only the messages that must not overtake it.

use std::collections::HashMap;

use tokio::task::JoinSet;

use crate::message::Message;
use crate::message::key::RecordKey;
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
    /// Messages of one ordering key, or of one record, run one after the other. Once one of them is
    /// to be delivered again, the rest of that key does not run and is to be delivered again behind
    /// it.
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

    /// Accepts the messages in their order, and sorts them into lines. Messages that share their
    /// ordering key, or their record, are in one line: of two bodies under one key the first runs.
    fn in_lines(&self, messages: Vec<Message>, handling: Handling) -> Vec<Vec<(usize, Accepted)>> {
        let mut by_ordering_key: HashMap<String, usize> = HashMap::new();
        let mut by_record: HashMap<RecordKey, usize> = HashMap::new();
        let mut lines: Vec<Vec<(usize, Accepted)>> = Vec::new();
        for (place, message) in messages.into_iter().enumerate() {
            let key = self.options().ordering.key(&message).map(str::to_owned);
            let accepted = self.accept(message, handling);
            let record = accepted.identity.record.clone();
            let line_of_key = key.as_ref().and_then(|key| by_ordering_key.get(key)).copied();
            let line_of_record = by_record.get(&record).copied().filter(|_| !fault::mutated("batch-races-for-a-key"));
            let line = match (line_of_key, line_of_record) {
                (Some(one), Some(other)) if one != other => {
                    let moved = std::mem::take(&mut lines[other]);
                    lines[one].extend(moved);
                    for line in by_ordering_key.values_mut().chain(by_record.values_mut()) {
                        *line = if *line == other { one } else { *line };
                    }
                    one
                }
                (line, other) => line.or(other).unwrap_or(lines.len()),
            };
            lines.resize_with(lines.len().max(line + 1), Vec::new);
            lines[line].push((place, accepted));
            by_record.insert(record, line);
            by_ordering_key.extend(key.map(|key| (key, line)));
        }
        for line in &mut lines {
            line.sort_unstable_by_key(|(place, _)| *place);
        }
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
