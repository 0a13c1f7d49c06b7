//! Sends the messages in the outbox, in order, and has them marked as sent. At least once, under a
//! stable id. A message that its destination refuses leaves the outbox as a dead letter; a
//! destination that is not available is tried again for ever.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::circuit_breaker::CircuitBreaker;
use crate::circuit_breaker::state_machine::CallResult;
use crate::commit::committer::Committer;
use crate::message::Message;
use crate::observe::status::OutboxTrouble;
use crate::outbox::{self, AfterRefusal, OrderingKeys, OutgoingRow, Writes};
use crate::store::Store;
use crate::store::commit::{OutboxPosition, SharedChange};
use crate::support::clock::Clock;
use crate::support::error::StoreError;
use crate::support::fault;
use crate::transport::{Published, Publisher, Refusal, SendAnswer, TransportError, Unavailable};

/// Messages in one batch, at most.
pub const BATCH_MESSAGES_MAX: usize = 1_024;
/// Bytes of the messages in one batch, at most, unless one message alone has more. A publisher that
/// recognises messages by what its destination has of them remembers as much: only one batch can be
/// sent and not yet marked.
pub const BATCH_BYTES_MAX: usize = 16 << 20;

/// Ordering keys with a refused message that the relay keeps in memory, at most. If there are more,
/// it asks the store.
const KEYS_MAX: usize = 4_096;

/// Wait after the first failure, in milliseconds; it doubles with each further one.
const RETRY_MS: u64 = 100;
/// Longest wait between two tries of a publisher that is not available, in milliseconds.
const RETRY_MS_MAX: u64 = 30_000;
/// Longest wait that a destination can ask for, in milliseconds.
const RETRY_AFTER_MS_MAX: u64 = 3_600_000;

/// Reason for not sending while the circuit breaker is open.
const LEFT_ALONE: &str = "the destination failed too often";

/// Reason why the relay stopped before its end.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RelayError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The publisher needs an operator's help; unsent messages stay in the outbox.
    #[error("the outbox could not be sent: {0}")]
    Publisher(TransportError),
}

/// Status of a relay, for whoever asks while it works.
#[derive(Default)]
pub struct RelayStatus(Mutex<Option<OutboxTrouble>>);

impl RelayStatus {
    /// Returns the reason why nothing is sent at present, if there is one.
    pub fn trouble(&self) -> Option<OutboxTrouble> {
        self.0.lock().clone()
    }
}

/// Moves one store's outbox to one publisher.
pub struct OutboxRelay {
    store: Arc<dyn Store>,
    committer: Arc<Committer>,
    publisher: Box<dyn Publisher>,
    clock: Arc<dyn Clock>,
    breaker: Option<Arc<CircuitBreaker>>,
    after_refusal: AfterRefusal,
    status: Arc<RelayStatus>,
    /// Position up to which every row is sent or waits for a refused message of its key.
    looked_to: Option<OutboxPosition>,
    keys: Option<OrderingKeys>,
    /// Operator actions on the outbox that `keys` and `looked_to` take into account.
    actions_seen: u64,
    retry_ms: u64,
    sent: u64,
}

/// Rows that are to be sent together.
struct Batch {
    rows: Vec<OutgoingRow>,
    /// Message of each row.
    messages: Vec<Message>,
    /// Position of the last row that was looked at for the batch.
    last: OutboxPosition,
}

impl OutboxRelay {
    /// Returns a relay from the outbox of `store` to `publisher`.
    pub fn new(
        store: Arc<dyn Store>,
        committer: Arc<Committer>,
        publisher: Box<dyn Publisher>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            store,
            committer,
            publisher,
            clock,
            breaker: None,
            after_refusal: AfterRefusal::default(),
            status: Arc::default(),
            looked_to: None,
            keys: None,
            actions_seen: 0,
            retry_ms: RETRY_MS,
            sent: 0,
        }
    }

    /// Guards the relay by the destination's circuit breaker: nothing is sent while the breaker is
    /// open.
    pub fn guarded_by(self, breaker: Option<Arc<CircuitBreaker>>) -> Self {
        Self { breaker, ..self }
    }

    /// Sets the policy for messages of a key that has a refused message.
    pub fn after_refusal(self, after_refusal: AfterRefusal) -> Self {
        Self { after_refusal, ..self }
    }

    /// Keeps `status` up to date while the relay works.
    pub fn reporting_to(self, status: Arc<RelayStatus>) -> Self {
        Self { status, ..self }
    }

    /// Sends until `stop` turns true and nothing more can be sent. Returns the number of messages
    /// delivered. While the publisher is not available, stopping does not wait for it: the rest
    /// stays in the outbox.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) -> Result<u64, RelayError> {
        loop {
            // Read before looking: a message that is written after an empty look wakes the wait
            // below.
            let stopping = *stop.borrow_and_update();
            if let Some(batch) = self.next_batch().await? {
                if !self.send(batch, &mut stop).await? {
                    return Ok(self.sent);
                }
            } else if stopping {
                return Ok(self.sent);
            } else {
                tokio::select! {
                    () = self.committer.outbox_written() => {}
                    changed = stop.changed() => if changed.is_err() { return Ok(self.sent) },
                }
            }
        }
    }

    /// Returns the next rows to send; none if there are none that may be sent now.
    async fn next_batch(&mut self) -> Result<Option<Batch>, StoreError> {
        // Read before the rows: an action that comes later is seen at the next look.
        let actions = self.committer.outbox_actions();
        if actions != self.actions_seen {
            self.actions_seen = actions;
            self.look_again();
        }
        if self.after_refusal == AfterRefusal::Wait && self.keys.is_none() {
            self.keys = Some(OrderingKeys::read(&*self.store, KEYS_MAX).await?);
        }
        loop {
            let pending = self.store.pending_within(self.looked_to, BATCH_MESSAGES_MAX, BATCH_BYTES_MAX).await?;
            let Some(last) = pending.last().map(|row| row.position) else { return Ok(None) };
            let mut batch =
                Batch { rows: Vec::with_capacity(pending.len()), messages: Vec::with_capacity(pending.len()), last };
            for mut pending in pending {
                let row = OutgoingRow::of(pending.position, &mut pending.message);
                let waits = match &self.keys {
                    Some(keys) => keys.hold(row, &pending.message).await?,
                    None => false,
                };
                if !waits {
                    batch.rows.push(row);
                    batch.messages.push(pending.message);
                }
            }
            if !batch.rows.is_empty() {
                return Ok(Some(batch));
            }
            self.looked_to = Some(last);
        }
    }

    /// Has the outbox looked at from its beginning: messages that waited may go on.
    fn look_again(&mut self) {
        self.looked_to = None;
        self.keys = None;
    }

    /// Sends one batch and has it marked. Returns `false` if the relay was stopped while the
    /// publisher was not available.
    async fn send(&mut self, batch: Batch, stop: &mut watch::Receiver<bool>) -> Result<bool, RelayError> {
        let Published { answers, mut unavailable } = self.publish(&batch.messages).await?;
        let answered = self.settle(&batch, &answers).await?;
        if answered == batch.rows.len() {
            self.looked_to = self.looked_to.max(Some(batch.last)).filter(|_| self.look_holds());
        }
        if answered > 0 {
            self.retry_ms = RETRY_MS;
            *self.status.0.lock() = None;
        } else if unavailable.is_none() {
            unavailable = Some(Unavailable::for_now("the publisher took nothing"));
        }
        match unavailable {
            None => Ok(true),
            Some(unavailable) => Ok(self.wait(&unavailable, batch.rows.len() - answered, stop).await),
        }
    }

    /// Returns false if a redriven message was sent since the keys were read: others may have
    /// waited for it.
    fn look_holds(&self) -> bool {
        self.keys.is_some() || self.after_refusal == AfterRefusal::Pass
    }

    /// Publishes a batch.
    async fn publish(&mut self, batch: &[Message]) -> Result<Published, RelayError> {
        let breaker = self.breaker.as_deref().filter(|_| !fault::mutated("relay-ignores-breaker"));
        let Ok(call) = breaker.map(CircuitBreaker::enter).transpose() else {
            return Ok(Published::none(batch.len(), Unavailable::for_now(LEFT_ALONE)));
        };
        let published = match self.publisher.publish(batch).await {
            Err(TransportError::Unavailable(reason)) => Ok(Published::none(batch.len(), Unavailable::for_now(reason))),
            other => other,
        };
        if let Some(call) = call {
            let is_up = published.as_ref().is_ok_and(|published| published.unavailable.is_none());
            let went = if is_up { CallResult::Succeeded } else { CallResult::Failed };
            call.ended(went, self.clock.now_ms(), batch.len() as u64);
        }
        published.map_err(RelayError::Publisher)
    }

    /// Has the answered rows marked: they have left the outbox. Refused messages become dead
    /// letters in the same commit. Returns the number of answered rows.
    async fn settle(&mut self, batch: &Batch, answers: &[SendAnswer]) -> Result<usize, StoreError> {
        let (mut sent, mut writes, mut refused) = (Vec::with_capacity(batch.rows.len()), Writes::new(), Vec::new());
        let mut was_redriven = false;
        for ((row, message), answer) in batch.rows.iter().zip(&batch.messages).zip(answers) {
            match answer {
                SendAnswer::NotSent => continue,
                SendAnswer::Delivered if row.is_redriven() => {
                    writes.extend(row.delivered(message));
                    was_redriven = true;
                }
                SendAnswer::Delivered => {}
                SendAnswer::Refused(Refusal { destination, status, text }) => {
                    let at_ms = self.clock.now_ms();
                    let answer = outbox::Refusal { destination, status: *status, error: text, at_ms };
                    writes.extend(row.refused(message, answer));
                    refused.push((*row, message, text));
                }
            }
            sent.push(row.position);
        }
        let answered = sent.len();
        if answered > 0 {
            fault::point("outbox-sent");
            self.mark(sent, writes).await?;
            fault::point("outbox-marked");
        }
        self.sent += (answered - refused.len()) as u64;
        if let [(_, message, text), ..] = refused[..] {
            let (count, id) = (refused.len(), &message.id);
            tracing::error!("outbox: {count} message(s) refused, the first is {id}: {text}; see `hapax outbox list`");
        }
        for (row, message, _) in refused {
            self.keys.iter_mut().for_each(|keys| keys.add_refused(row, message));
        }
        if was_redriven {
            self.look_again();
        }
        Ok(answered)
    }

    async fn mark(&mut self, sent: Vec<OutboxPosition>, writes: Writes) -> Result<(), StoreError> {
        if writes.is_empty() || fault::mutated("refused-is-forgotten") {
            return self.committer.mark_sent(sent).await;
        }
        if fault::mutated("refused-in-two-commits") {
            self.committer.mark_sent(sent).await?;
            fault::point("outbox-refused-in-two");
            return self.committer.mark_sent_with(Vec::new(), SharedChange { writes, ..SharedChange::default() }).await;
        }
        self.committer.mark_sent_with(sent, SharedChange { writes, ..SharedChange::default() }).await
    }

    /// Waits until the next try. Returns `false` if the relay is stopped: `left` messages of the
    /// batch were not sent.
    async fn wait(&mut self, why: &Unavailable, left: usize, stop: &mut watch::Receiver<bool>) -> bool {
        let reason = &why.reason;
        self.note_trouble(why);
        if *stop.borrow() {
            tracing::warn!("outbox: {reason}; {left} messages or more stay in it");
            return false;
        }
        if why.is_misconfigured {
            tracing::error!(
                "outbox: {reason}; nothing is lost, and nothing is sent until it is repaired; trying again"
            );
        } else {
            tracing::warn!("outbox: {reason}; trying again");
        }
        let asked_ms = why.retry_after_ms.unwrap_or(0).min(RETRY_AFTER_MS_MAX);
        let delay_ms = self.retry_ms.max(asked_ms);
        self.retry_ms = (self.retry_ms * 2).min(RETRY_MS_MAX);
        tokio::select! {
            () = self.until_next_try(delay_ms, asked_ms) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        true
    }

    fn note_trouble(&self, why: &Unavailable) {
        let mut trouble = self.status.0.lock();
        let new = OutboxTrouble {
            reason: why.reason.clone(),
            is_misconfigured: why.is_misconfigured,
            since_ms: self.clock.now_ms(),
            failures: 0,
        };
        let before = trouble.take();
        // The circuit breaker's reason says less than the one for which it opened.
        let told = match &before {
            Some(before) if *why.reason == *LEFT_ALONE => before.clone(),
            Some(before) => OutboxTrouble { since_ms: before.since_ms, failures: before.failures, ..new },
            None => new,
        };
        *trouble = Some(OutboxTrouble { failures: told.failures + 1, ..told });
    }

    /// Waits for the end of the backoff or, if the circuit breaker is not closed, until it may let
    /// a call through; and in any case as long as the destination asked for.
    async fn until_next_try(&mut self, delay_ms: u64, asked_ms: u64) {
        match &self.breaker {
            Some(breaker) if !breaker.is_closed() && !fault::mutated("relay-ignores-breaker") => {
                if asked_ms > 0 {
                    self.clock.sleep(asked_ms).await;
                }
                breaker.passable().await
            }
            _ => self.clock.sleep(delay_ms).await,
        }
    }
}
