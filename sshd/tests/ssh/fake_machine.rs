//! Stands in for a machine's process: terminals and streams by socket, and the "guest" behind them
//! ([`crate::fake_agent`]).

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use hermitage_vmm_proto::{End, MachineEvent, MachineRequest, receive, send};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::fake_agent;

pub struct Machine {
    control: OwnedFd,
    pub agent: Mutex<UnixStream>,
    terminals: Mutex<[Terminal; 8]>,
    streams: Mutex<HashMap<u64, UnixStream>>,
    stream_came: Condvar,
    /// The account's disk; its lock is this process's as long as it lives.
    _disk: OwnedFd,
}

#[derive(Default)]
struct Terminal {
    socket: Option<UnixStream>,
    /// All that was shown: a screen that a later client gets redrawn.
    shown: Vec<u8>,
    /// Where what is typed goes.
    typing: Option<File>,
}

pub fn run() -> ! {
    // SAFETY: descriptors 3, 4 and 5 were passed by the fake fork server; nothing else uses them.
    let [control, agent, disk] = [3, 4, 5].map(|number| unsafe { OwnedFd::from_raw_fd(number) });
    for descriptor in [&control, &disk] {
        let flag = FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC);
        fcntl(descriptor, flag).unwrap();
    }
    let agent = UnixStream::from(agent);
    fcntl(&agent, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    agent.set_nonblocking(false).unwrap();
    let reading = agent.try_clone().unwrap();
    let machine = Arc::new(Machine {
        control,
        agent: Mutex::new(agent),
        terminals: Mutex::default(),
        streams: Mutex::default(),
        stream_came: Condvar::new(),
        _disk: disk,
    });
    machine.event(&MachineEvent::Running { at: 0, stages: vec![] });
    let guest = machine.clone();
    std::thread::spawn(move || fake_agent::run(&guest, reading));
    loop {
        match receive::<MachineRequest>(&machine.control) {
            Ok(packet) => machine.request(packet.message, packet.descriptors),
            // The service is gone; the agent sees that too and powers off.
            Err(_) => std::thread::park(),
        }
    }
}

impl Machine {
    fn request(self: &Arc<Self>, request: MachineRequest, descriptors: Vec<OwnedFd>) {
        let socket = descriptors.into_iter().next().map(|descriptor| {
            let socket = UnixStream::from(descriptor);
            socket.set_nonblocking(false).unwrap();
            socket
        });
        match request {
            MachineRequest::AttachTerminal { terminal, redraw } => {
                let mut socket = socket.unwrap();
                let reading = socket.try_clone().unwrap();
                let mut terminals = self.terminals.lock().unwrap();
                let state = &mut terminals[usize::from(terminal)];
                match redraw {
                    Some((columns, rows)) => {
                        write!(socket, "[redrawn {columns}x{rows}]").unwrap();
                        socket.write_all(&state.shown).unwrap();
                    }
                    None => *state = Terminal::default(),
                }
                state.socket = Some(socket);
                let machine = self.clone();
                std::thread::spawn(move || machine.type_from(terminal, reading));
            }
            MachineRequest::ResizeTerminal { .. } => {}
            MachineRequest::DetachTerminal { terminal } => {
                let taken = self.terminals.lock().unwrap()[usize::from(terminal)].socket.take();
                if let Some(socket) = taken {
                    let _ = socket.shutdown(Shutdown::Both);
                }
                self.event(&MachineEvent::TerminalDetached { terminal });
            }
            MachineRequest::Connect { stream, .. } => {
                let machine = self.clone();
                let mut socket = socket.unwrap();
                std::thread::spawn(move || {
                    let mut token = [0; 8];
                    socket.read_exact(&mut token).unwrap();
                    let mut streams = machine.streams.lock().unwrap();
                    streams.insert(u64::from_le_bytes(token), socket);
                    machine.stream_came.notify_all();
                });
                self.event(&MachineEvent::Connected { stream });
            }
            MachineRequest::AttachConsole => {
                let mut socket = socket.unwrap();
                std::thread::spawn(move || {
                    socket.write_all(b"fake boot log\n").unwrap();
                    let mut byte = [0];
                    while socket.read(&mut byte).is_ok_and(|count| count > 0) {
                        socket.write_all(&byte.map(|b| b.to_ascii_uppercase())).unwrap();
                    }
                });
            }
            MachineRequest::Stats | MachineRequest::Continue | MachineRequest::Go => {}
            MachineRequest::Save { .. } => {
                self.event(&MachineEvent::SaveFailed { reason: "it is a fake".into() });
            }
            MachineRequest::Stop => self.end(End::Stopped),
        }
    }

    pub fn event(&self, event: &MachineEvent) {
        let _ = send(&self.control, event, &[]);
    }

    pub fn end(&self, end: End) -> ! {
        self.event(&MachineEvent::Ended(end));
        std::process::exit(0)
    }

    /// The stream that the host opened for `token`.
    pub fn stream(&self, token: u64) -> UnixStream {
        let mut streams = self.streams.lock().unwrap();
        loop {
            if let Some(stream) = streams.remove(&token) {
                return stream;
            }
            streams = self.stream_came.wait(streams).unwrap();
        }
    }

    /// What a terminal shows; only remembered while nobody is attached.
    pub fn show(&self, terminal: u8, bytes: &[u8]) {
        let mut terminals = self.terminals.lock().unwrap();
        let state = &mut terminals[usize::from(terminal)];
        state.shown.extend(bytes);
        let socket = state.socket.as_ref().map(|socket| socket.try_clone().unwrap());
        drop(terminals);
        if let Some(mut socket) = socket {
            let _ = socket.write_all(bytes);
        }
    }

    /// A program has opened a terminal. It is attached over another socket, so perhaps a moment later.
    pub fn opened(&self, terminal: u8, typing: File) {
        loop {
            let mut terminals = self.terminals.lock().unwrap();
            let state = &mut terminals[usize::from(terminal)];
            if state.socket.is_some() {
                state.typing = Some(typing);
                return;
            }
            drop(terminals);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn type_from(&self, terminal: u8, mut socket: UnixStream) {
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = socket.read(&mut chunk) {
            let typing = loop {
                let terminals = self.terminals.lock().unwrap();
                match &terminals[usize::from(terminal)].typing {
                    Some(typing) => break typing.try_clone().unwrap(),
                    None => drop(terminals),
                }
                std::thread::sleep(Duration::from_millis(1));
            };
            let _ = (&typing).write_all(&chunk[..count]);
        }
    }
}
