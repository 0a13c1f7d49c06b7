//! Tests of the reader of JSON: it agrees with serde_json wherever both read.

use crate::message::json::{Document, Kind, RepeatedName};

/// Texts at the edges of the grammar: whatever serde_json reads is read, and nothing else; but
/// it stops at a depth, and at a number that is no double.
#[test]
fn json_is_what_serde_json_takes_for_json() {
    #[rustfmt::skip]
    let texts = [
        "", " ", "null", "nul", "nullx", "true false", "[]", "[ ]", "[,]", "[1,]", "[1 2]", "{", "}", "{}", "{ }",
        "{,}", r#"{"a"}"#, r#"{"a":}"#, r#"{"a":1,}"#, r#"{"a":1 "b":2}"#, r#"{"a":1,"b":[{}]}"#, r#"{1:2}"#, "[}",
        "{]", "[1]]", "0", "00", "01", "-", "-0", "-01", "1.", ".1", "1.0", "1e", "1e+", "1e+0", "1E-00", "+1",
        "1.e1", "0x1", "NaN", r#"""#, r#""a"#, r#""\"#, r#""\"""#, r#""\x""#, r#""\u12""#, r#""\u12g4""#,
        r#""\u0041""#, r#""\ud83d\ude00""#, r#""\ud83d""#, r#""\ud83dx""#, r#""\ud83d\n""#, r#""\ud83d\u0041""#,
        r#""\ude00""#, r#""\ud83d\ud83d""#, "\"\n\"", "\"\u{7f}\"", "\"\u{0}\"", "\u{feff}1", "\u{a0}1",
        "\t\r\n 1\t\r\n ", "'a'", r#""\/\b\f\n\r\t\\""#, "[[[[]]]]", "[[[[]]]", "//1", "1/**/",
    ];
    for text in texts {
        let is_json = serde_json::from_str::<serde_json::Value>(text).is_ok();
        assert_eq!(Document::parse(text.as_bytes()).is_some(), is_json, "{text}");
    }
    assert!(Document::parse(b"\"\xff\"").is_none());
    assert!(Document::parse(b"1e999999999999").is_some());
}

#[test]
fn a_pointer_finds_what_serde_json_finds() {
    let text = r#"{"a/b":[1,{"c~":"\u0041\n"}],"":{"":2},"0":{"1":3},"d":[[4,5],6]} "#;
    let document = Document::parse(text.as_bytes()).expect("JSON");
    let value: serde_json::Value = serde_json::from_str(text).expect("JSON");
    for pointer in [
        "",
        "/",
        "//",
        "/a~1b",
        "/a~1b/0",
        "/a~1b/1/c~0",
        "/a~1b/2",
        "/a~1b/00",
        "/a~1b/+1",
        "/a~1b/-",
        "/a/b",
        "/0/1",
        "/d/0/1",
        "/d/1",
        "/d/1/0",
        "d",
        "/d/0/",
        "/x",
    ] {
        let found = document.at(pointer).expect("no name is repeated");
        let text = found.map(|node| match document.kind(node) {
            Kind::Decoded | Kind::Text => {
                serde_json::Value::from(std::str::from_utf8(document.bytes(node)).expect("text"))
            }
            _ => serde_json::from_slice(document.bytes(node)).expect("JSON"),
        });
        assert_eq!(text.as_ref(), value.pointer(pointer), "{pointer}");
    }
}

#[test]
fn a_pointer_is_refused_only_where_a_repeated_name_stands_in_its_way() {
    let document = Document::parse(br#"{"a":{"x":1,"\u0078":2},"b":{"y":3},"a ":{}}"#).expect("JSON");
    assert_eq!(document.at("/a/x"), Err(RepeatedName("x".into())));
    assert_eq!(document.at("/a/z"), Ok(None));
    assert!(document.at("/b/y").is_ok_and(|found| found.is_some()));
    assert!(document.at("/a").is_ok_and(|found| found.is_some()));
}

#[test]
fn no_depth_is_too_deep() {
    let depth = 1_000_000;
    let text = "[".repeat(depth) + &"]".repeat(depth);
    assert!(Document::parse(text.as_bytes()).is_some());
    let text = r#"{"a":"#.repeat(depth) + "1" + &"}".repeat(depth);
    assert!(Document::parse(text.as_bytes()).is_some());
    assert!(Document::parse("[".repeat(depth).as_bytes()).is_none());
}
