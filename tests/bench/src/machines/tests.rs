//! The client's half, against a thread that says what a machine and its agent say.

use std::{os::fd::OwnedFd, os::unix::net::UnixStream, thread};

use hermitage_vmm_proto::message_pair;
use serde::Serialize;

use super::*;

/// A machine's far ends.
struct Far {
    control: OwnedFd,
    agent: UnixStream,
}

fn machine() -> (Machine, Far) {
    let (control, far_control) = message_pair(false).unwrap();
    let (agent, far_agent) = stream_pair(true).unwrap();
    let far_agent = UnixStream::from(far_agent);
    far_agent.set_nonblocking(false).unwrap();
    let far = Far { control: far_control, agent: far_agent };
    (Machine::new(1, clock::now(), control, agent), far)
}

impl Far {
    fn tell(&self, event: MachineEvent) {
        send(&self.control, &event, &[]).unwrap();
    }

    fn say(&mut self, message: &impl Serialize) {
        // Byte by byte: frames come in any pieces.
        for byte in encode(message).unwrap() {
            self.agent.write_all(&[byte]).unwrap();
        }
    }

    fn hear(&mut self) -> HostMessage {
        let mut decoder = Decoder::default();
        let mut byte = [0];
        loop {
            self.agent.read_exact(&mut byte).unwrap();
            decoder.feed(&byte);
            if let Some(message) = decoder.message().unwrap() {
                return message;
            }
        }
    }
}

#[test]
fn a_start_is_timed_step_by_step() {
    let (mut machine, mut far) = machine();
    let guest = thread::spawn(move || {
        far.tell(MachineEvent::Running { at: clock::now(), stages: vec![] });
        far.say(&AgentMessage::Awake);
        far.say(&AgentMessage::Attached);
        let attach = receive::<MachineRequest>(&far.control).unwrap();
        assert_eq!(attach.message, MachineRequest::AttachTerminal { terminal: 0, redraw: None });
        assert!(matches!(far.hear(), HostMessage::OpenTerminal(open) if open.terminal == 0));
        far.say(&AgentMessage::Started { session: 1, pid: 9 });
        let mut terminal = UnixStream::from(attach.descriptors.into_iter().next().unwrap());
        terminal.set_nonblocking(false).unwrap();
        // More than a socket holds: when the last of it is written, the first of it has been read.
        terminal.write_all(&b"Welcome\r\n".repeat(100_000)).unwrap();
        let asks = clock::now();
        terminal.write_all(b"bench@bench-1:~$ ").unwrap();
        assert_eq!(far.hear(), HostMessage::PowerOff { grace_ms: 1000 });
        far.tell(MachineEvent::Ended(End::PowerOff));
        asks
    });
    let (running, stages) = machine.running().unwrap();
    assert!(stages.is_empty());
    let (awake, attached) = machine.attached().unwrap();
    let terminal = machine.open_terminal().unwrap();
    assert!(machine.asked_at <= running && running <= awake && awake <= attached);
    assert!(attached < terminal.first_byte);
    machine.power_off().unwrap();
    let asks = guest.join().unwrap();
    assert!(terminal.first_byte < asks && asks <= terminal.prompt);
}

#[test]
fn a_machine_that_dies_is_told_from_a_host_that_fails() {
    let (mut one, far) = machine();
    far.tell(MachineEvent::Ended(End::Reset));
    assert!(one.attached().unwrap_err().is::<Died>());

    let (mut one, far) = machine();
    drop(far);
    assert!(one.attached().unwrap_err().is::<Died>());

    let (mut one, far) = machine();
    far.tell(MachineEvent::Ended(End::HostError("KVM_RUN: no".into())));
    let error = one.running().unwrap_err();
    assert!(!error.is::<Died>() && error.to_string().contains("KVM_RUN: no"), "{error}");
}

#[test]
fn a_refusal_of_the_agent_is_passed_on() {
    let (mut machine, mut far) = machine();
    far.say(&AgentMessage::AttachFailed { reason: "no disk".into() });
    let error = machine.attached().unwrap_err().to_string();
    assert!(error.contains("no disk"), "{error}");
}
