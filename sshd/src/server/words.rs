//! SSH's values in ours, and strangers' words for the log.

use hermitage_guest_proto::Window;
use russh::{ChannelOpenFailure, Sig, server::Auth};

use super::crypto::methods;

/// Try again, with any method.
pub fn again() -> Auth {
    Auth::Reject { proceed_with_methods: Some(methods()), partial_success: false }
}

/// SSH_OPEN_RESOURCE_SHORTAGE (RFC 4254 §5.1).
pub fn shortage(reason: String) -> ChannelOpenFailure {
    ChannelOpenFailure::Other { code: 4, reason }
}

pub fn window(columns: u32, rows: u32, width_px: u32, height_px: u32) -> Window {
    let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    Window {
        columns: clamp(columns),
        rows: clamp(rows),
        width_px: clamp(width_px),
        height_px: clamp(height_px),
    }
}

/// The signals of RFC 4254 §6.10; others are not passed on.
pub fn signal_name(signal: &Sig) -> Option<&'static str> {
    Some(match signal {
        Sig::ABRT => "ABRT",
        Sig::ALRM => "ALRM",
        Sig::FPE => "FPE",
        Sig::HUP => "HUP",
        Sig::ILL => "ILL",
        Sig::INT => "INT",
        Sig::KILL => "KILL",
        Sig::PIPE => "PIPE",
        Sig::QUIT => "QUIT",
        Sig::SEGV => "SEGV",
        Sig::TERM => "TERM",
        Sig::USR1 => "USR1",
        Sig::Custom(name) if name == "USR2" => "USR2",
        Sig::Custom(_) => return None,
    })
}

/// A stranger's words for the log.
pub fn shown(words: &str) -> String {
    words.chars().take(64).flat_map(char::escape_default).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strangers_name_can_not_write_log_lines() {
        assert_eq!(shown("a\nb\x1b[2J"), "a\\nb\\u{1b}[2J");
        assert_eq!(shown(&"é".repeat(1000)).len(), 64 * 6);
    }

    #[test]
    fn a_giant_window_is_clamped() {
        assert_eq!(window(u32::MAX, 0, 1, 2).columns, u16::MAX);
    }
}
