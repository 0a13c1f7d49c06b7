//! Actions on the keys or the filter that an operator selected: redrive, discard, evict, resume a
//! saga. A dry run only checks them.

use hapax_core::{
    Actor, Clock as _, HoldKind, OperatorAction, OperatorError, OutboxAction, RefusedMessage, SagaAction, SystemClock,
    fault,
};
use hapax_transport::{HeldFilter, RequestError, Selection};
use serde_json::{Value, json};

use super::held_messages::{self, Wanted};
use super::{Ops, outbox, records, refusal, sagas};

/// Maximum number of keys in one order.
const KEYS_MAX: usize = 10_000;

impl Ops {
    pub(super) async fn redrive(&self, chosen: &Selection) -> Result<Value, RequestError> {
        self.perform_on_held("redrive", chosen, OperatorAction::Redrive).await
    }

    pub(super) async fn discard(&self, chosen: &Selection) -> Result<Value, RequestError> {
        self.perform_on_held("discard", chosen, OperatorAction::Discard).await
    }

    pub(super) async fn on_records(
        &self,
        verb: &str,
        chosen: &Selection,
        action_on: fn(hapax_core::RecordKey) -> OperatorAction,
    ) -> Result<Value, RequestError> {
        if chosen.filter.is_some() {
            return Err(RequestError::Invalid("records are named by their keys, not by a filter".into()));
        }
        check(chosen)?;
        let keys = chosen.keys.iter().map(|key| records::parse_key(key)).collect::<Result<Vec<_>, _>>()?;
        self.perform_chosen(verb, chosen, keys.into_iter().map(action_on).collect(), false).await
    }

    pub(super) async fn resume(&self, action: SagaAction, chosen: &Selection) -> Result<Value, RequestError> {
        if chosen.filter.is_some() {
            return Err(RequestError::Invalid("sagas are named by their ids, not by a filter".into()));
        }
        check(chosen)?;
        let ids = chosen.keys.iter().map(|id| sagas::parse_id(id)).collect::<Result<Vec<_>, _>>()?;
        let actions = ids.into_iter().map(|id| OperatorAction::Saga(action, id)).collect();
        self.perform_chosen(action.name(), chosen, actions, false).await
    }

    /// Acts on refused messages, in the order in which they were sent first.
    pub(super) async fn on_refused(&self, action: OutboxAction, chosen: &Selection) -> Result<Value, RequestError> {
        check(chosen)?;
        let (ids, more) = match &chosen.filter {
            Some(filter) => self.find_refused(filter).await?,
            None => (chosen.keys.clone(), false),
        };
        let verb = if action == OutboxAction::Redrive { "redrive" } else { "discard" };
        let actions = ids.into_iter().map(|id| OperatorAction::Outbox(action, id)).collect();
        self.perform_chosen(verb, chosen, actions, more).await
    }

    /// Returns the ids of the refused messages that a filter selects, the one sent first first, and
    /// true if more remain.
    async fn find_refused(&self, filter: &HeldFilter) -> Result<(Vec<String>, bool), RequestError> {
        let limit = filter.done()?;
        not_for_orders(filter)?;
        let mut found = Vec::new();
        let take = |letter: RefusedMessage| {
            found.push((letter.position, letter.id));
            true
        };
        outbox::Wanted::by(filter, SystemClock.now_ms())?.each(&*self.store, take).await?;
        found.sort();
        let more = found.len() > limit;
        Ok((found.into_iter().take(limit).map(|(_, id)| id).collect(), more))
    }

    async fn perform_on_held(
        &self,
        verb: &str,
        chosen: &Selection,
        action_on: fn(hapax_core::HeldKey) -> OperatorAction,
    ) -> Result<Value, RequestError> {
        check(chosen)?;
        let (keys, more) = match &chosen.filter {
            Some(filter) => self.find(filter).await?,
            None => (chosen.keys.iter().map(|key| held_messages::parse_key(key)).collect::<Result<_, _>>()?, false),
        };
        self.perform_chosen(verb, chosen, keys.into_iter().map(action_on).collect(), more).await
    }

    /// Returns the keys of the held messages that a filter selects, the earliest first, and true if
    /// more remain.
    async fn find(&self, filter: &HeldFilter) -> Result<(Vec<hapax_core::HeldKey>, bool), RequestError> {
        let limit = filter.done()?;
        not_for_orders(filter)?;
        // Waiting messages run by themselves: a filter selects them only if it names their hold
        // reason.
        let filter = HeldFilter { hold_reason: filter.hold_reason.or(Some(HoldKind::Dead)), ..filter.clone() };
        let mut found = Vec::new();
        let take = |key, held_message: hapax_core::HeldMessage| {
            found.push((held_message.at_ms, key));
            true
        };
        Wanted::by(&filter, SystemClock.now_ms())?.each(&*self.store, take).await?;
        found.sort();
        let more = found.len() > limit;
        Ok((found.into_iter().take(limit).map(|(_, key)| key).collect(), more))
    }

    async fn perform_chosen(
        &self,
        verb: &str,
        chosen: &Selection,
        actions: Vec<OperatorAction>,
        more: bool,
    ) -> Result<Value, RequestError> {
        let by = Actor { actor: chosen.actor.clone(), reason: chosen.reason.clone() };
        let results = if chosen.dry_run && !fault::mutated("dry-run-does-it") {
            let mut results = Vec::new();
            for action in &actions {
                results.push(self.operator.check(action, &by).await);
            }
            results
        } else {
            self.operator.perform_all(&actions, &by).await
        };
        let (mut done, mut refused) = (Vec::new(), Vec::new());
        for (action, result) in actions.iter().zip(results) {
            match result {
                Ok(()) => done.push(action.key()),
                // The refusal of a single key is the answer. A store that has failed would refuse
                // every other key too.
                Err(error) if chosen.keys.len() == 1 => return Err(refusal(error)),
                Err(error @ OperatorError::Store(_)) if done.is_empty() => return Err(refusal(error)),
                Err(error) => refused.push(json!({ "key": action.key(), "error": refusal(error).to_string() })),
            }
        }
        Ok(json!({ "action": verb, "dry_run": chosen.dry_run, "done": done, "refused": refused, "more": more }))
    }
}

fn not_for_orders(filter: &HeldFilter) -> Result<(), RequestError> {
    match filter.after {
        Some(_) => Err(RequestError::Invalid("after: this field is for lists only".into())),
        None => Ok(()),
    }
}

fn check(chosen: &Selection) -> Result<(), RequestError> {
    let wrong = |text: &str| Err(RequestError::Invalid(text.to_owned()));
    match (chosen.keys.len(), &chosen.filter) {
        (0, None) => return wrong("give `keys`, or a `filter` ({} selects every dead message)"),
        (1.., Some(_)) => return wrong("give `keys` or a `filter`, not both"),
        (count, _) if count > KEYS_MAX => return wrong(&format!("{count} keys are more than {KEYS_MAX} at one time")),
        _ => {}
    }
    if chosen.actor.trim().is_empty() && !chosen.dry_run {
        return wrong("actor: give your name, for the audit trail");
    }
    Ok(())
}
