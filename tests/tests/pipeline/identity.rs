//! Identity of messages: which bodies are one, and which keys are two. The reference for numbers is
//! arithmetic on strings of digits; the one for bodies, a tree that is spelled in many ways.

use std::collections::{BTreeMap, HashMap};

use hapax_core::{
    Commit, Expected, Fields, Fingerprint, GapPolicy, HeldChange, HeldMessage, HoldReason, IdempotencyStorage as _,
    Inspect as _, Message, Outbox as _, Outcome, Position, Record, RecordChange, RecordKey, Scope, Select,
    StoredOutcome, Strategy, SystemClock,
};
use hapax_tests::bench::message;
use hapax_tests::random::Random;
use proptest::prelude::*;
use proptest::strategy::Strategy as _;

use super::strategies::{House, at, is_completed, strict};

fn fingerprint(data: &str) -> Fingerprint {
    Fingerprint::of(&message("m", data))
}

// Numbers.

/// Places before and behind the point: more than a spelling here has.
const PLACES: usize = 100;

/// The number written out with all its places: equal numbers have equal texts, and no others.
fn written_out(number: &str) -> String {
    let unsigned = number.trim_start_matches('-');
    let (mantissa, exponent) = unsigned.split_once(['e', 'E']).unwrap_or((unsigned, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let point = PLACES as i64 - exponent.parse::<i64>().unwrap();
    let digits = format!("{whole}{fraction}");
    let first = usize::try_from(point - whole.len() as i64).unwrap();
    let mut places = format!("{}{digits}", "0".repeat(first));
    places += &"0".repeat(2 * PLACES - places.len());
    let sign = if number.starts_with('-') && places.contains(|digit| digit != '0') { "-" } else { "" };
    format!("{sign}{places}")
}

/// A JSON number of up to 23 digits before the point and behind it.
fn number() -> impl proptest::strategy::Strategy<Value = String> {
    let digits = prop_oneof!["[0-9]{1,23}", "[01]{1,3}", "1[0]{0,22}[1]?"];
    (any::<bool>(), digits.clone(), proptest::option::of(digits), proptest::option::of(-25..25i64)).prop_map(
        |(negative, whole, fraction, exponent)| {
            let whole = whole.trim_start_matches('0');
            let whole = if whole.is_empty() { "0" } else { whole };
            let fraction = fraction.map_or_else(String::new, |fraction| format!(".{fraction}"));
            let exponent = exponent.map_or_else(String::new, |exponent| format!("e{exponent}"));
            format!("{}{whole}{fraction}{exponent}", if negative { "-" } else { "" })
        },
    )
}

/// Writes the same number in another way.
fn respelled(number: &str, random: &mut Random) -> String {
    let (sign, unsigned) = number.strip_prefix('-').map_or(("", number), |unsigned| ("-", unsigned));
    let (mantissa, exponent) = unsigned.split_once('e').unwrap_or((unsigned, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let mut digits = format!("{whole}{fraction}{}", "0".repeat(random.below(3) as usize));
    let point = random.below(digits.len() as u64) as usize + 1;
    let moved = exponent.parse::<i64>().unwrap() + whole.len() as i64 - point as i64;
    let fraction = digits.split_off(point);
    let whole = digits.trim_start_matches('0');
    let whole = if whole.is_empty() { "0" } else { whole };
    let fraction = if fraction.is_empty() { fraction } else { format!(".{fraction}") };
    let exponent = match random.below(4) {
        0 if moved == 0 => String::new(),
        1 if moved >= 0 => format!("e+{moved}"),
        2 if moved >= 0 => format!("E0{moved}"),
        _ => format!("e{moved}"),
    };
    format!("{sign}{whole}{fraction}{exponent}")
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    /// Proves G133.
    #[test]
    fn numbers_are_equal_only_if_their_exact_values_are(one in number(), other in number(), seed: u64) {
        let mut random = Random::of(seed);
        let again = respelled(&one, &mut random);
        prop_assert_eq!(written_out(&one), written_out(&again), "the test spells it wrongly: {} {}", one, again);
        // One digit of it changed, or another number altogether.
        let place = random.below(one.len() as u64) as usize;
        let digit = (b'1' + random.below(9) as u8) as char;
        let mut changed = one.clone();
        if changed.as_bytes()[place].is_ascii_digit() && !changed[..place].contains('e') {
            changed.replace_range(place..=place, &digit.to_string());
        }
        for spelling in [&again, &changed, &other] {
            let are_equal = written_out(&one) == written_out(spelling);
            prop_assert_eq!(fingerprint(&one) == fingerprint(spelling), are_equal, "{} {}", one, spelling);
            let [in_one, in_other] = [&one, spelling].map(|number| fingerprint(&format!(r#"{{"a":[{number}]}}"#)));
            prop_assert_eq!(in_one == in_other, are_equal, "{} {}", one, spelling);
        }
    }
}

// Bodies.

#[derive(Debug, Clone, PartialEq)]
enum Json {
    Literal(&'static str),
    Number(String),
    Text(String),
    Array(Vec<Json>),
    Object(BTreeMap<String, Json>),
}

impl Json {
    /// The tree with its numbers written out, so that trees of equal values are equal.
    fn value(&self) -> Self {
        match self {
            Self::Number(number) => Self::Number(written_out(number)),
            Self::Array(items) => Self::Array(items.iter().map(Self::value).collect()),
            Self::Object(members) => {
                Self::Object(members.iter().map(|(name, member)| (name.clone(), member.value())).collect())
            }
            other => other.clone(),
        }
    }

    /// Spells the value: members in any order, white space, escapes, numbers in any notation.
    fn spell(&self, random: &mut Random, out: &mut String) {
        space(random, out);
        match self {
            Self::Literal(text) => *out += text,
            Self::Number(number) => *out += &respelled(number, random),
            Self::Text(text) => spell_text(text, random, out),
            Self::Array(items) => {
                let items: Vec<_> = items.iter().map(|item| (None, item)).collect();
                spell_list(&items, ['[', ']'], random, out);
            }
            Self::Object(members) => {
                let mut members: Vec<_> = members.iter().map(|(name, member)| (Some(name), member)).collect();
                for index in (1..members.len()).rev() {
                    members.swap(index, random.below(index as u64 + 1) as usize);
                }
                spell_list(&members, ['{', '}'], random, out);
            }
        }
        space(random, out);
    }

    fn spelled(&self, random: &mut Random) -> String {
        let mut out = String::new();
        self.spell(random, &mut out);
        out
    }
}

fn spell_list(list: &[(Option<&String>, &Json)], [begin, end]: [char; 2], random: &mut Random, out: &mut String) {
    out.push(begin);
    space(random, out);
    for (index, (name, value)) in list.iter().enumerate() {
        *out += if index > 0 { "," } else { "" };
        if let Some(name) = name {
            space(random, out);
            spell_text(name, random, out);
            space(random, out);
            out.push(':');
        }
        value.spell(random, out);
    }
    out.push(end);
}

fn space(random: &mut Random, out: &mut String) {
    *out += ["", "", "", " ", "\n", "\t\r"][random.below(6) as usize];
}

fn spell_text(text: &str, random: &mut Random, out: &mut String) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' if !random.once_in(3) => out.extend(['\\', character]),
            '/' if random.once_in(2) => *out += "\\/",
            '\n' if random.once_in(2) => *out += "\\n",
            '\0'..' ' | '"' | '\\' => *out += &format!("\\u{:04x}", u32::from(character)),
            _ if random.once_in(4) => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    *out += &format!("\\u{unit:04X}");
                }
            }
            _ => out.push(character),
        }
    }
    out.push('"');
}

/// Trees of few values, so that equal ones meet.
fn json() -> impl proptest::strategy::Strategy<Value = Json> {
    let text = || proptest::sample::select(vec!["", "a", "b", "\"", "\\", "\n/", "\u{0}", "é", "\u{fb33}", "😀", "a "]);
    let number =
        || proptest::sample::select(vec!["0", "1", "10", "-1", "0.1", "100000000000000000001", "1e20", "1e-9"]);
    let scalar = prop_oneof![
        proptest::sample::select(vec!["null", "true", "false"]).prop_map(Json::Literal),
        number().prop_map(|number| Json::Number(number.into())),
        text().prop_map(|text| Json::Text(text.into())),
    ];
    scalar.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Json::Array),
            proptest::collection::btree_map(text().prop_map(str::to_owned), inner, 0..5).prop_map(Json::Object),
        ]
    })
}

/// Changes one value somewhere in the tree.
fn change(json: &mut Json, random: &mut Random) {
    match json {
        Json::Array(items) if !items.is_empty() => {
            let index = random.below(items.len() as u64) as usize;
            change(&mut items[index], random);
        }
        Json::Object(members) if !members.is_empty() => {
            let index = random.below(members.len() as u64) as usize;
            change(members.values_mut().nth(index).unwrap(), random);
        }
        Json::Number(number) => *number = "7".into(),
        Json::Text(text) => text.push('x'),
        other => *other = Json::Array(vec![other.clone()]),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1_000) })]

    /// Proves G133.
    #[test]
    fn bodies_are_equal_only_if_their_values_are(one in json(), other in json(), seed: u64) {
        let mut random = Random::of(seed);
        let mut changed = one.clone();
        change(&mut changed, &mut random);
        let spelled = one.spelled(&mut random);
        for tree in [&one, &other, &changed] {
            let again = tree.spelled(&mut random);
            prop_assert_eq!(fingerprint(&spelled) == fingerprint(&again), one.value() == tree.value(), "{} {}", spelled, again);
        }
    }

    /// Proves G133.
    #[test]
    fn a_body_with_a_repeated_name_counts_byte_for_byte(one in json(), depth in 0..3usize, seed: u64) {
        let mut random = Random::of(seed);
        let body = |space: &str| {
            let inner = one.spelled(&mut Random::of(seed));
            let twice = format!(r#"{{"n":{inner},"m":1,{space}"\u006e":{inner}}}"#);
            format!("{}{twice}{}", r#"{"o":["#.repeat(depth), "]}".repeat(depth))
        };
        let space = " ".repeat(random.below(3) as usize);
        prop_assert_eq!(fingerprint(&body("")) == fingerprint(&body(&space)), space.is_empty());
        let once = body("").replace(r"\u006e", "p");
        prop_assert_ne!(fingerprint(&body("")), fingerprint(&once));
    }
}

#[test]
fn a_body_that_has_no_one_value_counts_byte_for_byte() {
    for (one, other) in [
        (r#"{"a":1,"a":2}"#, r#"{"a":1, "a":2}"#),
        (r#"{"a":900,"a":7}"#, r#"{"a":7}"#),
        (r#"["\ud800"]"#, r#"[ "\ud800"]"#),
        (r#"["\ud800"]"#, r#"["\ud801"]"#),
        ("{\"a\":1", "{\"a\": 1"),
    ] {
        assert_ne!(fingerprint(one), fingerprint(other), "{one} {other}");
        assert_eq!(fingerprint(one), fingerprint(one));
    }
    // JSON and bytes of one text are two bodies.
    let text = Message { content_type: Some("text/plain".into()), ..message("m", "[1]") };
    assert_ne!(Fingerprint::of(&text), fingerprint("[1]"));
}

/// Bodies of the report that were answered as duplicates of each other.
/// Proves G133.
#[tokio::test]
async fn bodies_that_differ_beyond_a_double_are_mismatches() {
    let house = House::with(Strategy::default()).await;
    for (id, one, other) in [
        ("n-1", r#"{"wei":100000000000000000000}"#, r#"{"wei":100000000000000000001}"#),
        ("n-2", r#"{"rate":0.12345678901234567891}"#, r#"{"rate":0.12345678901234567892}"#),
        ("n-3", r#"{"cents":7}"#, r#"{"cents":900,"cents":7}"#),
        ("n-4", r#"{"amount":1234567890123456.78}"#, r#"{"amount":1234567890123456.79}"#),
    ] {
        assert!(is_completed(&house.handle(message(id, one)).await));
        assert_eq!(house.handle(message(id, other)).await, Outcome::Mismatch, "{other}");
        assert!(matches!(house.handle(message(id, one)).await, Outcome::Duplicate(_)), "{one}");
    }
    for again in [r#"{"wei":1e20}"#, r#"{ "wei" : 100000000000000000000.0 }"#] {
        assert!(matches!(house.handle(message("n-1", again)).await, Outcome::Duplicate(_)), "{again}");
    }
}

// Derived keys.

/// Every text of up to three of these.
fn joined(parts: &[&str]) -> Vec<String> {
    let more = |texts: &[String]| -> Vec<String> {
        texts.iter().flat_map(|text| parts.iter().map(move |part| format!("{text}{part}"))).collect()
    };
    let one: Vec<_> = parts.iter().map(|part| (*part).to_owned()).collect();
    let two = more(&one);
    let three = more(&two);
    [one, two, three].concat()
}

fn assert_all_differ<P: std::fmt::Debug>(keys: impl IntoIterator<Item = (RecordKey, P)>) {
    let mut seen: HashMap<u128, (RecordKey, P)> = HashMap::new();
    for (key, parts) in keys {
        if let Some((other, others)) = seen.insert(key.digest(), (key.clone(), parts)) {
            panic!("{key} is made of {:?}; {other}, of {others:?}", seen[&key.digest()].1);
        }
    }
}

/// Proves G136.
#[test]
fn derived_keys_of_different_parts_differ() {
    let scope = Scope::of("p");
    let [subject, time] = ["subject", "time"].map(|name| Select::Attribute(name.into()));
    let timestamp = Strategy::Timestamp { entity: subject, time, max_future_skew_ms: 1_000 };
    let texts = joined(&["a", "@", "%", "%40", "-", "@1000000-"]);
    let of_time = |entity: &String, id: &String| {
        let mut message = message(id, "{}");
        (message.subject, message.time) = (Some(entity.clone()), Some("1".into()));
        timestamp.identify(&scope, &message, &SystemClock).unwrap().message_key
    };
    assert_all_differ(texts.iter().flat_map(|entity| texts.iter().map(move |id| (of_time(entity, id), (entity, id)))));

    let texts = joined(&["a", "/", "%", "%2F", "/0", "/0/compensate"]);
    let of_step = |key: &String, saga: &String, step| {
        RecordKey::new(scope.clone(), "/s".into(), key.as_str().into()).compensation(saga, step)
    };
    let parts = texts.iter().flat_map(|key| texts.iter().map(move |saga| (key, saga)));
    let parts = parts.flat_map(|(key, saga)| [0, 1].map(|step| (key, saga, step)));
    assert_all_differ(parts.map(|(key, saga, step)| (of_step(key, saga, step), (key, saga, step))));
}

/// Sagas and calls under way over an upgrade are found by these texts.
#[test]
fn derived_keys_of_ordinary_parts_are_as_they_were() {
    let scope = Scope::of("p");
    let key = |text: &str| RecordKey::new(scope.clone(), "/test".into(), text.into());
    assert_eq!(key("k-1").compensation("trip", 2), key("k-1/trip/2/compensate"));
    let of_version = strict(GapPolicy::Accept).identify(&scope, &at(3), &SystemClock).unwrap();
    assert_eq!(of_version.message_key, key("e@3"));
    let mail = Message { subject: Some("me@example.com".into()), ..at(3) };
    let of_mail = strict(GapPolicy::Accept).identify(&scope, &mail, &SystemClock).unwrap();
    assert_eq!(of_mail.message_key, key("me@example.com@3"));
}

// Records and held messages of earlier versions.

/// The fingerprint that version 1 computed, from the canonical form that it wrote.
fn version_1(kind: &str, canonical: &str) -> Fingerprint {
    let hash = blake3::hash(&[&(kind.len() as u64).to_le_bytes(), kind.as_bytes(), canonical.as_bytes()].concat());
    Fingerprint { version: 1, digest: *hash.as_bytes().first_chunk().unwrap() }
}

impl House {
    async fn commit(&self, commit: Commit) {
        self.bench.committer.submit(commit).durable().await.unwrap();
    }

    /// Makes the record of a message one that version 1 stored.
    async fn age(&self, key: &RecordKey, fingerprint: Fingerprint) {
        let record = self.store.record(key).await.unwrap().unwrap();
        let (expected, epoch) = (Expected::Epoch(record.epoch), record.epoch);
        let record = RecordChange::Put(Record { fingerprint, epoch, ..record }.into());
        self.commit(Commit { expected, record, ..Commit::of(key) }).await;
    }

    /// Makes the one held message one that version 1 held.
    async fn age_held(&self, fingerprint: Fingerprint) {
        let (key, held) = self.store.held_messages(Some("p"), None, 2).await.unwrap().remove(0);
        let removed = Some(HeldChange::Remove(held.fingerprint));
        self.commit(Commit { held_message: removed, ..Commit::of(&key.record) }).await;
        let put = Some(HeldChange::Put(Box::new(HeldMessage { fingerprint, ..held })));
        self.commit(Commit { held_message: put, ..Commit::of(&key.record) }).await;
    }
}

/// Proves G134.
#[tokio::test]
async fn a_record_of_an_earlier_version_recognises_its_duplicates_and_nothing_else() {
    let house = House::with(Strategy::default()).await;
    // A double as serde_json writes it.
    let double = format!(r#"{{"n":{},}}"#, serde_json::Value::from(1e20));
    let bodies = [("a", r#"{"n":1,"m":[0.1]}"#, r#"{"m":[0.1,],"n":1,}"#), ("b", r#"{"n":1e20}"#, &double)];
    for (id, body, canonical) in bodies {
        house.handle(message(id, body)).await;
        let key = RecordKey::new(Scope::of("p"), "/test".into(), id.into());
        house.age(&key, version_1("test", canonical)).await;
    }
    let house = house.restarted().await;
    for (id, body) in
        [("a", r#"{ "m":[0.1], "n":1 }"#), ("b", r#"{"n":100000000000000000000}"#), ("b", r#"{"n":1e20}"#)]
    {
        let outcome = house.handle(message(id, body)).await;
        assert!(matches!(outcome, Outcome::Duplicate(StoredOutcome::Completed(_))), "{body}: {outcome:?}");
    }
    for (id, body) in [
        ("a", r#"{"m":[0.2],"n":1}"#),
        // Version 1 gave these the fingerprint of the record.
        ("a", r#"{"m":[0.1],"n":2,"n":1}"#),
        ("a", r#"{"m":[0.10000000000000000001],"n":1}"#),
        ("a", r#"{"m":[0.1,],"n":1,}"#),
        ("b", r#"{"n":100000000000000000001}"#),
    ] {
        assert_eq!(house.handle(message(id, body)).await, Outcome::Mismatch, "{body}");
    }
}

#[tokio::test]
async fn a_record_of_an_earlier_version_of_an_entity_recognises_its_duplicate() {
    let house = House::with(strict(GapPolicy::DeadLetter)).await;
    house.handle(at(1)).await;
    let key = RecordKey::new(Scope::of("p"), "/test".into(), "e".into());
    house.age(&key, version_1("test", "1").at(&Position::Version(1))).await;
    let house = house.restarted().await;
    assert!(matches!(house.handle(at(1)).await, Outcome::Duplicate(_)));
    assert_eq!(house.handle(Message { data: "9".into(), ..at(1) }).await, Outcome::Mismatch);
    assert!(is_completed(&house.handle(at(2)).await));
}

/// Proves G135.
#[tokio::test]
async fn a_message_that_an_earlier_version_parked_runs_once_delivered_again_or_not() {
    for delivered_again in [false, true] {
        let house = House::with(strict(GapPolicy::DeadLetter)).await;
        assert!(matches!(house.handle(at(2)).await, Outcome::Parked { .. }));
        house.age_held(version_1("test", "2").at(&Position::Version(2))).await;
        let house = house.restarted().await;
        if delivered_again {
            assert!(matches!(house.handle(at(2)).await, Outcome::Parked { .. }));
        }
        assert!(is_completed(&house.handle(at(1)).await));
        house.keep().await;
        assert_eq!(house.state().await.as_deref(), Some("2"), "delivered again: {delivered_again}");
        assert_eq!(house.store.pending(None, 9).await.unwrap().len(), 2, "each ran once");
        assert_eq!(house.held_messages().await, []);
        assert!(matches!(house.handle(at(2)).await, Outcome::Duplicate(_)));
    }
}

#[tokio::test]
async fn a_message_that_an_earlier_version_parked_is_given_up_once() {
    let house = House::with(strict(GapPolicy::DeadLetter)).await;
    house.handle(at(2)).await;
    house.age_held(version_1("test", "2").at(&Position::Version(2))).await;
    let house = house.restarted().await;
    house.clock.advance(60_000);
    house.keep().await;
    let held = house.held_messages().await;
    assert!(matches!(&held[..], [(HoldReason::Dead, error)] if error.contains("time was over")), "{held:?}");
}

#[test]
fn content_hash_keys_of_ordinary_content_are_as_they_were() {
    let message = Message::new("m", "/s", "order.placed")
        .with_data("application/json", r#"{"b": [1, 2.5, "x\u00e9"], "a": {"z": null, "y": true}}"#);
    let strategy = Strategy::ContentHash { fields: Fields::All };
    let key = strategy.identify(&Scope::of("p"), &message, &SystemClock).unwrap().record;
    assert_eq!(&*key.key, "20eb36c75e81186f833b9f5fdbc531e5", "as a host of version 2 computed it");
}

hapax_tests::mutations! {
    mutation_numbers_as_doubles_is_found:
        numbers_are_equal_only_if_their_exact_values_are is red with "numbers-as-doubles";
    mutation_repeated_names_ignored_is_found:
        a_body_with_a_repeated_name_counts_byte_for_byte is red with "repeated-names-ignored";
    mutation_derived_key_unescaped_is_found: derived_keys_of_different_parts_differ is red with "derived-key-unescaped";
    mutation_older_fingerprint_forgotten_is_found:
        a_record_of_an_earlier_version_recognises_its_duplicates_and_nothing_else is red with
        "older-fingerprint-forgotten";
}
