//! Claims: where effects can leave the transaction, a message is claimed durably before it runs,
//! for a time that is renewed while it runs. A run that is too slow loses its claim, and with it
//! the right to write anything.

use std::sync::Arc;

use crate::message::identity::Identity;
use crate::pipeline::Parts;
use crate::pipeline::commit_builder::CommitBuilder;
use crate::pipeline::delivery::Accepted;
use crate::pipeline::in_flight::Leader;
use crate::record::{Output, Record, RecordEvent, RecordState};
use crate::run::checkpoint::{CheckpointParts, Checkpoints, LazyCheckpoints, Lease, RunIdentity};
use crate::run::failure::Failure;
use crate::run::lock::StoreLocks;
use crate::saga::log::SagaLog;
use crate::store::commit::{Commit, Expected, RecordChange, Verdict};
use crate::support::error::StoreError;
use crate::support::fault;

/// Renewals of a claim within one lease: two may fail before the lease is over.
const RENEWALS_PER_LEASE: u64 = 3;

/// The right to run a message: its record allows it, and no other run of it is under way in this
/// process.
pub(crate) struct RunRight {
    /// Held until the outcome is durable and in the cache.
    pub(super) _leader: Leader,
    /// The record as it was found, if its retention is not over.
    pub(super) found: Option<Arc<Record>>,
    /// Epoch of the record that is in the store.
    pub(super) epoch: Option<u64>,
    /// The record that is in the store has ended: it may expire, and be gone when this run commits.
    pub(super) may_expire: bool,
    /// Attempts made before.
    pub(super) attempts: u32,
    /// Deaths of the process during this message's runs that no record counts yet. They are among
    /// `attempts`.
    pub(super) deaths: u32,
    /// Time from which the message may run, in milliseconds since the Unix epoch.
    pub(super) due_ms: u64,
    /// Time of its admission, in milliseconds since the Unix epoch.
    pub(super) admitted_ms: u64,
    /// Set if an earlier run may have left steps or outbound answers behind.
    pub(super) ran_before: bool,
    /// The record says that the message is claimed, and this run made that claim.
    pub(super) is_claimed: bool,
    /// Runs of this attempt whose reads had changed when they ended.
    pub(super) conflicts: u32,
}

/// The end of a run under a claim.
pub(super) enum ClaimedRun {
    /// The processor ended, and the claim still held when it was last renewed.
    Ended(Result<Output, Failure>),
    /// Another owner took the claim over. The run is abandoned.
    Lost,
}

/// Takes and renews the claims of one consumer.
pub(super) struct Claims {
    parts: Arc<Parts>,
    /// Shared by the checkpoints of all runs.
    pub(super) checkpoints: Arc<CheckpointParts>,
}

impl Claims {
    pub(super) fn new(parts: Arc<Parts>) -> Self {
        let storage = &*parts.storage;
        let locks = StoreLocks::new(storage, parts.committer.clone(), parts.clock.clone(), &parts.scope);
        let checkpoints = CheckpointParts {
            scope: parts.scope.clone(),
            committer: parts.committer.clone(),
            storage: parts.storage.clone(),
            clock: parts.clock.clone(),
            outbound: parts.outbound.clone(),
            locks: Arc::new(locks),
            log: SagaLog::new(storage, &parts.scope),
            component: parts.processor.digest().into(),
            steps: parts.processor.compensation().map_or_else(Vec::new, |compensation| compensation.steps().to_vec()),
        };
        Self { parts, checkpoints: Arc::new(checkpoints) }
    }

    /// Returns whether messages are claimed before they run. They are where an effect can leave the
    /// transaction.
    pub(super) fn are_needed(&self) -> bool {
        (self.parts.outbound.is_some() || self.parts.processor.compensation().is_some())
            && !fault::mutated("runs-without-a-claim")
    }

    /// Claims a message durably. Returns `false` if another owner was faster.
    pub(super) async fn take(&self, message: &Accepted, right: &mut RunRight) -> Result<bool, StoreError> {
        let left_ms = right.lease().lease_end_ms.map(|end_ms| end_ms.saturating_sub(self.parts.clock.now_ms()));
        if right.is_claimed && left_ms.is_some_and(|left_ms| left_ms > self.parts.options.lease_ms / 2) {
            return Ok(true);
        }
        let (commit, record) = self.claim(message, right);
        let verdict = self.parts.committer.submit(commit).durable().await?;
        fault::point("claimed");
        right.continue_from(record);
        Ok(verdict == Verdict::Committed)
    }

    /// Waits for `run`, and renews its claim meanwhile.
    pub(super) async fn keep_while(
        &self,
        message: &Accepted,
        right: &mut RunRight,
        checkpoints: &Checkpoints,
        run: impl Future<Output = Result<Output, Failure>>,
    ) -> Result<ClaimedRun, StoreError> {
        let renew_ms = (self.parts.options.lease_ms / RENEWALS_PER_LEASE).max(1);
        let mut run = std::pin::pin!(run);
        loop {
            tokio::select! {
                biased;
                result = &mut run => return Ok(ClaimedRun::Ended(result)),
                () = self.parts.clock.sleep(renew_ms) => {}
            }
            let (commit, record) = self.claim(message, right);
            right.continue_from(record);
            let Some(pending) = checkpoints.renew(commit, right.lease()) else { continue };
            tokio::select! {
                biased;
                verdict = pending.durable() => {
                    if verdict? != Verdict::Committed {
                        return Ok(ClaimedRun::Lost);
                    }
                }
                // The run's commit expects the renewed claim and is sequenced after it: no need to
                // wait for the renewal.
                result = &mut run => return Ok(ClaimedRun::Ended(result)),
            }
        }
    }

    /// Returns the checkpoints of a run under `lease`. Nothing is made until the run asks for them.
    pub(super) fn checkpoints(&self, message: &Accepted, lease: Lease) -> LazyCheckpoints {
        let Identity { record, message_key, .. } = &message.identity;
        let identity = RunIdentity {
            record: record.clone(),
            message_key: message_key.clone(),
            message: message.message.clone(),
            trace: message_key.digest(),
        };
        LazyCheckpoints { parts: self.checkpoints.clone(), identity, lease }
    }

    /// Removes the traces that earlier runs of a stale message left behind: its journalled answers
    /// are deleted, and the steps that it registered are compensated. Its record is that of the
    /// later message.
    pub(super) async fn abandon(&self, builder: CommitBuilder<'_>) -> Result<(), StoreError> {
        if !self.are_needed() {
            return Ok(());
        }
        let checkpoints = self.checkpoints(builder.message, Lease { epoch: None, lease_end_ms: None });
        let prior = checkpoints.make().finish(true).await?;
        let shared = builder.superseded(&prior);
        if shared.is_none() && prior.journal.is_empty() {
            return Ok(());
        }
        let mut commit = builder.empty_commit();
        commit.shared = shared.map(Box::new);
        commit.effects.writes.extend(prior.journal.into_iter().map(|key| (key, None)));
        // A conflict means that another writer has done the same.
        self.parts.committer.submit(commit).durable().await?;
        self.parts.committer.wake_compensator();
        Ok(())
    }

    /// Returns the commit that claims a message or renews its claim, and the record that it leaves.
    fn claim(&self, message: &Accepted, right: &RunRight) -> (Commit, Arc<Record>) {
        let builder = CommitBuilder::new(&self.parts, &self.checkpoints.component, message);
        let now_ms = builder.now_ms;
        let owner = self.parts.options.owner.to_string();
        let lease_end_ms = now_ms.saturating_add(self.parts.options.lease_ms);
        let event = RecordEvent::Claimed { owner, now_ms, lease_end_ms };
        // Deaths are counted when the run ends: until then the crash tracker holds them, and a
        // claim that counted them too would have them counted twice.
        let counted = if fault::mutated("deaths-counted-by-claims") { 0 } else { right.deaths };
        let record = Arc::new(builder.record(right, right.attempts.saturating_sub(counted), None, event));
        let mut commit =
            Commit { expected: right.expected(), record: RecordChange::Put(record.clone()), ..builder.empty_commit() };
        builder.index(&mut commit, right);
        (commit, record)
    }
}

impl RunRight {
    /// Returns the epoch and the lease that the record states.
    pub(super) fn lease(&self) -> Lease {
        let lease_end_ms = match self.found.as_ref().map(|record| &record.state) {
            Some(RecordState::InProgress { lease_end_ms, .. }) => Some(*lease_end_ms),
            _ => None,
        };
        Lease { epoch: self.epoch, lease_end_ms }
    }

    /// Returns the condition on the record under which the run may commit.
    pub(super) fn expected(&self) -> Expected {
        match self.epoch {
            Some(epoch) if self.may_expire => Expected::EpochOrAbsent(epoch),
            epoch => Expected::of(epoch),
        }
    }

    /// Continues from `record`, which this run has claimed or renewed.
    fn continue_from(&mut self, record: Arc<Record>) {
        (self.epoch, self.may_expire) = (Some(record.epoch), false);
        self.is_claimed = matches!(record.state, RecordState::InProgress { .. });
        self.found = Some(record);
    }

    /// Prepares the attempt after the one that `record` describes.
    pub(super) fn next_attempt(&mut self, record: Arc<Record>, due_ms: u64) {
        self.attempts = record.attempts;
        (self.epoch, self.may_expire, self.conflicts) = (Some(record.epoch), false, 0);
        self.due_ms = due_ms;
        self.found = Some(record);
        (self.ran_before, self.is_claimed) = (true, false);
    }
}
