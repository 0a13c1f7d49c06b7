//! Messages that kill the host: the real binary dies every time it runs one of them, is started
//! again, and ends by itself after the limit of attempts, with the guilty dead-lettered and
//! everybody else completed once.
//!
//! Proves G28.

use std::collections::{BTreeMap, BTreeSet};

use hapax_tests::process::{Job, hapax};
use serde_json::Value;

const ATTEMPTS_MAX: u32 = 5;

fn order(number: usize) -> String {
    format!(
        r#"{{"specversion":"1.0","id":"o-{number}","source":"/shop","type":"order.placed","data":{{"order_id":"o-{number}","customer":"{}","amount_cents":{}}}}}"#,
        number % 4,
        number + 1
    ) + "\n"
}

/// Starts the host until it ends by itself; answers how often it died.
fn deaths(job: &mut Job, guilty: &[usize], at_most: u32) -> u32 {
    let ids: Vec<_> = guilty.iter().map(|number| format!("o-{number}")).collect();
    let fault = format!("running={}", ids.join(","));
    let mut deaths = 0;
    while !job.run(Some(&fault)) {
        deaths += 1;
        assert!(deaths <= at_most, "died {deaths} times over {guilty:?}");
    }
    deaths
}

fn expected(count: usize, guilty: &[usize]) -> (BTreeSet<String>, BTreeMap<String, i64>) {
    let (mut ids, mut state) = (BTreeSet::new(), BTreeMap::new());
    for number in (0..count).filter(|number| !guilty.contains(number)) {
        ids.insert(format!("o-{number}"));
        *state.entry(format!("balance/{}", number % 4)).or_default() += number as i64 + 1;
    }
    (ids, state)
}

fn record(job: &Job, number: usize) -> Value {
    let output = hapax()
        .args(["records", "show", "--json", "--store"])
        .arg(job.store())
        .arg(format!("default/order-intake/%2Fshop/o-{number}"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn they_end_dead_lettered(guilty: &[usize], concurrency: &str) {
    const ORDERS: usize = 120;
    let text: String = (0..ORDERS).map(order).collect();
    let mut job = Job::new("order-intake", &text);
    job.arguments = ["--concurrency", concurrency].map(str::to_owned).to_vec();
    let guilty_count = guilty.len() as u32;
    let most = ATTEMPTS_MAX * guilty_count;
    let died = deaths(&mut job, guilty, most);
    // Several may be running at the first death, which counts for each of them. From then on they
    // run one at a time.
    let least = most - (guilty_count - 1);
    assert!((least..=most).contains(&died), "{died} deaths: each is tried as often as it may be, and no more");
    let (ids, state) = expected(ORDERS, guilty);
    assert_eq!(job.faults(&ids, &state, true), [""; 0], "{guilty:?}");
    for number in guilty {
        let record = record(&job, *number).to_string();
        let words = format!("the host died {ATTEMPTS_MAX} times while it ran this message");
        assert!(record.contains("dead-lettered") && record.contains(&words), "{record}");
    }
    // They stay where they are: nothing is run again, and nobody dies.
    assert!(job.run(Some(&format!("running=o-{}", guilty[0]))));
    assert_eq!(job.faults(&ids, &state, true), [""; 0]);
}

#[test]
fn a_message_that_kills_the_host_ends_dead_lettered() {
    they_end_dead_lettered(&[7], "1");
}

#[test]
fn a_message_that_kills_the_host_among_64_ends_dead_lettered() {
    they_end_dead_lettered(&[70], "64");
}

#[test]
fn several_messages_that_kill_the_host_take_nobody_with_them() {
    they_end_dead_lettered(&[3, 60, 61, 119], "64");
}
