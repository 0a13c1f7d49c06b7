//! Accounts as event streams: what an account holds is the sum of what happened to it, and nothing
//! else is kept. Lets no account go below zero.

use hapax_sdk::{Context, Failure, Json, NewEvent, Outcome};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct Change {
    account: String,
    /// Below zero takes out.
    amount_cents: i64,
}

/// What every event of a stream says.
#[derive(Serialize, Deserialize)]
struct Happened {
    amount_cents: i64,
}

#[derive(Serialize)]
struct Account {
    balance_cents: i64,
    version: u64,
}

/// Decides by the account's whole stream whether the change may be, and appends it.
#[hapax_sdk::processor]
fn change(change: Json<Change>, ctx: &mut Context) -> Result<Outcome, Failure> {
    let Json(Change { account, amount_cents }) = change;
    let stream = format!("account/{account}");
    let Account { balance_cents, version } = account_of(ctx, &stream)?;
    let balance_cents = match balance_cents.checked_add(amount_cents) {
        _ if amount_cents == 0 => return Err(Failure::reject("a change of nothing")),
        Some(after) if after >= 0 => after,
        _ => return Err(Failure::reject(format!("account {account} holds {balance_cents} cents"))),
    };
    let kind = if amount_cents > 0 { "deposited" } else { "withdrawn" };
    let event = NewEvent::new(kind).json(&Happened { amount_cents })?;
    let version = ctx.events().append(&stream, Some(version), &[event])?;
    Outcome::json(&Account { balance_cents, version })
}

/// The account that the stream's events make.
fn account_of(ctx: &Context, stream: &str) -> Result<Account, Failure> {
    let mut account = Account { balance_cents: 0, version: 0 };
    for event in ctx.events().read(stream) {
        account.balance_cents += event.json::<Happened>()?.amount_cents;
        account.version = event.version();
    }
    Ok(account)
}

#[cfg(test)]
mod tests {
    use hapax_sdk::testing::{Harness, MessageBuilder, message};

    use super::*;

    fn wanted(account: &str, amount_cents: i64) -> MessageBuilder {
        let data = format!(r#"{{"account":"{account}","amount_cents":{amount_cents}}}"#);
        message("change.wanted").data("application/json", data)
    }

    #[test]
    fn the_stream_is_what_happened() {
        let mut bank = Harness::new(change);
        bank.deliver(wanted("a", 5)).expect("deposited");
        let outcome = bank.deliver(wanted("a", -2)).expect("withdrawn");
        assert_eq!(outcome.data(), br#"{"balance_cents":3,"version":2}"#);
        let kinds: Vec<_> = bank.events("account/a").iter().map(|event| event.kind().to_owned()).collect();
        assert_eq!(kinds, ["deposited", "withdrawn"]);
        assert!(bank.entries().is_empty(), "nothing is kept beside the events");
    }

    #[test]
    fn what_may_not_be_leaves_no_event() {
        let mut bank = Harness::new(change);
        bank.deliver(wanted("a", 5)).expect("deposited");
        for amount in [0, -6, i64::MIN] {
            assert!(matches!(bank.deliver(wanted("a", amount)), Err(Failure::Reject(_))), "{amount}");
        }
        assert_eq!(bank.events("account/a").len(), 1);
    }
}
