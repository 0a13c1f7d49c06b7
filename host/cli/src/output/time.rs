//! Times as people write and read them.

use hapax_core::parse_rfc3339_ms;
use hapax_transport::RequestError;

/// Units of a time span, in milliseconds.
const UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Parses RFC 3339, or a time span before `now_ms`. Returns milliseconds since the Unix epoch.
pub(crate) fn parse(name: &str, text: &str, now_ms: u64) -> Result<u64, RequestError> {
    let ago = || {
        let digits = text.find(|character: char| !character.is_ascii_digit())?;
        let (count, unit) = text.split_at(digits);
        let (_, unit_ms) = UNITS.iter().find(|(name, _)| *name == unit)?;
        Some(now_ms.saturating_sub(count.parse::<u64>().ok()?.checked_mul(*unit_ms)?))
    };
    parse_rfc3339_ms(text).or_else(ago).ok_or_else(|| {
        let how = "a time such as 2026-01-31T12:00:00Z, or a time span before now, such as 90s, 30m, 2h or 7d";
        RequestError::Invalid(format!("{name}: `{text}` is no time; give {how}"))
    })
}

/// Formats milliseconds since the Unix epoch by RFC 3339.
pub(crate) fn rfc3339(at_ms: u64) -> String {
    let format =
        time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    let at = time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(at_ms) * 1_000_000);
    at.ok().and_then(|at| at.format(format).ok()).unwrap_or_else(|| format!("{at_ms} ms"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_and_written() {
        let now_ms = 1_700_000_000_000;
        assert_eq!(parse("since", "2h", now_ms), Ok(now_ms - 7_200_000));
        assert_eq!(parse("since", "5ms", now_ms), Ok(now_ms - 5));
        assert_eq!(parse("since", "1970-01-01T00:00:01Z", now_ms), Ok(1_000));
        assert_eq!(parse("since", "999999d", now_ms), Ok(0), "before all time");
        for wrong in
            ["", "h", "2", "2 h", "2w", "yesterday", "-2h", "99999999999999999999d", "2e3s", "9999999999999999d"]
        {
            let error = parse("until", wrong, now_ms).expect_err(wrong).to_string();
            assert!(error.starts_with("until: ") && error.contains("2h"), "{error}");
        }
        assert_eq!(rfc3339(1_001), "1970-01-01T00:00:01.001Z");
        assert_eq!(rfc3339(u64::MAX), format!("{} ms", u64::MAX));
    }
}
