//! Operator actions on outgoing messages that their destination refused. Each is one commit: the
//! dead letter, the message's return to the outbox and the line in the audit trail of the processor
//! that sent it.

use crate::message::key::{RecordKey, Scope};
use crate::operator::{Operator, OperatorError, OutboxAction, Plan};
use crate::outbox::RefusedMessages;
use crate::store::commit::Commit;

impl Operator {
    pub(crate) async fn plan_outbox(&self, deed: OutboxAction, id: &str) -> Result<Plan, OperatorError> {
        let refused = RefusedMessages::new(&*self.store);
        let absent = || OperatorError::NotFound { what: "refused message", key: id.to_owned() };
        let read = refused.read(id).await?.ok_or_else(absent)?;
        let (shared, requeued) = match deed {
            OutboxAction::Discard => (read.discarded(), None),
            OutboxAction::Redrive => {
                // Both are written in one commit: the message is gone only if the other is.
                let message = refused.message(&read.letter).await?.ok_or_else(absent)?;
                (read.redriven(), Some(Box::new(read.requeued(message))))
            }
        };
        let key = RecordKey::new(Scope::of(&read.letter.processor), "outbox".into(), id.into());
        Ok(Plan { commit: Commit { shared: Some(Box::new(shared)), requeued, ..Commit::of(&key) }, redriven: None })
    }
}
