//! Claims: where effects can leave the transaction, a message is claimed durably before it runs, for a time that is renewed
//! while it does. Who is too slow loses its claim, and with it the right to write anything.

use std::sync::Arc;

use crate::message::identity::Identity;
use crate::pipeline::delivery::{Accepted, Handling};
use crate::pipeline::{Inner, Parts, RunRight};
use crate::record::{Output, Record, RecordEvent, RecordState};
use crate::run::checkpoint::{CheckpointParts, Checkpoints, LazyCheckpoints, Lease, RunIdentity};
use crate::run::failure::Failure;
use crate::run::lock::StoreLocks;
use crate::saga::log::SagaLog;
use crate::store::commit::{Commit, Expected, RecordChange, Verdict};
use crate::support::error::StoreError;
use crate::support::fault;

/// A claim is renewed so many times before it would be over.
const RENEWALS: u64 = 3;
/// A record that another owner is at work on is looked at again after this long, at most.
const LOOK_AGAIN_MS: u64 = 200;

impl Parts {
    /// What the consumer's runs make durable before they end.
    pub(crate) fn early(&self) -> CheckpointParts {
        let storage = &*self.storage;
        CheckpointParts {
            scope: self.scope.clone(),
            committer: self.committer.clone(),
            storage: self.storage.clone(),
            clock: self.clock.clone(),
            outbound: self.outbound.clone(),
            locks: Arc::new(StoreLocks::new(storage, self.committer.clone(), self.clock.clone(), &self.scope)),
            log: SagaLog::new(storage, &self.scope),
            component: self.processor.digest().into(),
            steps: self.processor.compensation().map_or_else(Vec::new, |undoes| undoes.steps().to_vec()),
        }
    }
}

impl Inner {
    /// Whether messages are claimed before they run: where an effect can leave the transaction.
    pub(crate) fn claims(&self) -> bool {
        (self.parts.outbound.is_some() || self.parts.processor.compensation().is_some())
            && !fault::mutated("runs-without-a-claim")
    }

    /// Waits for a message that another owner runs, or that is being undone, before its record is looked at again. `false` where
    /// the delivery is put off instead.
    pub(crate) async fn waits_elsewhere(&self, message: &Accepted, after_ms: u64) -> bool {
        let Handling { wait_in_flight, retry_here } = message.handling;
        let mut stopping = self.stopping.subscribe();
        if !(wait_in_flight && retry_here) || *stopping.borrow() {
            return false;
        }
        tokio::select! {
            () = self.parts.clock.sleep(after_ms.clamp(1, LOOK_AGAIN_MS)) => true,
            _ = stopping.wait_for(|stop| *stop) => false,
        }
    }

    /// Claims a message durably. `false` if somebody else was faster.
    pub(crate) async fn take_claim(&self, message: &Accepted, claim: &mut RunRight) -> Result<bool, StoreError> {
        let left_ms = claim.claimed().lease_end_ms.map(|end_ms| end_ms.saturating_sub(self.parts.clock.now_ms()));
        if claim.is_own && left_ms.is_some_and(|left_ms| left_ms > self.parts.options.lease_ms / 2) {
            return Ok(true);
        }
        let (commit, record) = self.claiming(message, claim);
        let verdict = self.parts.committer.submit(commit).durable().await?;
        fault::point("claimed");
        claim.take_over(record);
        Ok(verdict == Verdict::Committed)
    }

    /// The commit that claims a message, or renews its claim.
    fn claiming(&self, message: &Accepted, claim: &RunRight) -> (Commit, Arc<Record>) {
        let builder = self.builder(message);
        let now_ms = builder.now_ms;
        let owner = self.parts.options.owner.to_string();
        let lease_end_ms = now_ms.saturating_add(self.parts.options.lease_ms);
        let event = RecordEvent::Claimed { owner, now_ms, lease_end_ms };
        let record = Arc::new(builder.record(claim, claim.attempts, None, event));
        let commit = Commit {
            expected: Expected::of(claim.epoch),
            record: RecordChange::Put(record.clone()),
            ..builder.commit()
        };
        (commit, record)
    }

    /// A message never runs again, since a later one was seen: the answers that earlier runs of it were given are forgotten, and the steps
    /// that they took are undone. Its record is the later one's.
    pub(crate) async fn leave_nothing_of(&self, message: &Accepted) -> Result<(), StoreError> {
        if !self.claims() {
            return Ok(());
        }
        let lazy = self.unmade_early(message, Lease { epoch: None, lease_end_ms: None });
        let taken = lazy.make().take(true).await?;
        let builder = self.builder(message);
        let shared = builder.superseded(&taken);
        if shared.is_none() && taken.journal.is_empty() {
            return Ok(());
        }
        let mut commit = builder.commit();
        commit.shared = shared.map(Box::new);
        commit.effects.writes.extend(taken.journal.into_iter().map(|key| (key, None)));
        // Where somebody else was faster, it is done.
        self.parts.committer.submit(commit).durable().await?;
        self.parts.committer.undo();
        Ok(())
    }

    /// What the run makes durable before it ends rests on its claim.
    pub(crate) fn unmade_early(&self, message: &Accepted, claimed: Lease) -> LazyCheckpoints {
        let Identity { record, message_key, .. } = &message.identity;
        let (message, trace) = (message.message.clone(), message_key.digest());
        let identity = RunIdentity { record: record.clone(), message_key: message_key.clone(), message, trace };
        LazyCheckpoints { parts: self.early.clone(), identity, claimed }
    }

    /// Waits for the run, and renews its claim meanwhile. `None` if the claim was lost: the run is abandoned then.
    pub(crate) async fn while_claimed(
        &self,
        message: &Accepted,
        claim: &mut RunRight,
        early: &Checkpoints,
        run: impl Future<Output = Result<Output, Failure>>,
    ) -> Result<Option<Result<Output, Failure>>, StoreError> {
        let mut run = std::pin::pin!(run);
        loop {
            tokio::select! {
                biased;
                result = &mut run => return Ok(Some(result)),
                () = self.parts.clock.sleep((self.parts.options.lease_ms / RENEWALS).max(1)) => {}
            }
            let (commit, record) = self.claiming(message, claim);
            claim.take_over(record);
            let Some(pending) = early.renew(commit, claim.claimed()) else { continue };
            tokio::select! {
                biased;
                verdict = pending.durable() => {
                    if verdict? != Verdict::Committed {
                        return Ok(None);
                    }
                }
                // The commit that follows rests on the renewed claim, and comes after it.
                result = &mut run => return Ok(Some(result)),
            }
        }
    }
}

impl RunRight {
    /// What is written down of the claim.
    pub(crate) fn claimed(&self) -> Lease {
        let lease_end_ms = match self.found.as_ref().map(|record| &record.state) {
            Some(RecordState::InProgress { lease_end_ms, .. }) => Some(*lease_end_ms),
            _ => None,
        };
        Lease { epoch: self.epoch, lease_end_ms }
    }

    /// The claim is as `record` tells.
    fn take_over(&mut self, record: Arc<Record>) {
        self.epoch = Some(record.epoch);
        self.is_own = matches!(record.state, RecordState::InProgress { .. });
        self.found = Some(record);
    }
}
