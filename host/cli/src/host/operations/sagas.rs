//! Sagas as JSON: lists, and one saga with its messages, steps and log. Reads only.

use base64::Engine as _;
use hapax_core::{Member, SagaEvent, SagaId, SagaListing, SagaLog, SagaLogEntry, SagaState, Scope, Step, Store};
use hapax_transport::{RequestError, SagaFilter};
use serde_json::{Value, json};

use super::{PAGE, failed};

pub(super) fn parse_id(text: &str) -> Result<SagaId, RequestError> {
    text.parse().map_err(|error: hapax_core::InvalidSagaName| RequestError::Invalid(error.to_string()))
}

fn log(store: &dyn Store) -> SagaLog {
    SagaLog::new(store, &Scope::of(""))
}

pub(super) async fn list(store: &dyn Store, filter: &SagaFilter) -> Result<Value, RequestError> {
    let (limit, log) = (filter.listed()?, log(store));
    let wanted = filter.state;
    // Unsettled sagas have an index of their own: it finds them among any number of others.
    let unsettled = matches!(wanted, Some(SagaState::Compensating | SagaState::Stuck));
    let mut after = filter.after.as_deref().map(parse_id).transpose()?;
    let mut found: Vec<SagaListing> = Vec::new();
    while found.len() <= limit {
        let page =
            if unsettled { log.unsettled(after.as_ref(), PAGE).await } else { log.list(after.as_ref(), PAGE).await };
        let page = page.map_err(failed)?;
        let Some(last) = page.last() else { break };
        after = Some(last.id.clone());
        found.extend(page.into_iter().filter(|saga| wanted.is_none_or(|wanted| wanted == saga.state)));
    }
    let next = (found.len() > limit).then(|| found[limit - 1].id.to_string());
    found.truncate(limit);
    let as_json = |saga: &SagaListing| json!({ "id": saga.id.to_string(), "state": saga.state.name(), "changed_ms": saga.changed_ms });
    Ok(json!({ "sagas": found.iter().map(as_json).collect::<Vec<_>>(), "next": next }))
}

pub(super) async fn show(store: &dyn Store, text: &str) -> Result<Value, RequestError> {
    let (id, log) = (parse_id(text)?, log(store));
    let saga = log.read(&id).await.map_err(failed)?.saga;
    if saga.events == 0 {
        return Err(RequestError::NotFound(format!("there is no saga {id}; `hapax saga list` shows every saga")));
    }
    let events = log.events(&id).await.map_err(failed)?;
    let failure = saga.failure.as_ref().map(|(member, error)| json!({ "member": member, "error": error }));
    Ok(json!({
        "id": id.to_string(), "state": saga.state.name(), "changed_ms": saga.changed_ms, "failure": failure,
        "members": saga.members.iter().map(member).collect::<Vec<_>>(),
        "steps": saga.steps.iter().map(step).collect::<Vec<_>>(),
        "log": events.iter().map(event).collect::<Vec<_>>(),
    }))
}

fn member(member: &Member) -> Value {
    json!({
        "record": member.record.to_string(), "processor": member.message_key.scope.processor, "source": member.message.source,
        "id": member.message.id, "component": member.component,
    })
}

fn step(step: &Step) -> Value {
    let mut shown = json!({
        "name": step.name, "member": step.member, "standing": step.state.name(), "attempts": step.attempts,
        "due_ms": step.due_ms, "error": step.error,
    });
    let (name, payload) = payload(&step.payload);
    shown[name] = json!(payload);
    shown
}

/// Returns text, or base64 if the payload is not UTF-8, under a name that tells them apart.
fn payload(bytes: &[u8]) -> (&'static str, String) {
    match std::str::from_utf8(bytes) {
        Ok(text) => ("payload", text.to_owned()),
        Err(_) => ("payload_base64", base64::engine::general_purpose::STANDARD.encode(bytes)),
    }
}

fn event(entry: &SagaLogEntry) -> Value {
    let mut event = json!({ "event": entry.event.name(), "at_ms": entry.at_ms });
    match &entry.event {
        SagaEvent::Joined(member) => event["record"] = json!(member.record.to_string()),
        SagaEvent::Registered { member, step, .. } | SagaEvent::StepRegistered { member, step, .. } => {
            event["member"] = json!(member);
            event["name"] = json!(step);
        }
        SagaEvent::PivotPassed { member } | SagaEvent::Reopened { member } => event["member"] = json!(member),
        SagaEvent::CompensationStarted { member, error } => {
            event["member"] = json!(member);
            event["error"] = json!(error);
        }
        SagaEvent::Compensated { step } => event["step"] = json!(step),
        SagaEvent::CompensationFailed { step, error, retry_at_ms } => {
            event["step"] = json!(step);
            event["error"] = json!(error);
            event["retry_at_ms"] = json!(retry_at_ms);
        }
        SagaEvent::Stuck { step, error } => {
            event["step"] = json!(step);
            event["error"] = json!(error);
        }
        SagaEvent::Skipped { step, reason } => {
            event["step"] = json!(step);
            event["reason"] = json!(reason);
        }
        SagaEvent::Retried { reason } | SagaEvent::Resolved { reason } => event["reason"] = json!(reason),
        SagaEvent::Completed | SagaEvent::Ended => {}
    }
    event
}
