//! Times as people and programs read them: UTC, RFC 3339.

use std::time::{Duration, SystemTime};

/// Seconds since 1970-01-01 UTC as `2026-11-21T05:24:15Z`.
pub fn rfc3339(seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
}

/// The same with milliseconds: `2026-11-21T05:24:15.123Z`.
pub fn rfc3339_ms(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = rfc3339(since.as_secs().try_into().unwrap_or(i64::MAX));
    format!("{}.{:03}Z", seconds.trim_end_matches('Z'), since.subsec_millis())
}

/// The same, shorter: `2026-11-21 05:24`.
pub fn short(seconds: i64) -> String {
    rfc3339(seconds)[..16].replace('T', " ")
}

/// As names have it: `20261121-052415`.
pub fn name(seconds: i64) -> String {
    rfc3339(seconds).replace(['-', ':', 'Z'], "").replace('T', "-")
}

/// Now, in seconds since 1970-01-01 UTC.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_secs().try_into().unwrap_or(i64::MAX)
}

/// Whole milliseconds, at most what the type holds.
pub fn ms(span: Duration) -> u64 {
    span.as_millis().try_into().unwrap_or(u64::MAX)
}

/// Days since 1970-01-01 as year, month, day of the Gregorian calendar. Years are counted from March, so
/// that the leap day comes last and a month's start follows from its number: (153 m + 2) / 5.
fn civil(days: i64) -> (i64, i64, i64) {
    const DAYS_IN_400_YEARS: i64 = 146_097;
    let from_march_0000 = days + 719_468;
    let cycle = from_march_0000.div_euclid(DAYS_IN_400_YEARS);
    let day = from_march_0000.rem_euclid(DAYS_IN_400_YEARS);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (cycle * 400 + year, if month < 10 { month + 3 } else { month - 9 });
    (if month <= 2 { year + 1 } else { year }, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_date_1() {
        // date -u -d @N +%FT%TZ
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_868_799, "2000-02-29T23:59:59Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (-1, "1969-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(seconds), expected);
        }
        assert_eq!(short(951_868_800), "2000-03-01 00:00");
        assert_eq!(name(951_782_399), "20000228-235959");
        let later = SystemTime::UNIX_EPOCH + Duration::from_millis(951_868_800_007);
        assert_eq!(rfc3339_ms(later), "2000-03-01T00:00:00.007Z");
    }

    #[test]
    fn a_span_is_told_in_whole_milliseconds() {
        assert_eq!(ms(Duration::from_micros(7_999)), 7);
        assert_eq!(ms(Duration::MAX), u64::MAX);
    }
}
