//! CloudEvents 1.0 over HTTP in binary mode: attributes as `ce-` headers, the body as `data`.
//! Refuses what would be read in two ways: headers that come twice, names that are no attributes,
//! bytes that are no UTF-8.

use bytes::Bytes;
use hapax_core::Message;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use crate::cloudevents::{self, InvalidMessage, field};

/// The header that gives an idempotency key beside the message.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Bytes of an idempotency key in a header, at most.
const KEY_BYTES_MAX: usize = 1_024;
/// `source` and `type` of a plain body under an `Idempotency-Key`.
const PLAIN: (&str, &str) = ("/http", "message");

/// Reads a message from headers and body. Without `ce-id`, a body under an `Idempotency-Key` is a
/// message as well: the key is its id, `source` is `/http` and `type` is `message`, unless headers
/// give them.
pub fn parse_binary(headers: &HeaderMap, body: Bytes) -> Result<Message, InvalidMessage> {
    cloudevents::check_version(attribute(headers, "specversion")?.as_deref())?;
    let key = idempotency_key(headers)?;
    let plain = key.is_some() && !headers.contains_key("ce-id");
    let required = |name: &str, default: Option<&str>| {
        let given = attribute(headers, name)?.or(default.filter(|_| plain).map(str::to_owned));
        given.ok_or_else(|| field(name, format!("is missing: {}", how_to_send(name))))
    };
    let id = required("id", key.as_deref())?;
    let mut message = Message::new(id, required("source", Some(PLAIN.0))?, required("type", Some(PLAIN.1))?);
    message.idempotency_key = key.filter(|key| !names(key, &message.id));
    message.content_type = media_type(headers)?;
    message.data = body;
    for name in headers.keys().filter_map(|name| name.as_str().strip_prefix("ce-")) {
        let value = attribute(headers, name)?;
        match name {
            "id" | "source" | "type" | "specversion" => {}
            "subject" => message.subject = value,
            "time" => message.time = value,
            "dataschema" => message.data_schema = value,
            "datacontenttype" => return Err(field(name, "is sent as the header `Content-Type`, without `ce-`")),
            "data" => return Err(field(name, "is sent as the body")),
            other => {
                cloudevents::check_name(other)?;
                message.extensions.extend(value.map(|value| (other.to_owned(), value)));
            }
        }
    }
    cloudevents::check_time(message.time.as_deref())?;
    Ok(message)
}

/// The headers of a message in binary mode; its body is `data`.
pub fn to_headers(message: &Message) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("ce-specversion", HeaderValue::from_static("1.0"));
    headers.insert(IDEMPOTENCY_KEY, encoded(message.idempotency_key.as_ref().unwrap_or(&message.id), false));
    for (name, value) in message.attributes() {
        if name == "datacontenttype" {
            // No attribute here but a header of HTTP: its spaces stay.
            headers.insert(CONTENT_TYPE, encoded(&value, true));
        } else if let Ok(name) = HeaderName::try_from(format!("ce-{name}"))
            && !value.is_empty()
        {
            headers.insert(name, encoded(&value, false));
        }
    }
    if message.content_type.is_none() && !message.data.is_empty() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    headers
}

/// The `Idempotency-Key` beside a message whose id is `id`, if it says anything new.
pub(crate) fn key_beside(headers: &HeaderMap, id: &str) -> Result<Option<String>, InvalidMessage> {
    Ok(idempotency_key(headers)?.filter(|key| !names(key, id)))
}

/// Returns `true` if `key` is `id` as [`to_headers`] writes it. The message then has the record
/// that it has by any other way in.
fn names(key: &str, id: &str) -> bool {
    encoded(id, false) == key
}

/// The `Idempotency-Key`, as it is written: it is opaque.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, InvalidMessage> {
    let Some(value) = single(headers, IDEMPOTENCY_KEY, "Idempotency-Key")? else { return Ok(None) };
    if value.is_empty() {
        return Err(field("Idempotency-Key", "is empty; give a key, or leave the header out"));
    }
    if value.len() > KEY_BYTES_MAX {
        let reason = format!("has {} bytes, over the limit of {KEY_BYTES_MAX}; send a hash of it", value.len());
        return Err(field("Idempotency-Key", reason));
    }
    utf8("Idempotency-Key", value.to_vec()).map(Some)
}

/// The `Content-Type`, as it is written; empty counts as absent.
pub(crate) fn media_type(headers: &HeaderMap) -> Result<Option<String>, InvalidMessage> {
    let value = single(headers, CONTENT_TYPE.as_str(), "datacontenttype")?.filter(|value| !value.is_empty());
    value.map(|value| utf8("datacontenttype", value.to_vec())).transpose()
}

fn how_to_send(name: &str) -> String {
    match name {
        "id" => {
            "send the header `ce-id` with `ce-source` and `ce-type`; or a whole CloudEvent as JSON with `Content-Type: \
                 application/cloudevents+json`; or any body with an `Idempotency-Key`"
                .into()
        }
        _ => format!("send the header `ce-{name}`; every message needs `id`, `source` and `type`"),
    }
}

/// An attribute's value, decoded as the binding asks; empty counts as absent.
fn attribute(headers: &HeaderMap, name: &str) -> Result<Option<String>, InvalidMessage> {
    let Some(value) = single(headers, &format!("ce-{name}"), name)? else { return Ok(None) };
    let value = utf8(name, percent_decoded(&unquoted(value)))?;
    if value.chars().any(char::is_control) {
        return Err(field(name, "holds a control character; put such text into the body"));
    }
    Ok(Some(value).filter(|value| !value.is_empty()))
}

fn single<'a>(headers: &'a HeaderMap, header: &str, name: &str) -> Result<Option<&'a [u8]>, InvalidMessage> {
    let mut values = headers.get_all(header).iter();
    let first = values.next().map(HeaderValue::as_bytes);
    match values.next() {
        None => Ok(first),
        Some(_) => Err(field(name, format!("the header `{header}` comes twice; send one"))),
    }
}

fn utf8(name: &str, bytes: Vec<u8>) -> Result<String, InvalidMessage> {
    String::from_utf8(bytes).map_err(|_| field(name, "is not UTF-8; percent-encode its UTF-8 bytes"))
}

/// Without the double quotes and backslashes that senders of older versions of the binding put
/// around a value.
fn unquoted(value: &[u8]) -> Vec<u8> {
    let [b'"', inner @ .., b'"'] = value else { return value.to_vec() };
    let mut out = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter();
    while let Some(byte) = bytes.next() {
        let escaped = if *byte == b'\\' { bytes.next() } else { None };
        out.push(*escaped.unwrap_or(byte));
    }
    out
}

/// One round of percent-decoding. A `%` without two hexadecimal digits stands for itself.
fn percent_decoded(mut rest: &[u8]) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let mut out = Vec::with_capacity(rest.len());
    while let [first, tail @ ..] = rest {
        let byte = match tail {
            [high, low, ..] if *first == b'%' => digit(*high).zip(digit(*low)).map(|(high, low)| high << 4 | low),
            _ => None,
        };
        out.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    out
}

/// A header's value: what is not printable ASCII is percent-encoded, and so are `"`, `%` and the
/// space, unless `plain`.
fn encoded(value: &str, plain: bool) -> HeaderValue {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let mut out = Vec::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b' ' | b'"' | b'%' if plain => out.push(byte),
            0x21..=0x7e if !matches!(byte, b'"' | b'%') => out.push(byte),
            _ => out.extend([b'%', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]),
        }
    }
    HeaderValue::from_maybe_shared(Bytes::from(out)).expect("printable ASCII is a header's value")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&str, &str)| {
            (HeaderName::try_from(*name).expect("a name"), HeaderValue::from_bytes(value.as_bytes()).expect("a value"))
        };
        let mut headers = HeaderMap::new();
        for (name, value) in pairs.iter().map(pair) {
            headers.append(name, value);
        }
        headers
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let mut message = Message::new("id 1", "/s%20/\"ö\"", "t").with_data("text/plain; charset=\"utf-8\"", "a\nb");
        message.subject = Some("Euro € 😀".into());
        message.time = Some("1969-07-20T20:17:40+02:00".into());
        message.data_schema = Some("http://example.invalid/%41".into());
        message.extensions.insert("partitionkey".into(), "100%".into());
        message.idempotency_key = Some("k".into());
        let sent = to_headers(&message);
        assert_eq!(sent["ce-subject"], "Euro%20%E2%82%AC%20%F0%9F%98%80");
        assert_eq!(sent["content-type"], "text/plain; charset=\"utf-8\"");
        assert_eq!(parse_binary(&sent, message.data.clone()), Ok(message));
    }

    #[test]
    fn what_no_header_can_hold_is_still_sent() {
        let message = Message::new("\u{7f}\n", "/s", "t").with_data("text/\nplain ö", "x");
        let sent = to_headers(&message);
        assert_eq!(sent["ce-id"], "%7F%0A");
        assert_eq!(sent["content-type"], "text/%0Aplain %C3%B6");
        let bare = to_headers(&Message::new("i", "/s", "t"));
        assert_eq!(bare["idempotency-key"], "i");
        assert!(!bare.contains_key("content-type"));
    }

    #[test]
    fn a_key_that_repeats_the_id_says_nothing_new() {
        for id in ["i", "a b", "50%"] {
            let message = Message::new(id, "/s", "t");
            assert_eq!(parse_binary(&to_headers(&message), Bytes::new()), Ok(message));
        }
    }

    #[test]
    fn values_are_decoded_as_the_binding_asks() {
        let subject = |value: &str| {
            let all = [("ce-id", "i"), ("ce-source", "/s"), ("ce-type", "t"), ("ce-subject", value)];
            parse_binary(&headers(&all), Bytes::new()).map(|message| message.subject.unwrap_or_default())
        };
        for (value, decoded) in [
            ("a%20b", "a b"),
            ("%e2%82%ac", "€"),
            ("%41%", "A%"),
            ("%4", "%4"),
            ("%zz%+1", "%zz%+1"),
            (r#""a \"b\" \\ %41""#, r#"a "b" \ A"#),
            ("ö", "ö"),
            ("%2541", "%41"),
            ("", ""),
        ] {
            assert_eq!(subject(value).as_deref(), Ok(decoded), "{value}");
        }
        for value in ["%C0%A0", "%ff", "%00"] {
            assert!(subject(value).expect_err(value).to_string().contains("\"subject\""), "{value}");
        }
    }

    #[test]
    fn a_plain_body_under_a_key_is_a_message() {
        let body = Bytes::from_static(b"{}");
        let plain = parse_binary(&headers(&[("idempotency-key", "k%20")]), body.clone()).expect("plain");
        let mut expected = Message::new("k%20", "/http", "message");
        expected.data = body.clone();
        expected.idempotency_key = Some("k%20".into()); // Opaque: not decoded.
        assert_eq!(plain, expected);
        let named = [("idempotency-key", "k"), ("ce-source", "/mine"), ("ce-type", "order")];
        let named = parse_binary(&headers(&named), body).expect("named");
        assert_eq!((&*named.source, &*named.kind), ("/mine", "order"));
    }

    #[test]
    fn errors_name_the_field() {
        let all = [("ce-id", "i"), ("ce-source", "/s"), ("ce-type", "t")];
        let with = |name, value| [&all[..], &[(name, value)]].concat();
        let long = "k".repeat(KEY_BYTES_MAX + 1);
        for (pairs, words) in [
            (vec![], ["\"id\"", "Idempotency-Key"]),
            (all[..2].to_vec(), ["\"type\"", "`ce-type`"]),
            (vec![("ce-id", "i"), ("ce-type", "t"), ("idempotency-key", "k")], ["\"source\"", "`ce-source`"]),
            (with("ce-id", "j"), ["\"id\"", "twice"]),
            (with("ce-time", "noon"), ["\"time\"", "RFC 3339"]),
            (with("ce-specversion", "0.3"), ["\"specversion\"", "0.3"]),
            (with("ce-data", "x"), ["\"data\"", "body"]),
            (with("ce-datacontenttype", "x"), ["\"datacontenttype\"", "Content-Type"]),
            (with("ce-trace-id", "x"), ["\"trace-id\"", "lower-case"]),
            (with("idempotency-key", ""), ["\"Idempotency-Key\"", "empty"]),
            (with("idempotency-key", &long), ["\"Idempotency-Key\"", "limit of 1024"]),
        ] {
            let error = parse_binary(&headers(&pairs), Bytes::new()).expect_err("refused").to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{pairs:?}: {error}");
        }
    }
}
