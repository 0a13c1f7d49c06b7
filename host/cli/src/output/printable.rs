//! Text as it may be printed. What comes from messages, components and other hosts may hold
//! characters that move the cursor, colour the terminal, turn the reading direction or begin a line
//! of their own; they are printed as escapes. Everything that the binary prints goes through here.

use std::borrow::Cow;

use hapax_core::fault;

/// Returns `text` with its control characters as escapes, which JSON reads as well: `\n`, `\u001b`.
/// In JSON without space between its tokens, control characters stand in strings only, so it stays
/// the same JSON.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let is_plain = |byte: u8| matches!(byte, b' '..=b'~');
    if text.bytes().all(is_plain) || !text.contains(is_control) || fault::mutated("output-unescaped") {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            // None of them is beyond U+FFFF.
            control if is_control(control) => out.push_str(&format!("\\u{:04x}", u32::from(control))),
            plain => out.push(plain),
        }
    }
    out.into()
}

/// Returns `true` for C0, DEL and C1, for line and paragraph separators, and for the characters
/// that change the direction of text.
fn is_control(character: char) -> bool {
    matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        || character.is_control()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped_and_nothing_else_is() {
        for (text, expected) in [
            ("", ""),
            ("plain \\ \"text\" ~", "plain \\ \"text\" ~"),
            ("äöü 漢字 😀 👩\u{200d}🔬 עברית", "äöü 漢字 😀 👩\u{200d}🔬 עברית"),
            ("a\nb\r\tc", "a\\nb\\r\\tc"),
            ("\u{0}\u{1b}[2K\u{7}\u{7f}", "\\u0000\\u001b[2K\\u0007\\u007f"),
            ("\u{85}\u{9b}31m\u{9d}", "\\u0085\\u009b31m\\u009d"),
            ("\u{202e}\u{2066}\u{200f}\u{61c}\u{2028}\u{2029}", "\\u202e\\u2066\\u200f\\u061c\\u2028\\u2029"),
        ] {
            assert_eq!(printable(text), expected);
        }
        for code in (0..0x20).chain(0x7f..0xa0).chain(0x202a..=0x202e).chain(0x2066..=0x2069) {
            let text = char::from_u32(code).expect("a character").to_string();
            assert!(printable(&text).is_ascii() && !printable(&text).contains(char::is_control), "{code:x}");
        }
    }

    #[test]
    fn json_stays_the_same_json() {
        let value = serde_json::json!({ "a\u{7f}\u{9b}": ["\u{202e}\u{1b}[2K\n", 1, null], "b": "\\u001b\t" });
        let text = value.to_string();
        assert!(!printable(&text).contains(is_control));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&printable(&text)).expect("JSON"), value);
    }
}
