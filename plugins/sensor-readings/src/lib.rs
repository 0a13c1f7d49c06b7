//! Readings of sensors, many in one call: what all of them need is read once, and each is kept or
//! refused by itself. Keeps no sums: messages of one call that change the same key make each other
//! run again.

use hapax_sdk::{Answers, Batch, Context, Failure, Json, Outcome};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct Reading {
    sensor: String,
    taken: String,
    tenths_celsius: i32,
}

#[derive(Serialize)]
struct Kept {
    key: String,
}

/// Keeps each reading under `reading/<sensor>/<when it was taken>`.
#[hapax_sdk::batch_processor]
fn keep(batch: Batch) -> Answers {
    // Worth its while once a call, and the same for every message of it.
    let plausible = -600..=850;
    batch.each(|reading: Json<Reading>, ctx: &mut Context| {
        let Json(Reading { sensor, taken, tenths_celsius }) = reading;
        if !plausible.contains(&tenths_celsius) {
            return Err(Failure::reject(format!("{tenths_celsius} tenths of a degree are not plausible")));
        }
        let key = format!("reading/{sensor}/{taken}");
        ctx.state().set(&key, &tenths_celsius)?;
        Outcome::json(&Kept { key })
    })
}

#[cfg(test)]
mod tests {
    use hapax_sdk::testing::{Harness, MessageBuilder, message};

    use super::*;

    fn reading(sensor: &str, tenths_celsius: i32) -> MessageBuilder {
        let data = format!(r#"{{"sensor":"{sensor}","taken":"noon","tenths_celsius":{tenths_celsius}}}"#);
        message("reading.taken").data("application/json", data)
    }

    #[test]
    fn one_bad_reading_does_not_keep_the_others_out() {
        let mut field = Harness::batches(keep);
        let results = field.deliver_all([reading("a", 215), reading("b", 9_999), reading("c", -40)]);
        assert!(results[0].is_ok() && results[2].is_ok());
        assert_eq!(results[1], Err(Failure::reject("9999 tenths of a degree are not plausible")));
        let keys: Vec<_> = field.entries().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["reading/a/noon", "reading/c/noon"]);
    }

    #[test]
    fn what_is_no_reading_is_answered_as_invalid() {
        let mut field = Harness::batches(keep);
        assert!(matches!(field.deliver(message("t").json(&1)), Err(Failure::Invalid(_))));
    }
}
