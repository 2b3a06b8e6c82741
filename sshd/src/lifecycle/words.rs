//! How a machine came to be and why it is awake or asleep, in a few words.

use std::time::Duration;

use super::state::Awake;
use crate::time;

pub fn resumed(age: Duration, bytes: u64, took: Duration) -> String {
    format!("resumed from {} ago ({}, {} ms)", span(age), size(bytes), took.as_millis())
}

pub fn cold(why: &str) -> String {
    format!("cold start: {why}; your files are all here")
}

/// What a resumed machine was doing when it was saved.
pub fn paused(who: &str) -> String {
    format!("{who} was paused meanwhile")
}

/// What kept a machine awake that somebody comes back to.
pub fn still_running(awake: &Awake) -> String {
    let who = match awake {
        Awake::Work(work) => &work.who,
        Awake::Held(_) => "its operator's hold",
    };
    format!("still running: {who} kept this machine awake")
}

pub fn awake(awake: &Awake) -> String {
    match awake {
        Awake::Work(work) => work.to_string(),
        Awake::Held(until) => format!("held until {} UTC", time::short(*until)),
    }
}

pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{} KiB", bytes.div_ceil(1024)),
        1_048_576..104_857_600 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// A span of time in its largest unit.
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    let (count, unit) = match seconds {
        0..120 => return format!("{seconds} s"),
        120..7200 => return format!("{} min", seconds / 60),
        7200..172_800 => (seconds / 3600, "hours"),
        _ => (seconds / 86_400, "days"),
    };
    format!("{count} {unit}")
}

#[cfg(test)]
mod tests {
    use super::{super::state::Work, *};

    #[test]
    fn the_line_is_short() {
        let line = resumed(Duration::from_secs(200), 2_202_009, Duration::from_millis(9));
        assert_eq!(line, "resumed from 3 min ago (2.1 MiB, 9 ms)");
        assert_eq!(span(Duration::from_secs(3 * 86_400 + 5)), "3 days");
        assert_eq!(span(Duration::from_secs(9)), "9 s");
        let work = Work { who: "make (pid 812)".into(), how: "97 % CPU".into() };
        let line = still_running(&Awake::Work(work));
        assert_eq!(line, "still running: make (pid 812) kept this machine awake");
        assert_eq!(awake(&Awake::Held(951_868_800)), "held until 2000-03-01 00:00 UTC");
        assert_eq!(span(Duration::from_secs(40_000)), "11 hours");
        assert_eq!((size(5000), size(500 << 20)), ("5 KiB".into(), "500 MiB".into()));
    }
}
