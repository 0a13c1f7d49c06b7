//! Books a trip, a message a part: flight, hotel, car, and a confirmation. The messages of a trip
//! are one saga: if one part cannot be had, all that was booked for the trip is cancelled, the last
//! booking first.

use hapax_sdk::{Context, Failure, Json, Message, Outcome, Outgoing};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Deserialize, Serialize)]
struct Part {
    trip: String,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
struct Booking {
    trip: String,
    kind: String,
}

/// Books what the message's type names; `trip.confirm` completes the trip.
#[hapax_sdk::processor(compensations(cancel))]
fn travel(message: Message, ctx: &mut Context) -> Result<Outcome, Failure> {
    let Part { trip } = message.json()?;
    ctx.saga().join(&trip);
    let kind = message.kind().strip_prefix("trip.").unwrap_or_default();
    match kind {
        "flight" | "hotel" | "car" => book(ctx, Booking { trip, kind: kind.to_owned() }),
        "confirm" => {
            ctx.saga().complete();
            ctx.send(Outgoing::new("trip.confirmed").subject(&trip));
            Outcome::json(&"confirmed")
        }
        other => Err(Failure::invalid(format!("`{other}` is no part of a trip"))),
    }
}

fn book(ctx: &mut Context, booking: Booking) -> Result<Outcome, Failure> {
    ctx.saga().step("book", &booking)?;
    let status = call(ctx, "/bookings", &booking, &[])?;
    match status {
        200..=299 => Outcome::json(&booking.kind),
        400..=499 => Err(Failure::reject(format!("no {} for {}", booking.kind, booking.trip))),
        status => Err(Failure::retry(format!("the booking is answered with {status}"))),
    }
}

#[hapax_sdk::compensation("book")]
fn cancel(booking: Json<Booking>, ctx: &mut Context) -> Result<(), Failure> {
    // The agency knows the booking by the key of the call that made it.
    let key = ctx.saga().step_key().unwrap_or_default().to_owned();
    match call(ctx, "/bookings/cancel", &booking, &[("booking-key", &key)])? {
        200..=299 | 404 => {
            let Booking { trip, kind } = &*booking;
            ctx.send(Outgoing::new("trip.cancelled").subject(trip).json(kind)?);
            Ok(())
        }
        status => Err(Failure::retry(format!("the cancellation is answered with {status}"))),
    }
}

fn call(ctx: &mut Context, path: &str, booking: &Booking, headers: &[(&str, &str)]) -> Result<u16, Failure> {
    let service = ctx.config("service").ok_or_else(|| Failure::reject("the setting `service`, a URL, is missing"))?;
    let mut call = ctx.http().post(format!("{service}{path}")).json(booking)?;
    for (name, value) in headers {
        call = call.header(name, *value);
    }
    Ok(call.send()?.status)
}

#[cfg(test)]
mod tests {
    use hapax_sdk::testing::{Harness, MessageBuilder, message};
    use hapax_sdk::{Request, Response};

    use super::*;

    fn agency() -> Harness {
        let full = |request: &Request| {
            let body = String::from_utf8_lossy(&request.body);
            let status = if request.url.ends_with("/bookings") && body.contains("car") { 409 } else { 200 };
            Ok(Response { status, ..Response::default() })
        };
        Harness::new(travel).config("service", "http://agency").compensation("book", cancel).http(full)
    }

    fn part(kind: &str, trip: &str) -> MessageBuilder {
        message(&format!("trip.{kind}")).id(&format!("{trip}-{kind}")).json(&Part { trip: trip.into() })
    }

    fn cancelled(agency: &Harness) -> Vec<String> {
        agency.sent().iter().map(|sent| String::from_utf8_lossy(sent.bytes()).into_owned()).collect()
    }

    #[test]
    fn a_part_that_cannot_be_had_cancels_the_whole_trip() {
        let mut agency = agency();
        agency.deliver(part("flight", "rome")).expect("booked");
        agency.deliver(part("flight", "oslo")).expect("booked");
        agency.deliver(part("hotel", "rome")).expect("booked");
        assert!(matches!(agency.deliver(part("car", "rome")), Err(Failure::Reject(_))));
        assert_eq!(agency.undone().len(), 3);
        assert_eq!(cancelled(&agency), ["\"car\"", "\"hotel\"", "\"flight\""]);
    }

    #[test]
    fn a_confirmed_trip_is_not_undone_any_more() {
        let mut agency = agency();
        agency.deliver(part("flight", "rome")).expect("booked");
        agency.deliver(part("confirm", "rome")).expect("confirmed");
        assert!(agency.deliver(part("car", "rome")).is_err());
        assert_eq!(agency.undone().len(), 1, "the car's own");
    }
}
