//! Flow control of one connection (virtio 1.2 §5.10.6.3): each side says how much room it has
//! (`buf_alloc`) and how many bytes it has passed on so far (`fwd_cnt`). All counts wrap at 2³².

use std::num::Wrapping;

use serde::{Deserialize, Serialize};

/// Room for bytes of the guest that the host's socket has not taken yet.
pub const BUFFER: u32 = 256 * 1024;

/// The guest is told once this much room came back. Less would be an interrupt for every packet; the
/// guest can't be out of credit while less is missing, as all of it is more.
const REPORT: u32 = BUFFER / 4;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// The guest's room, and what it has passed on, as it last said.
    peer_room: u32,
    peer_forwarded: Wrapping<u32>,
    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    /// Bytes received from the guest, and of these, taken by the socket.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest was last told.
    reported: Wrapping<u32>,
}

impl Credit {
    /// The guest's fields of a header.
    pub fn hear(&mut self, room: u32, forwarded: u32) {
        self.peer_room = room;
        self.peer_forwarded = Wrapping(forwarded);
    }

    /// How many bytes the guest has room for.
    pub fn guest_room(&self) -> u32 {
        let on_the_way = (self.sent - self.peer_forwarded).0;
        // Less than nothing if the guest took room back, or lies.
        self.peer_room.saturating_sub(on_the_way)
    }

    pub fn sent(&mut self, count: u32) {
        self.sent += count;
    }

    /// Bytes have come from the guest. False if they are more than it was allowed.
    #[must_use]
    pub fn received(&mut self, count: u32) -> bool {
        if count > BUFFER - self.held() {
            return false;
        }
        self.received += count;
        true
    }

    /// The socket has taken bytes, or they were thrown away.
    pub fn forwarded(&mut self, count: u32) {
        self.forwarded += count;
    }

    /// Bytes received and not yet taken.
    pub fn held(&self) -> u32 {
        (self.received - self.forwarded).0
    }

    /// Whether the guest should hear of the room it has got back.
    pub fn report_due(&self) -> bool {
        (self.forwarded - self.reported).0 >= REPORT
    }

    /// What to put into a header: `buf_alloc` and `fwd_cnt`. The guest knows from then on.
    pub fn report(&mut self) -> (u32, u32) {
        self.reported = self.forwarded;
        (BUFFER, self.forwarded.0)
    }

    /// Whether these counts can be those of a connection with nothing under way in this process.
    pub fn is_settled(&self) -> bool {
        self.held() == 0 && (self.forwarded - self.reported).0 <= BUFFER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_gets_exactly_the_room_there_is() {
        let mut credit = Credit::default();
        assert!(credit.received(BUFFER));
        assert!(!credit.received(1));
        credit.forwarded(10);
        assert!(!credit.report_due());
        assert!(credit.received(10));
        credit.forwarded(REPORT);
        assert!(credit.report_due());
        assert_eq!(credit.report(), (BUFFER, 10 + REPORT));
        assert!(!credit.report_due());
    }

    #[test]
    fn counts_wrap() {
        let mut credit = Credit::default();
        for _ in 0..70_000 {
            assert!(credit.received(BUFFER));
            credit.forwarded(BUFFER);
            credit.sent(65536);
            credit.hear(65536, credit.sent.0);
        }
        assert_eq!((credit.held(), credit.guest_room()), (0, 65536));
        credit.sent(65536);
        assert_eq!(credit.guest_room(), 0);
    }

    #[test]
    fn a_guest_that_takes_room_back_is_sent_nothing() {
        let mut credit = Credit::default();
        credit.hear(1000, 0);
        credit.sent(1000);
        credit.hear(10, 500);
        assert_eq!(credit.guest_room(), 0);
        // More forwarded than was ever sent.
        credit.hear(u32::MAX, 5000);
        assert!(credit.guest_room() < u32::MAX);
    }
}
