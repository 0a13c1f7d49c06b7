//! Takes orders: adds each to its customer's balance and announces it. Refuses what is not worth
//! anything.

use hapax_sdk::{Context, Failure, Message, Outcome, Outgoing};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct Order {
    order_id: String,
    customer: String,
    amount_cents: i64,
}

#[derive(Serialize)]
struct Taken<'a> {
    order_id: &'a str,
    balance_cents: i64,
}

/// Adds the order to `balance/<customer>` and sends `order.accepted` with the order's own data.
#[hapax_sdk::processor]
fn take_order(message: Message, ctx: &mut Context) -> Result<Outcome, Failure> {
    let order: Order = message.json()?;
    if order.amount_cents <= 0 {
        return Err(Failure::reject(format!("amount_cents must be positive, not {}", order.amount_cents)));
    }
    let key = format!("balance/{}", order.customer);
    let before: i64 = ctx.state().get(&key)?.unwrap_or(0);
    let overflow = || Failure::reject(format!("the balance of {} would overflow", order.customer));
    let balance_cents = before.checked_add(order.amount_cents).ok_or_else(overflow)?;
    ctx.state().set(&key, &balance_cents)?;
    ctx.send(Outgoing::new("order.accepted").data("application/json", message.data()));
    Outcome::json(&Taken { order_id: &order.order_id, balance_cents })
}

#[cfg(test)]
mod tests {
    use hapax_sdk::testing::{Harness, MessageBuilder, message};

    use super::*;

    fn order(customer: &str, amount_cents: i64) -> MessageBuilder {
        let data = format!(r#"{{"order_id":"o-1", "customer":"{customer}", "amount_cents":{amount_cents}}}"#);
        message("order.placed").data("application/json", data)
    }

    #[test]
    fn the_amount_is_added_to_the_customers_balance() {
        let mut shop = Harness::new(take_order).state("balance/c-1", "5");
        let outcome = shop.deliver(order("c-1", 1200)).expect("taken");
        assert_eq!(outcome.data(), br#"{"order_id":"o-1","balance_cents":1205}"#);
        shop.deliver(order("c-2", 7)).expect("taken");
        assert_eq!(shop.state_text("balance/c-1").as_deref(), Some("1205"));
        assert_eq!(shop.state_text("balance/c-2").as_deref(), Some("7"));
    }

    #[test]
    fn the_order_goes_out_as_it_came_in() {
        let mut shop = Harness::new(take_order);
        let order = order("c-1", 1200).attribute("datacontenttype", "application/json; charset=utf-8");
        shop.deliver(order.clone()).expect("taken");
        let data = Message::from(order).data().to_vec();
        assert_eq!(shop.sent(), [Outgoing::new("order.accepted").data("application/json", data)]);
    }

    #[test]
    fn an_amount_that_is_not_positive_is_refused() {
        let mut shop = Harness::new(take_order);
        for amount in [0, -1, i64::MIN] {
            let failure = shop.deliver(order("c-1", amount)).expect_err("refused");
            assert_eq!(failure, Failure::reject(format!("amount_cents must be positive, not {amount}")));
        }
        assert!(shop.entries().is_empty() && shop.sent().is_empty());
    }

    #[test]
    fn a_balance_that_would_overflow_is_refused() {
        let full = i64::MAX.to_string();
        let mut shop = Harness::new(take_order).state("balance/c-1", &full);
        let failure = shop.deliver(order("c-1", 1)).expect_err("refused");
        assert_eq!(failure, Failure::reject("the balance of c-1 would overflow"));
        assert_eq!(shop.state_text("balance/c-1"), Some(full));
    }

    #[test]
    fn what_is_no_order_names_the_field() {
        let mut shop = Harness::new(take_order);
        let wrong =
            message("order.placed").data("application/json", r#"{"order_id":"o","customer":"c","amount_cents":"1"}"#);
        let failure = shop.deliver(wrong).expect_err("invalid");
        assert!(matches!(&failure, Failure::Invalid(reason) if reason.starts_with("data.amount_cents: ")), "{failure}");
    }
}
