//! Stands in for a machine's process: terminals and streams by socket, and the "guest" behind them
//! ([`crate::fake_agent`]).

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use hermitage_storage::{
    base::BaseId,
    disk::tag,
    snapshot::{Description, Snapshot, Writer},
    sparse::{copy, data_bytes},
};
use hermitage_vmm_proto::{End, MachineEvent, MachineRequest, Stage, receive, send};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::fake_agent;

pub struct Machine {
    control: OwnedFd,
    pub agent: Mutex<UnixStream>,
    terminals: Mutex<[Terminal; 8]>,
    streams: Mutex<HashMap<u64, UnixStream>>,
    stream_came: Condvar,
    /// The guest stands still.
    pub stands: AtomicBool,
    /// A snapshot was made with somebody at a terminal: the machine may only go on.
    pub saved_while_attached: AtomicBool,
    /// What becomes a copy of the disk, as long as that takes.
    copying: Mutex<Option<(u64, File)>>,
    /// The account's disk; its lock is this process's as long as it lives.
    disk: File,
}

#[derive(Default)]
struct Terminal {
    socket: Option<UnixStream>,
    /// All that was shown: a screen that a later client gets redrawn.
    shown: Vec<u8>,
    /// Where what is typed goes.
    typing: Option<File>,
    /// Whose program runs on it.
    session: Option<u64>,
}

/// What is left of a terminal in a snapshot.
type Slept = (u64, u8, Vec<u8>);

/// The account of this machine; it says how the machine misbehaves.
fn label() -> String {
    std::env::var("HERMITAGE_LABEL").unwrap()
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
        stands: AtomicBool::new(false),
        saved_while_attached: AtomicBool::new(false),
        copying: Mutex::default(),
        disk: disk.into(),
    });
    if std::env::var_os("HERMITAGE_RESUME").is_some() {
        machine.restore();
    }
    let stage = Stage { name: "fork process".into(), nanoseconds: 400_000 };
    machine.event(&MachineEvent::Running { at: 0, stages: vec![stage] });
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
        let attached =
            !matches!(request, MachineRequest::Save { .. } | MachineRequest::CopyDisk { .. });
        let socket = descriptors.into_iter().next().map(|descriptor| {
            let socket = UnixStream::from(descriptor);
            if attached {
                socket.set_nonblocking(false).unwrap();
            }
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
            MachineRequest::Stats | MachineRequest::Go => {}
            MachineRequest::Continue => self.saved_while_attached.store(false, Ordering::SeqCst),
            MachineRequest::Save { account, disk_tag } => {
                let file = File::from(OwnedFd::from(socket.unwrap()));
                self.save(&file, account, disk_tag);
            }
            MachineRequest::Stop => {
                let attached = self.saved_while_attached.load(Ordering::SeqCst);
                assert!(!attached, "put to rest as it was saved while attached");
                self.end(End::Stopped)
            }
            MachineRequest::CopyDisk { copy, room } => {
                let file = File::from(OwnedFd::from(socket.unwrap()));
                self.copy_disk(copy, file, room);
            }
            MachineRequest::CancelCopy { copy } => self.no_copy(Some(copy), "it was called off"),
        }
    }

    /// "mixedcopy" has a word left of the copy before. "slowcopy" takes until it is called off, but 4 s at most; of "standing" the guest stands still for long.
    fn copy_disk(self: &Arc<Self>, number: u64, file: File, room: u64) {
        assert!(self.stands.load(Ordering::SeqCst), "a copy, and the guest does not stand still");
        assert_eq!(file.metadata().unwrap().len(), 0);
        if label().starts_with("fullcopy") {
            let reason = format!("a copy takes much, and there is room for {}", room.min(1));
            return self.event(&MachineEvent::CopyFailed { copy: number, reason });
        }
        if label().starts_with("mixedcopy") {
            let reason = "it was called off".into();
            self.event(&MachineEvent::CopyBegun { copy: number - 1, bytes: 7 });
            self.event(&MachineEvent::CopyFailed { copy: number - 1, reason });
        }
        if label().starts_with("standing") {
            std::thread::sleep(Duration::from_millis(1500));
        }
        let bytes = data_bytes(&self.disk).unwrap();
        copy(&self.disk, &file).unwrap();
        self.event(&MachineEvent::CopyBegun { copy: number, bytes });
        if !label().starts_with("slowcopy") {
            return self.event(&MachineEvent::CopyDone { copy: number, bytes });
        }
        *self.copying.lock().unwrap() = Some((number, file));
        let machine = self.clone();
        let mine = move |copying: &Option<(u64, File)>| {
            copying.as_ref().is_some_and(|(copying, _)| *copying == number)
        };
        std::thread::spawn(move || {
            for part in 0..40 {
                std::thread::sleep(Duration::from_millis(100));
                if !mine(&machine.copying.lock().unwrap()) {
                    return;
                }
                let bytes = bytes * part / 40;
                machine.event(&MachineEvent::CopyProgress { copy: number, bytes });
            }
            let mut copying = machine.copying.lock().unwrap();
            if mine(&copying) {
                *copying = None;
                machine.event(&MachineEvent::CopyDone { copy: number, bytes });
            }
        });
    }

    fn no_copy(&self, which: Option<u64>, reason: &str) {
        let mut copying = self.copying.lock().unwrap();
        let given_up = copying.take_if(|(number, _)| which.is_none_or(|which| which == *number));
        if let Some((copy, _)) = given_up {
            self.event(&MachineEvent::CopyFailed { copy, reason: reason.into() });
        }
    }

    fn save(&self, file: &File, account: [u8; 16], disk_tag: [u8; 16]) {
        self.no_copy(None, "the machine is being saved");
        if label().starts_with("unsaveable") {
            let reason = "no space left on device".into();
            return self.event(&MachineEvent::SaveFailed { reason });
        }
        if label().starts_with("slowsave") {
            std::thread::sleep(Duration::from_secs(2));
        }
        let terminals = self.terminals.lock().unwrap();
        // As much as a user may do whose machine goes on.
        let attached = terminals.iter().any(|terminal| terminal.socket.is_some());
        self.saved_while_attached.store(attached, Ordering::SeqCst);
        let slept: Vec<Slept> = terminals
            .iter()
            .enumerate()
            .filter_map(|(n, t)| Some((t.session?, n as u8, t.shown.clone())))
            .collect();
        let base = PathBuf::from(std::env::var_os("HERMITAGE_BASE").unwrap());
        let description = Description {
            base: BaseId::parse(base.file_name().unwrap().to_str().unwrap()).unwrap(),
            account: uuid::Uuid::from_bytes(account),
            disk_tag,
            created: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
                as i64,
            ram: std::env::var("HERMITAGE_MEMORY").unwrap().parse().unwrap(),
            vcpus: 1,
            state_version: 1,
        };
        let state = serde_json::to_vec(&slept).unwrap();
        let header = Writer::new(file).unwrap().finish(description, &state).unwrap();
        let bytes = header.file_bytes();
        self.event(&MachineEvent::Saved { bytes, pages: 0, stages: vec![] });
    }

    /// Takes up a snapshot and waits for the word to run.
    fn restore(&self) {
        // SAFETY: descriptor 6 was passed by the fake fork server; nothing else uses it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(6) });
        let refuse = |reason: String| -> ! { self.end(End::SnapshotRefused(reason)) };
        if label().starts_with("refused") {
            refuse("its data was altered".into());
        }
        let snapshot = Snapshot::open(file).unwrap_or_else(|error| refuse(error.to_string()));
        let slept: Vec<Slept> = serde_json::from_slice(&snapshot.state).unwrap();
        for (session, terminal, shown) in slept {
            let state = &mut self.terminals.lock().unwrap()[usize::from(terminal)];
            *state = Terminal { session: Some(session), shown, ..Terminal::default() };
        }
        self.event(&MachineEvent::Restored { stages: vec![] });
        let go = receive::<MachineRequest>(&self.control).map(|packet| packet.message);
        assert_eq!(go.ok(), Some(MachineRequest::Go));
        assert_eq!(tag(&self.disk).unwrap(), None, "run before it was consumed");
    }

    /// The sessions there are, by terminal.
    /// Whether no machine has used this disk before; from now on one has.
    pub fn is_first(&self) -> bool {
        let mut byte = [0];
        self.disk.read_exact_at(&mut byte, 0).unwrap();
        self.disk.write_all_at(&[1], 0).unwrap();
        byte == [0]
    }

    pub fn sessions(&self) -> Vec<(u64, u8)> {
        let terminals = self.terminals.lock().unwrap();
        let numbered = terminals.iter().enumerate();
        numbered.filter_map(|(n, terminal)| Some((terminal.session?, n as u8))).collect()
    }

    /// A program that was saved is there again.
    pub fn took_up(&self, terminal: u8, typing: File) {
        self.terminals.lock().unwrap()[usize::from(terminal)].typing = Some(typing);
    }

    pub fn exited(&self, session: u64) {
        for terminal in self.terminals.lock().unwrap().iter_mut() {
            if terminal.session == Some(session) {
                (terminal.session, terminal.typing) = (None, None);
            }
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
    pub fn opened(&self, terminal: u8, session: u64, typing: File) {
        loop {
            let mut terminals = self.terminals.lock().unwrap();
            let state = &mut terminals[usize::from(terminal)];
            if state.socket.is_some() {
                (state.typing, state.session) = (Some(typing), Some(session));
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
