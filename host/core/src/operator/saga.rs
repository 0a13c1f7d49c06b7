//! Operator actions on a saga that is stuck, or that is being compensated. Each is an event of the
//! saga's log, in one commit with the record of the message that failed and the line in the audit
//! trail.

use crate::message::key::Scope;
use crate::operator::{Actor, Operator, OperatorError, Plan, SagaAction};
use crate::pipeline::options::Options;
use crate::record::RecordEvent;
use crate::saga::log::SagaLog;
use crate::saga::{SagaEvent, SagaId, SagaLogEntry, SagaState};
use crate::store::commit::{Commit, Expected};

impl Operator {
    pub(crate) async fn plan_saga(&self, deed: SagaAction, id: &SagaId, by: &Actor) -> Result<Plan, OperatorError> {
        let read = SagaLog::new(&*self.store, &Scope::of("")).read(id).await?;
        let (state, failed) = (read.saga.state, read.saga.failed());
        if read.saga.events == 0 {
            return Err(OperatorError::NotFound { what: "saga", key: id.to_string() });
        }
        let (SagaState::Stuck | SagaState::Compensating, Some(failed)) = (state, failed) else {
            let text = format!(
                "the saga {id} is {}: only a saga that is stuck or compensating takes an operator action",
                state.name()
            );
            return Err(OperatorError::Refused(text));
        };
        if by.reason.trim().is_empty() && deed != SagaAction::Retry {
            let text = format!(
                "give a reason that says what was done about the saga {id}: the audit trail keeps nothing else of it"
            );
            return Err(OperatorError::Refused(text));
        }
        let now_ms = self.clock.now_ms();
        let consumer = self.consumers.get(&failed.message_key.scope.processor);
        let life_ms =
            consumer.map_or(Options::default().record_life_ms(), |at_work| at_work.options().record_life_ms());
        let reason = by.reason.clone();
        let Some((step, _)) = read.saga.next_step() else {
            return Err(OperatorError::Refused(format!(
                "the saga {id} has no step left: it is about to end by itself"
            )));
        };
        let (event, of_record) = match deed {
            SagaAction::Retry => (SagaEvent::Retried { reason }, [RecordEvent::CompensationRetried].as_slice()),
            SagaAction::Skip => (SagaEvent::Skipped { step, reason }, [RecordEvent::CompensationRetried].as_slice()),
            // The record may not say yet that the saga is stuck.
            SagaAction::Resolve => (
                SagaEvent::Resolved { reason },
                [RecordEvent::CompensationResolved, RecordEvent::CompensationDone].as_slice(),
            ),
        };
        let entry = SagaLogEntry { event, at_ms: now_ms };
        let (shared, _) = read.append(&[entry], now_ms.saturating_add(life_ms)).expect("a stuck saga takes this event");
        let found = self.store.record(&failed.record).await?;
        let own = found.as_ref().filter(|record| record.is_of(&failed.record, &failed.message_key));
        let told = own.and_then(|record| {
            of_record.iter().find_map(|event| record.after_event(event.clone(), now_ms, life_ms).ok())
        });
        let commit = Commit {
            expected: Expected::of(found.map(|record| record.epoch)),
            record: told.into(),
            shared: Some(Box::new(shared)),
            ..Commit::of(&failed.record)
        };
        Ok(Plan { commit, redriven: None })
    }
}
