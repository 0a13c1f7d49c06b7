//! Sells an order in three steps outside the transaction: reserves the stock, charges the card,
//! books the shipment. Each step has its way back; what fails for good is undone, the last step
//! first.

use hapax_sdk::{Context, Failure, HttpError, Json, Message, Outcome, Outgoing, Response};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Deserialize, Serialize)]
struct Order {
    order_id: String,
    card: String,
    amount_cents: u64,
}

/// Reserves, charges and ships; then `order.confirmed` goes out. A service that refuses fails the
/// order for good.
#[hapax_sdk::processor(compensations(release, refund, cancel))]
fn sell(message: Message, ctx: &mut Context) -> Result<Outcome, Failure> {
    let order: Order = message.json()?;
    ctx.saga().step("reserve", &order)?;
    post(ctx, "/reservations", &order)?;
    ctx.saga().step("charge", &order)?;
    post(ctx, "/charges", &order)?;
    ctx.saga().step("ship", &order)?;
    post(ctx, "/shipments", &order)?;
    ctx.state().set(&format!("order/{}", order.order_id), "confirmed")?;
    ctx.send(Outgoing::new("order.confirmed").subject(&order.order_id).json(&order)?);
    Outcome::json(&"confirmed")
}

#[hapax_sdk::compensation("reserve")]
fn release(order: Json<Order>, ctx: &mut Context) -> Result<(), Failure> {
    undo(ctx, "/reservations/release", &order)?;
    ctx.state().set(&format!("order/{}", order.order_id), "undone")?;
    Ok(())
}

#[hapax_sdk::compensation("charge")]
fn refund(order: Json<Order>, ctx: &mut Context) -> Result<(), Failure> {
    undo(ctx, "/charges/refund", &order)
}

#[hapax_sdk::compensation("ship")]
fn cancel(order: Json<Order>, ctx: &mut Context) -> Result<(), Failure> {
    undo(ctx, "/shipments/cancel", &order)
}

/// A step. A refusal is for good; what may pass is tried again, under the same idempotency key.
fn post(ctx: &mut Context, path: &str, order: &Order) -> Result<(), Failure> {
    let answer = call(ctx, path, order)?;
    match answer.status {
        200..=299 => Ok(()),
        400..=499 if !matches!(answer.status, 408 | 425 | 429) => {
            Err(Failure::reject(format!("{path} refuses with {}: {}", answer.status, answer.text())))
        }
        status => Err(Failure::retry(format!("{path} answers {status}"))),
    }
}

/// The way back of a step. That there is nothing to undo is fine: the step was registered and never
/// taken.
fn undo(ctx: &mut Context, path: &str, order: &Order) -> Result<(), Failure> {
    match call(ctx, path, order)?.status {
        200..=299 | 404 => Ok(()),
        status => Err(Failure::retry(format!("{path} answers {status}"))),
    }
}

fn call(ctx: &mut Context, path: &str, order: &Order) -> Result<Response, Failure> {
    let service = ctx.config("service").ok_or_else(|| Failure::reject("the setting `service`, a URL, is missing"))?;
    let answer = ctx.http().post(format!("{service}{path}")).json(order)?.send();
    answer.map_err(|error: HttpError| error.into())
}

#[cfg(test)]
mod tests {
    use hapax_sdk::Request;
    use hapax_sdk::testing::{Harness, MessageBuilder, message};

    use super::*;

    fn shop(answer: impl Fn(&str) -> u16 + 'static) -> Harness {
        Harness::new(sell)
            .config("service", "http://service")
            .compensation("reserve", release)
            .compensation("charge", refund)
            .compensation("ship", cancel)
            .http(move |request: &Request| {
                Ok(Response { status: answer(request.url.trim_start_matches("http://service")), ..Response::default() })
            })
    }

    fn order() -> MessageBuilder {
        message("order.placed").json(&Order { order_id: "o-1".into(), card: "c".into(), amount_cents: 5 })
    }

    #[test]
    fn an_order_is_reserved_charged_and_shipped() {
        let mut shop = shop(|_| 200);
        assert_eq!(shop.deliver(order()), Outcome::json(&"confirmed"));
        assert_eq!(shop.state_text("order/o-1").as_deref(), Some("\"confirmed\""));
        assert_eq!(shop.sent()[0].kind(), "order.confirmed");
        assert_eq!(shop.undone(), [""; 0]);
    }

    #[test]
    fn what_cannot_be_shipped_is_undone_the_last_step_first() {
        let mut shop = shop(|path| if path == "/shipments" { 422 } else { 200 });
        assert!(matches!(shop.deliver(order()), Err(Failure::Reject(_))));
        assert_eq!(shop.undone(), ["ship", "charge", "reserve"]);
        assert_eq!(shop.state_text("order/o-1").as_deref(), Some("\"undone\""));
        assert_eq!(shop.sent(), []);
    }

    #[test]
    fn what_may_pass_is_tried_again_and_nothing_is_undone() {
        let mut shop = shop(|path| if path == "/charges" { 503 } else { 200 });
        assert!(matches!(shop.deliver(order()), Err(Failure::Retry { .. })));
        assert_eq!(shop.undone(), [""; 0]);
    }

    #[test]
    fn a_charge_that_never_happened_is_undone_by_doing_nothing() {
        let mut shop = shop(|path| match path {
            "/charges" => 402,
            "/charges/refund" => 404,
            _ => 200,
        });
        assert!(matches!(shop.deliver(order()), Err(Failure::Reject(_))));
        assert_eq!(shop.undone(), ["charge", "reserve"]);
    }
}
