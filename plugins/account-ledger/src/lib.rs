//! A ledger with double entry: what one account gives another gets, so the sum of all stays zero.
//! Lets accounts go below zero: it keeps books, it grants no credit.

use hapax_sdk::{Context, Failure, Json, Outcome};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct Transfer {
    from: String,
    to: String,
    amount_cents: i64,
}

#[derive(Serialize)]
struct Booked {
    from_cents: i64,
    to_cents: i64,
}

/// Moves the amount from `account/<from>` to `account/<to>`.
#[hapax_sdk::processor]
fn transfer(transfer: Json<Transfer>, ctx: &mut Context) -> Result<Outcome, Failure> {
    let Json(Transfer { from, to, amount_cents }) = transfer;
    if amount_cents <= 0 {
        return Err(Failure::reject(format!("amount_cents must be positive, not {amount_cents}")));
    }
    book(ctx, &from, -amount_cents)?;
    // Read after the first entry was written: from an account to itself both entries count.
    let to_cents = book(ctx, &to, amount_cents)?;
    let from_cents = balance(ctx, &from)?;
    Outcome::json(&Booked { from_cents, to_cents })
}

/// Enters `change_cents` into one account; its new balance.
fn book(ctx: &Context, account: &str, change_cents: i64) -> Result<i64, Failure> {
    let overflow = || Failure::reject(format!("account {account} would overflow"));
    let after = balance(ctx, account)?.checked_add(change_cents).ok_or_else(overflow)?;
    ctx.state().set(&key(account), &after)?;
    Ok(after)
}

fn balance(ctx: &Context, account: &str) -> Result<i64, Failure> {
    Ok(ctx.state().get(&key(account))?.unwrap_or(0))
}

fn key(account: &str) -> String {
    format!("account/{account}")
}

#[cfg(test)]
mod tests {
    use hapax_sdk::testing::{Harness, MessageBuilder, message};

    use super::*;

    fn order(from: &str, to: &str, amount_cents: i64) -> MessageBuilder {
        let data = format!(r#"{{"from":"{from}","to":"{to}","amount_cents":{amount_cents}}}"#);
        message("transfer.ordered").data("application/json", data)
    }

    fn sum(ledger: &Harness) -> i64 {
        let texts = ledger.entries().into_iter().map(|(_, value)| String::from_utf8(value).expect("decimal text"));
        texts.map(|text| text.parse::<i64>().expect("decimal text")).sum()
    }

    #[test]
    fn what_one_gives_another_gets() {
        let mut ledger = Harness::new(transfer);
        let outcome = ledger.deliver(order("a", "b", 5)).expect("booked");
        assert_eq!(outcome.data(), br#"{"from_cents":-5,"to_cents":5}"#);
        ledger.deliver(order("b", "c", 2)).expect("booked");
        assert_eq!(ledger.state_text("account/a").as_deref(), Some("-5"));
        assert_eq!(ledger.state_text("account/b").as_deref(), Some("3"));
        assert_eq!(ledger.state_text("account/c").as_deref(), Some("2"));
        assert_eq!(sum(&ledger), 0);
    }

    #[test]
    fn to_itself_changes_nothing() {
        let mut ledger = Harness::new(transfer).state("account/a", "4").state("account/b", "-4");
        let outcome = ledger.deliver(order("a", "a", 5)).expect("booked");
        assert_eq!(outcome.data(), br#"{"from_cents":4,"to_cents":4}"#);
        assert_eq!(sum(&ledger), 0);
    }

    #[test]
    fn an_amount_that_is_not_positive_is_refused() {
        let mut ledger = Harness::new(transfer);
        for amount in [0, -5, i64::MIN] {
            let failure = ledger.deliver(order("a", "b", amount)).expect_err("refused");
            assert_eq!(failure, Failure::reject(format!("amount_cents must be positive, not {amount}")));
        }
        assert!(ledger.entries().is_empty());
    }

    #[test]
    fn an_overflow_leaves_neither_entry() {
        let (full, owed) = (i64::MAX.to_string(), (-i64::MAX).to_string());
        let mut ledger = Harness::new(transfer).state("account/b", &full).state("account/x", &owed);
        let failure = ledger.deliver(order("a", "b", 1)).expect_err("refused");
        assert_eq!(failure, Failure::reject("account b would overflow"));
        assert_eq!((ledger.state_text("account/a"), ledger.state_text("account/b")), (None, Some(full)));
        assert_eq!(sum(&ledger), 0);
    }
}
