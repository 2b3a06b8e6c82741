//! Times to come as people write them: `2027-06-30`, `2027-06-30 18:00`, `90d`. Always UTC, as they are
//! shown.

use super::{span, time};
use hermitage_storage::accounts::utc_of_digits;

/// Seconds since 1970-01-01 UTC.
pub fn parse(text: &str) -> Result<i64, String> {
    let text = text.trim();
    if let Some(time) = written(text) {
        return Ok(time);
    }
    let span = span::parse_with_units(text);
    span.map(|seconds| time::now() + i64::from(seconds)).map_err(|_| {
        format!("\"{text}\" is no time; write for example 2027-06-30, 2027-06-30T18:00 or 90d")
    })
}

/// `20270630180000`, as `expiry-time` has it.
pub fn digits(seconds: i64) -> String {
    time::rfc3339(seconds).chars().filter(char::is_ascii_digit).collect()
}

fn written(text: &str) -> Option<i64> {
    const SHAPE: &[u8] = b"0000-00-00T00:00:00";
    let bare = text.strip_suffix(['Z', 'z']).unwrap_or(text);
    let fits = |(byte, shape): (u8, &u8)| match shape {
        b'0' => byte.is_ascii_digit(),
        b'T' => matches!(byte, b'T' | b't' | b' '),
        shape => byte == *shape,
    };
    let whole = matches!(bare.len(), 10 | 16 | 19);
    let shaped = bare.bytes().zip(SHAPE).all(fits);
    let digits: String = bare.chars().filter(char::is_ascii_digit).collect();
    (whole && shaped).then(|| utc_of_digits(&digits)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_utc_and_begin_at_midnight() {
        for (text, expected) in [
            ("2027-06-30", "2027-06-30T00:00:00Z"),
            ("2027-06-30T18:05", "2027-06-30T18:05:00Z"),
            ("2028-02-29 23:59:59Z", "2028-02-29T23:59:59Z"),
        ] {
            let seconds = parse(text).unwrap();
            assert_eq!(time::rfc3339(seconds), expected);
            assert_eq!(utc_of_digits(&digits(seconds)), Some(seconds));
        }
        let soon = parse("90d").unwrap() - time::now();
        assert!((90 * 86_400 - 5..=90 * 86_400).contains(&soon), "{soon}");
    }

    #[test]
    fn what_is_no_time_is_refused_with_an_example() {
        for bad in [
            "",
            "never",
            "2027",
            "20270630",
            "2027-6-30",
            "2027-02-29",
            "2027-06-30T25:00",
            "2027-06-30T18",
            "30.06.2027",
            "-1d",
            "2027-06-30T18:00+02:00",
            "2027-06-3é",
        ] {
            assert!(parse(bad).unwrap_err().contains("2027-06-30"), "{bad}");
        }
    }
}
