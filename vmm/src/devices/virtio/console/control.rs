//! The control queue's conversation about ports (virtio 1.2 §5.3.6.2).
//!
//! What the host still has to say is kept as a few flags a port, not as a list of messages: a guest
//! that asks a million times is answered once.

use serde::{Deserialize, Serialize};

use super::TERMINALS;

/// Port number in messages that concern no port: the value Linux uses.
const NO_PORT: u32 = u32::MAX;

mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// Length of a message without a name.
pub const MESSAGE: usize = 8;

/// A message's fixed part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub port: u32,
    pub event: u16,
    pub value: u16,
}

impl Message {
    pub fn decode(raw: [u8; MESSAGE]) -> Self {
        let [p0, p1, p2, p3, e0, e1, v0, v1] = raw;
        Self {
            port: u32::from_le_bytes([p0, p1, p2, p3]),
            event: u16::from_le_bytes([e0, e1]),
            value: u16::from_le_bytes([v0, v1]),
        }
    }

    pub fn encode(self) -> [u8; MESSAGE] {
        let [p0, p1, p2, p3] = self.port.to_le_bytes();
        let [e0, e1] = self.event.to_le_bytes();
        let [v0, v1] = self.value.to_le_bytes();
        [p0, p1, p2, p3, e0, e1, v0, v1]
    }
}

/// What was said about a port, and what is still to be said, in the order of the fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortControl {
    /// A program in the guest has the port open.
    pub guest_open: bool,
    say_add: bool,
    say_name: bool,
    say_open: bool,
}

/// The host's side of the conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    pub ports: [PortControl; TERMINALS],
}

impl Control {
    /// Takes a message of the driver. Unknown ports and events are passed over: later revisions may
    /// have more of them.
    pub fn hear(&mut self, message: Message) {
        if message.event == event::DEVICE_READY && message.value == 1 {
            self.ports.iter_mut().for_each(|port| port.say_add = true);
            return;
        }
        let Some(port) = self.ports.get_mut(message.port as usize) else { return };
        match (message.event, message.value) {
            // Every port is open on the host's side from the start: whether somebody is attached is
            // not the guest's business, and what it writes to nobody is dropped.
            (event::PORT_READY, 1) => (port.say_name, port.say_open) = (true, true),
            (event::PORT_OPEN, value) => port.guest_open = value == 1,
            _ => {}
        }
    }

    /// The next message for the driver, which stays next until [`said`](Self::said).
    pub fn next(&self) -> Option<Vec<u8>> {
        let (port, state) = self.ports.iter().enumerate().find(|(_, port)| port.has_to_say())?;
        let message = |event, value| {
            Message { port: u32::try_from(port).unwrap_or(NO_PORT), event, value }.encode().to_vec()
        };
        Some(if state.say_add {
            message(event::PORT_ADD, 1)
        } else if state.say_name {
            let mut named = message(event::PORT_NAME, 1);
            named.extend(format!("terminal.{port}").bytes());
            named
        } else {
            message(event::PORT_OPEN, 1)
        })
    }

    /// The message that [`next`](Self::next) gave is in the queue.
    pub fn said(&mut self) {
        let Some(port) = self.ports.iter_mut().find(|port| port.has_to_say()) else { return };
        if port.say_add {
            port.say_add = false;
        } else if port.say_name {
            port.say_name = false;
        } else {
            port.say_open = false;
        }
    }
}

impl PortControl {
    fn has_to_say(&self) -> bool {
        self.say_add || self.say_name || self.say_open
    }
}
