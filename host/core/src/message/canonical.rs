//! Canonical JSON: one text for all spellings of a value. It is the form of RFC 8785, but for
//! numbers, which keep all their digits. A value with a repeated member name has none.

use std::cmp::Ordering;

use smallvec::SmallVec;

use crate::message::decimal;
use crate::message::json::{Document, Kind, NodeIndex, ROOT};
use crate::message::strategy::Fields;
use crate::support::fault;

/// Error: an object has two members with one name, so its value is not known.
pub(super) struct Ambiguous;

/// Returns the canonical form of the chosen part of a JSON text. Returns `None` if the text has no
/// canonical form: it is not JSON, or somewhere in it a member name is repeated.
pub(super) fn of(data: &[u8], fields: &Fields) -> Option<Vec<u8>> {
    let document = Document::parse(data)?;
    let mut out = Vec::with_capacity(data.len());
    document.write(ROOT, &[], &mut out).ok()?;
    match fields {
        Fields::All => {}
        Fields::Only(pointers) => {
            out.clear();
            only(&document, pointers, &mut out).ok()?;
        }
        Fields::Without(pointers) => {
            out.clear();
            let left_out: Vec<_> = pointers.iter().filter_map(|pointer| left_out(&document, pointer)).collect();
            document.write(ROOT, &left_out, &mut out).ok()?;
        }
    }
    Some(out)
}

/// Writes an object of the values at `pointers`, by their pointers. An absent one is left out.
fn only(document: &Document<'_>, pointers: &[String], out: &mut Vec<u8>) -> Result<(), Ambiguous> {
    let found = |pointer: &String| Some((pointer.clone(), document.at(pointer).ok()??));
    let mut members: Vec<_> = pointers.iter().filter_map(found).collect();
    members.sort_unstable_by(|(one, _), (other, _)| by_utf16(one.as_bytes(), other.as_bytes()));
    members.dedup();
    out.push(b'{');
    for (index, (pointer, node)) in members.into_iter().enumerate() {
        out.extend_from_slice(if index > 0 { b"," } else { b"" });
        write_escaped(pointer.as_bytes(), out);
        out.push(b':');
        document.write(node, &[], out)?;
    }
    out.push(b'}');
    Ok(())
}

/// Returns the value at `pointer`, to be left out, if it is there. The whole text is never left
/// out.
fn left_out(document: &Document<'_>, pointer: &str) -> Option<NodeIndex> {
    document.at(pointer).ok()?.filter(|node| *node != ROOT)
}

/// An array or object that is being written.
struct Open {
    kind: Kind,
    /// First, next and last of what it holds: nodes of an array, places in the list of names of an
    /// object.
    first: u32,
    next: u32,
    end: u32,
}

impl Document<'_> {
    /// Writes the canonical form of a value. Members that are left out are not written; items that
    /// are left out become null, since the others keep their indexes.
    fn write(&self, value: NodeIndex, left_out: &[NodeIndex], out: &mut Vec<u8>) -> Result<(), Ambiguous> {
        let mut open: SmallVec<[Open; 16]> = SmallVec::new();
        // Names of the members of all open objects, in the order in which they are written.
        let mut names: SmallVec<[NodeIndex; 64]> = SmallVec::new();
        let mut node = value;
        loop {
            match self.kind(node) {
                _ if left_out.contains(&node) => out.extend_from_slice(b"null"),
                Kind::Array => {
                    out.push(b'[');
                    let first = node + 1;
                    open.push(Open { kind: Kind::Array, first, next: first, end: self.behind(node) });
                }
                Kind::Object => {
                    out.push(b'{');
                    let first = names.len();
                    names.extend(self.names(node).filter(|name| !left_out.contains(&(name + 1))));
                    self.sort(&mut names[first..])?;
                    let (first, end) = (first as u32, names.len() as u32);
                    open.push(Open { kind: Kind::Object, first, next: first, end });
                }
                _ => self.write_scalar(node, out),
            }
            let Some(next) = self.next(&mut open, &mut names, out) else { return Ok(()) };
            node = next;
        }
    }

    /// Writes everything between a value and the next one, which it returns.
    fn next(
        &self,
        open: &mut SmallVec<[Open; 16]>,
        names: &mut SmallVec<[NodeIndex; 64]>,
        out: &mut Vec<u8>,
    ) -> Option<NodeIndex> {
        loop {
            let holder = open.last_mut()?;
            let is_object = holder.kind == Kind::Object;
            if holder.next == holder.end {
                out.push(if is_object { b'}' } else { b']' });
                if is_object {
                    names.truncate(holder.first as usize);
                }
                open.pop();
                continue;
            }
            if holder.next != holder.first {
                out.push(b',');
            }
            if !is_object {
                let item = holder.next;
                holder.next = self.behind(item);
                return Some(item);
            }
            let name = names[holder.next as usize];
            holder.next += 1;
            self.write_scalar(name, out);
            out.push(b':');
            return Some(name + 1);
        }
    }

    /// Sorts the names of an object as RFC 8785 does, and finds a repeated one.
    fn sort(&self, names: &mut [NodeIndex]) -> Result<(), Ambiguous> {
        let order = |one: &NodeIndex, other: &NodeIndex| by_utf16(self.bytes(*one), self.bytes(*other));
        let is_sorted = |names: &[NodeIndex]| names.windows(2).all(|pair| order(&pair[0], &pair[1]).is_lt());
        if is_sorted(names) {
            return Ok(());
        }
        names.sort_unstable_by(order);
        if is_sorted(names) || fault::mutated("repeated-names-ignored") { Ok(()) } else { Err(Ambiguous) }
    }

    fn write_scalar(&self, node: NodeIndex, out: &mut Vec<u8>) {
        let bytes = self.bytes(node);
        match self.kind(node) {
            Kind::Number => decimal::write_canonical(bytes, out),
            Kind::Text => {
                out.push(b'"');
                out.extend_from_slice(bytes);
                out.push(b'"');
            }
            Kind::Decoded => write_escaped(bytes, out),
            Kind::Literal | Kind::Array | Kind::Object => out.extend_from_slice(bytes),
        }
    }
}

/// Writes a string with the escapes that it needs, as RFC 8785 does.
fn write_escaped(content: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    for byte in content {
        match byte {
            b'"' => out.extend_from_slice(br#"\""#),
            b'\\' => out.extend_from_slice(br"\\"),
            0x08 => out.extend_from_slice(br"\b"),
            b'\t' => out.extend_from_slice(br"\t"),
            b'\n' => out.extend_from_slice(br"\n"),
            0x0c => out.extend_from_slice(br"\f"),
            b'\r' => out.extend_from_slice(br"\r"),
            0..0x20 => out.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
            _ => out.push(*byte),
        }
    }
    out.push(b'"');
}

/// Compares two UTF-8 texts by their UTF-16 code units. These are in the order of the bytes, but
/// for characters beyond U+FFFF (first byte 0xf0 and more), which come before U+E000 to U+FFFF
/// (first byte 0xee and 0xef).
fn by_utf16(one: &[u8], other: &[u8]) -> Ordering {
    let different = one.iter().zip(other).find(|(one, other)| one != other);
    match different {
        Some((one, other)) if *one >= 0xee && *other >= 0xee && (*one >= 0xf0) != (*other >= 0xf0) => other.cmp(one),
        Some((one, other)) => one.cmp(other),
        None => one.len().cmp(&other.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(json: &str) -> Option<String> {
        of(json.as_bytes(), &Fields::All).map(|text| String::from_utf8(text).expect("UTF-8"))
    }

    /// The example of RFC 8785, 3.2.2 and 3.2.3, with one number that is not what a double prints;
    /// the order of the names is the one of 3.2.3.
    #[test]
    fn content_is_canonical_by_rfc_8785_but_for_digits_that_a_double_has_no_room_for() {
        let example = r#"{
            "numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
            "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
            "literals": [null, true, false]
        }"#;
        let expected = r#"{"literals":[null,true,false],"numbers":[333333333.33333329,1e+30,4.5,0.002,1e-27],"string":"€$\u000f\nA'B\"\\\\\"/"}"#;
        assert_eq!(canonical(example).as_deref(), Some(expected));
        // By UTF-16 code units: U+10000 comes before U+FB33.
        assert_eq!(
            canonical("{\"\u{fb33}\":1,\"\u{10000}\":2,\"1\":3,\"\\r\":4,\"1\u{10000}\":5,\"1\u{e000}\":6}").as_deref(),
            Some("{\"\\r\":4,\"1\":3,\"1\u{10000}\":5,\"1\u{e000}\":6,\"\u{10000}\":2,\"\u{fb33}\":1}")
        );
    }

    #[test]
    fn names_are_in_the_order_of_their_utf_16_units() {
        let texts = [
            "",
            "a",
            "ab",
            "b",
            "é",
            "\u{7ff}",
            "\u{800}",
            "\u{d7ff}",
            "\u{e000}",
            "\u{ffff}",
            "\u{10000}",
            "\u{10ffff}",
        ];
        let all = texts.iter().flat_map(|one| texts.iter().map(move |other| (format!("x{one}"), format!("x{other}"))));
        for (one, other) in all {
            let units = one.encode_utf16().cmp(other.encode_utf16());
            assert_eq!(by_utf16(one.as_bytes(), other.as_bytes()), units, "{one:?} {other:?}");
        }
    }

    #[test]
    fn a_repeated_name_leaves_no_canonical_form_at_any_depth() {
        for json in [r#"{"a":1,"a":1}"#, r#"{"a":1,"b":2,"\u0061":3}"#, r#"[[{"x":{"":0,"":0}}]]"#] {
            assert_eq!(canonical(json), None, "{json}");
        }
        assert!(canonical(r#"[{"a":1},{"a":1}]"#).is_some());
        // A part that does not count makes no difference: the value of the whole is not known.
        let data = br#"{"a":1,"b":{"c":1,"c":2}}"#;
        assert!(of(data, &Fields::Only(vec!["/a".into()])).is_none());
        assert!(of(data, &Fields::Without(vec!["/b".into()])).is_none());
    }

    #[test]
    fn depth_and_exponents_cost_no_more_than_their_text() {
        let depth = 300_000;
        let json = r#"{"b":0,"a":["#.repeat(depth) + &"]}".repeat(depth);
        let expected = r#"{"a":["#.repeat(depth) + &r#"],"b":0}"#.repeat(depth);
        assert!(canonical(&json) == Some(expected));
        let json = format!("[{}1]", "1e999999999,".repeat(10_000));
        assert!(canonical(&json).is_some_and(|text| text.len() < 2 * json.len()));
    }
}
