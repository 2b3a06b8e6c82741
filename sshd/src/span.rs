//! Spans of time as people write them: `90s`, `30m`, `2h`, `1d12h`.

const UNITS: &[(char, u32)] = &[('d', 86_400), ('h', 3600), ('m', 60), ('s', 1)];

/// Seconds; a number without a unit is seconds.
pub fn parse(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(seconds) => Ok(seconds),
        Err(_) => parse_with_units(text),
    }
}

/// Seconds; every number has a unit, each unit at most once, larger ones first.
pub fn parse_with_units(text: &str) -> Result<u32, String> {
    let wrong = || format!("\"{text}\" is no span of time; write for example 30m, 2h or 1d12h");
    let too_long = || format!("{text} is longer than can be");
    let mut units = UNITS.iter();
    let mut seconds: u32 = 0;
    let mut rest = text.trim();
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, after) = rest.split_at(digits);
        let unit = after.chars().next().ok_or_else(wrong)?;
        let (_, length) = units.find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        // No digits at all are no number; too many are too long.
        let number = match number {
            "" => return Err(wrong()),
            number => number.parse::<u32>().map_err(|_| too_long())?,
        };
        seconds = number
            .checked_mul(*length)
            .and_then(|more| seconds.checked_add(more))
            .ok_or_else(too_long)?;
        rest = &after[1..];
    }
    if text.trim().is_empty() { Err(wrong()) } else { Ok(seconds) }
}

/// `1d12h`.
pub fn show(seconds: u32) -> String {
    let mut left = seconds;
    let mut text = String::new();
    for (name, length) in UNITS {
        if left >= *length {
            text.push_str(&format!("{}{name}", left / length));
            left %= length;
        }
    }
    if text.is_empty() { "0s".into() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_as_written_and_shown_so() {
        for (text, seconds) in [
            ("90s", 90),
            ("30m", 1800),
            ("2h", 7200),
            ("1d12h", 129_600),
            ("1h30m5s", 5405),
            ("0s", 0),
        ] {
            assert_eq!(parse_with_units(text), Ok(seconds), "{text}");
        }
        for (seconds, text) in [(0, "0s"), (90, "1m30s"), (7200, "2h"), (129_600, "1d12h")] {
            assert_eq!(show(seconds), text);
            assert_eq!(parse_with_units(text), Ok(seconds));
        }
        assert_eq!((parse("60"), parse("1m")), (Ok(60), Ok(60)));
    }

    #[test]
    fn what_is_no_span_is_refused_with_an_example() {
        for bad in ["", " ", "h", "2", "2 h", "-1h", "1.5h", "1h1h", "1m2h", "2w", "1h30", "1hé"] {
            let error = parse_with_units(bad).unwrap_err();
            assert!(error.contains("2h"), "{bad}: {error}");
        }
        for long in ["99999999999s", "60000d", "4294967295s1s"] {
            assert!(parse_with_units(long).is_err(), "{long}");
        }
    }
}
