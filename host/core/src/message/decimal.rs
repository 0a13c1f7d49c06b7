//! The exact decimal value of a JSON number, from its text. Numbers are equal if their texts in the
//! canonical form are. Nothing here is a float, and no exponent is expanded beyond a fixed size.

use smallvec::SmallVec;

use crate::support::fault;

/// Size of a number written out without an exponent, in bytes, at most. Every double has room.
pub(super) const PLAIN_BYTES_MAX: usize = 512;

/// Exponents between which RFC 8785 writes a number without one.
const WRITTEN_OUT: std::ops::RangeInclusive<i64> = -6..=20;

/// Digits of an exponent that is computed with as one number. Twice that size is far from overflow.
const EXPONENT_DIGITS: usize = 18;
const EXPONENT_UNIT: i64 = 1_000_000_000_000_000_000;

/// A decimal number in scientific notation: `d.ddd * 10^exponent`.
pub(super) struct Decimal {
    is_negative: bool,
    /// Digits without zeros at either end; none for zero.
    digits: SmallVec<[u8; 32]>,
    exponent: Exponent,
}

/// Exponent of any size: its text is as long as a message may be.
enum Exponent {
    Small(i64),
    Large { is_negative: bool, digits: Vec<u8> },
}

/// Writes a JSON number in its canonical form: as RFC 8785 writes a double, with all the digits
/// that the number has.
pub(super) fn write_canonical(text: &[u8], out: &mut Vec<u8>) {
    if fault::mutated("numbers-as-doubles") {
        let double: f64 = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).unwrap_or_default();
        return out.extend_from_slice(double.to_string().as_bytes());
    }
    if is_canonical(text) { out.extend_from_slice(text) } else { Decimal::of(text).write(out) }
}

/// Returns `true` if the text of a JSON number is known to be its canonical form. Most are.
fn is_canonical(text: &[u8]) -> bool {
    let unsigned = text.strip_prefix(b"-").unwrap_or(text);
    let whole = digits_at_begin(unsigned);
    if whole as i64 > *WRITTEN_OUT.end() + 1 {
        return false;
    }
    let Some((b'.', fraction)) = unsigned[whole..].split_first() else {
        return whole == unsigned.len() && text != b"-0";
    };
    digits_at_begin(fraction) == fraction.len()
        && !fraction.ends_with(b"0")
        && (unsigned[0] != b'0' || !fraction.starts_with(b"000000"))
}

fn digits_at_begin(text: &[u8]) -> usize {
    text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len())
}

impl Decimal {
    /// Returns the value of the text of a JSON number.
    pub(super) fn of(text: &[u8]) -> Self {
        let (is_negative, unsigned) = sign(text);
        let (mantissa, exponent) = split(unsigned, |byte| matches!(byte, b'e' | b'E'));
        let (whole, fraction) = split(mantissa, |byte| byte == b'.');
        let is_zero = |digit: &u8| *digit == b'0';
        let zeros = whole.iter().chain(fraction).take_while(|digit| is_zero(digit)).count();
        let mut digits: SmallVec<_> = whole.iter().chain(fraction).skip(zeros).copied().collect();
        let trailing = digits.iter().rev().take_while(|digit| is_zero(digit)).count();
        digits.truncate(digits.len() - trailing);
        if digits.is_empty() {
            return Self { is_negative: false, digits, exponent: Exponent::Small(0) };
        }
        // The first digit that is not zero stands so many places before the point.
        let shift = whole.len() as i64 - 1 - zeros as i64;
        Self { is_negative, digits, exponent: Exponent::of(exponent, shift) }
    }

    /// Returns the number written out: digits, and a point only where there is a fraction. Returns
    /// `None` if that takes more than [`PLAIN_BYTES_MAX`] bytes.
    pub(super) fn plain(&self) -> Option<String> {
        let Exponent::Small(exponent) = self.exponent else { return None };
        let places = exponent.unsigned_abs().saturating_add(self.digits.len() as u64);
        if places > PLAIN_BYTES_MAX as u64 - 3 {
            return None;
        }
        let mut out = Vec::new();
        self.write_out(exponent, &mut out);
        String::from_utf8(out).ok()
    }

    /// Writes the canonical form.
    fn write(&self, out: &mut Vec<u8>) {
        match &self.exponent {
            Exponent::Small(exponent) if WRITTEN_OUT.contains(exponent) => self.write_out(*exponent, out),
            Exponent::Small(exponent) => {
                self.write_scientific(*exponent < 0, exponent.unsigned_abs().to_string().as_bytes(), out);
            }
            Exponent::Large { is_negative, digits } => self.write_scientific(*is_negative, digits, out),
        }
    }

    fn write_out(&self, exponent: i64, out: &mut Vec<u8>) {
        let digits = &self.digits[..];
        out.extend_from_slice(if self.is_negative { b"-" } else { b"" });
        let Ok(before) = usize::try_from(exponent) else {
            out.extend_from_slice(b"0.");
            out.extend(std::iter::repeat_n(b'0', exponent.unsigned_abs() as usize - 1));
            return out.extend_from_slice(digits);
        };
        let before = before + 1;
        let (whole, fraction) = digits.split_at(before.min(digits.len()));
        out.extend_from_slice(if digits.is_empty() { b"0" } else { whole });
        if !digits.is_empty() {
            out.extend(std::iter::repeat_n(b'0', before - whole.len()));
        }
        if !fraction.is_empty() {
            out.push(b'.');
            out.extend_from_slice(fraction);
        }
    }

    fn write_scientific(&self, is_negative: bool, exponent: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(if self.is_negative { b"-" } else { b"" });
        let (first, rest) = self.digits.split_at(1);
        out.extend_from_slice(first);
        if !rest.is_empty() {
            out.push(b'.');
            out.extend_from_slice(rest);
        }
        out.extend_from_slice(if is_negative { b"e-" } else { b"e+" });
        out.extend_from_slice(exponent);
    }
}

impl Exponent {
    /// Returns the exponent that a number states, plus `shift`.
    fn of(text: &[u8], shift: i64) -> Self {
        let (is_negative, digits) = sign(text);
        let zeros = digits.iter().take_while(|digit| **digit == b'0').count();
        let digits = &digits[zeros..];
        let shift_away = if is_negative { -shift } else { shift };
        if digits.len() <= EXPONENT_DIGITS {
            let size = number(digits) + shift_away;
            return Self::Small(if is_negative { -size } else { size });
        }
        Self::Large { is_negative, digits: sum(digits, shift_away) }
    }
}

/// Returns `digits`, a number of more than [`EXPONENT_DIGITS`] digits, plus `shift`, which is less
/// than [`EXPONENT_UNIT`] away from zero.
fn sum(digits: &[u8], shift: i64) -> Vec<u8> {
    let (high, low) = digits.split_at(digits.len() - EXPONENT_DIGITS);
    let (mut high, low) = (high.to_vec(), number(low) + shift);
    let (from, to) = if low < 0 { (b'0', b'9') } else { (b'9', b'0') };
    if !(0..EXPONENT_UNIT).contains(&low) {
        // A carry, or a borrow, runs through the digits that have no room for it.
        let mut at = high.len();
        while at > 0 && high[at - 1] == from {
            high[at - 1] = to;
            at -= 1;
        }
        match at.checked_sub(1) {
            Some(digit) if low < 0 => high[digit] -= 1,
            Some(digit) => high[digit] += 1,
            None => high.insert(0, b'1'),
        }
    }
    let text = format!("{:018}", low.rem_euclid(EXPONENT_UNIT));
    let all: Vec<u8> = high.into_iter().chain(text.bytes()).collect();
    let zeros = all.iter().take_while(|digit| **digit == b'0').count();
    all[zeros..].to_vec()
}

/// Returns the number of at most [`EXPONENT_DIGITS`] digits.
fn number(digits: &[u8]) -> i64 {
    digits.iter().fold(0, |number, digit| number * 10 + i64::from(digit - b'0'))
}

/// Returns whether the text begins with a minus sign, and the text without its sign.
fn sign(text: &[u8]) -> (bool, &[u8]) {
    match text.split_first() {
        Some((b'-', unsigned)) => (true, unsigned),
        Some((b'+', unsigned)) => (false, unsigned),
        _ => (false, text),
    }
}

/// Returns the parts before and behind the first byte that separates; all and nothing if there is
/// none.
fn split(text: &[u8], separates: impl Fn(u8) -> bool) -> (&[u8], &[u8]) {
    match text.iter().position(|byte| separates(*byte)) {
        Some(at) => (&text[..at], &text[at + 1..]),
        None => (text, &[]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(text: &str) -> String {
        let mut out = Vec::new();
        write_canonical(text.as_bytes(), &mut out);
        String::from_utf8(out).expect("digits")
    }

    #[test]
    fn one_number_has_one_canonical_form() {
        for (form, spellings) in [
            ("0", &["0", "-0", "0.0", "-0.00e5", "0e999999999999999999999", "0E-1"][..]),
            ("10", &["10", "10.0", "1e1", "1E+01", "100e-1", "0.1e2", "0.00010e+5"]),
            ("-1.5", &["-1.5", "-1.50", "-15e-1", "-0.15e1"]),
            ("100000000000000000000", &["1e20", "100000000000000000000", "10e19"]),
            ("1e+21", &["1e21", "1000000000000000000000", "0.1e22"]),
            ("1.000000000000000000001e+21", &["1000000000000000000001", "1000000000000000000001.0"]),
            ("100000000000000000001", &["100000000000000000001"]),
            ("0.000001", &["0.000001", "1e-6", "0.0000010"]),
            ("1e-7", &["0.0000001", "1e-7", "10e-8"]),
            ("0.12345678901234567891", &["0.12345678901234567891", "12345678901234567891e-20"]),
            ("1e+999999999", &["1e999999999", "10e999999998", "0.01e1000000001"]),
            ("1e+1000000000000000000", &["1e1000000000000000000", "0.1e1000000000000000001", "10e999999999999999999"]),
            ("1e+999999999999999999", &["10e999999999999999998", "0.1e1000000000000000000", "1e0999999999999999999"]),
            (
                "1.2e-99999999999999999999",
                &["1.2e-99999999999999999999", "12e-100000000000000000000", "0.12e-99999999999999999998"],
            ),
            (
                "1e+1000000000000000000000000000",
                &["10e999999999999999999999999999", "1e+01000000000000000000000000000"],
            ),
        ] {
            for spelling in spellings {
                assert_eq!(canonical(spelling), form, "{spelling}");
            }
        }
    }

    #[test]
    fn whole_doubles_and_short_ones_are_written_as_rfc_8785_does() {
        for text in [
            "0",
            "-1",
            "9007199254740991",
            "1e+21",
            "123456789012345680000",
            "1e-7",
            "0.000001",
            "5e-324",
            "1.7976931348623157e+308",
            "-0.1",
        ] {
            let double: f64 = text.parse().expect("a double");
            let rfc = serde_json_canonicalizer::to_string(&double).expect("finite");
            assert_eq!((canonical(text), rfc), (text.to_owned(), text.to_owned()));
        }
    }

    #[test]
    fn a_number_is_written_out_only_as_far_as_it_has_room() {
        let plain = |text: &str| Decimal::of(text.as_bytes()).plain();
        for (text, expected) in [
            ("-0", "0"),
            ("1e1", "10"),
            ("10.0", "10"),
            ("12.50", "12.5"),
            ("-1e-3", "-0.001"),
            ("36893488147419103233", "36893488147419103233"),
        ] {
            assert_eq!(plain(text).as_deref(), Some(expected));
        }
        for text in ["5e-324", "1.7976931348623157e308", "-1e-500", "1e500"] {
            assert!(plain(text).is_some_and(|plain| plain.len() <= PLAIN_BYTES_MAX), "{text}");
        }
        for text in ["1e999999999", "1e-999999999", "1e99999999999999999999", "1e-99999999999999999999", "1e512"] {
            assert_eq!(plain(text), None, "{text}");
        }
        assert_eq!(plain(&"9".repeat(513)), None);
    }
}
