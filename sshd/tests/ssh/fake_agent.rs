//! Stands in for the agent: programs of this host instead of a guest's. An account's name says how it
//! misbehaves.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::CommandExt, process::ExitStatusExt},
    },
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use hermitage_guest_proto::{
    Activity, AgentMessage, Answer, Ask, Busy, Decoder, Exec, ExitStatus, HostMessage, LiveSession,
    OpenTerminal, Processes, Program, Resources, WaitsFor, Window, encode,
};
use hermitage_vmm_proto::End;
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    pty::{Winsize, openpty},
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use crate::{fake_forwarder, fake_machine::Machine};

/// Held while a program is started.
static STARTING: Mutex<()> = Mutex::new(());

/// The first time that it was to stand still is over.
static DEAF: AtomicBool = AtomicBool::new(false);

struct Guest {
    machine: Arc<Machine>,
    sessions: Mutex<HashMap<u64, Started>>,
    looks: AtomicU32,
    /// It has the account, and answers nothing any more.
    hangs: AtomicBool,
    /// Processes that there may be.
    most: Mutex<Option<u32>>,
    /// A question that is answered when it goes on.
    wished: Mutex<Option<u64>>,
    asked: AtomicU64,
    /// Who waits for an answer to what.
    asking: Mutex<HashMap<u64, mpsc::Sender<Answer>>>,
}

struct Started {
    group: Pid,
    /// The terminal's slave, to set its size.
    terminal: Option<OwnedFd>,
}

pub fn run(machine: &Arc<Machine>, mut from: UnixStream) {
    let guest = Arc::new(Guest {
        machine: machine.clone(),
        sessions: Mutex::default(),
        looks: AtomicU32::new(0),
        hangs: AtomicBool::new(false),
        most: Mutex::default(),
        wished: Mutex::default(),
        asked: AtomicU64::new(0),
        asking: Mutex::default(),
    });
    let mut decoder = Decoder::default();
    let mut account = String::new();
    let mut chunk = [0; 4096];
    loop {
        while let Some(message) = decoder.message::<HostMessage>().unwrap() {
            // In one piece: the service writes to the same file.
            let line = format!("guest told: {message:?}\n");
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            match message {
                _ if guest.hangs.load(Ordering::Relaxed) => {}
                HostMessage::Resume(_) => {
                    guest.machine.stands.store(false, Ordering::SeqCst);
                    guest.resume();
                    if let Some(question) = guest.wished.lock().unwrap().take() {
                        guest.tell_processes(question);
                    }
                }
                HostMessage::PowerOff { .. } if account == "stubborn" => {}
                HostMessage::PowerOff { .. } => guest.end(),
                HostMessage::LimitProcesses { question, most } => {
                    *guest.most.lock().unwrap() = most;
                    match guest.machine.stands.load(Ordering::SeqCst) {
                        true => *guest.wished.lock().unwrap() = Some(question),
                        false => guest.tell_processes(question),
                    }
                }
                // As the real one.
                _ if guest.machine.stands.load(Ordering::SeqCst) => {}
                HostMessage::Attach(attach) => {
                    account = attach.account;
                    attached(&guest, &account);
                }
                HostMessage::OpenTerminal(open) => {
                    let guest = guest.clone();
                    std::thread::spawn(move || guest.open_terminal(open));
                }
                HostMessage::Exec(exec) => {
                    let guest = guest.clone();
                    std::thread::spawn(move || guest.exec(exec));
                }
                HostMessage::Resize { session, window } => guest.resize(session, window),
                HostMessage::Signal { session, name } => {
                    let signal = format!("SIG{name}").parse().unwrap();
                    guest.signal(session, signal);
                }
                HostMessage::Hangup { session } => guest.signal(session, Signal::SIGHUP),
                HostMessage::SetClock(_) | HostMessage::Ping(_) | HostMessage::DiskRoom { .. } => {}
                HostMessage::Take(wanted) => {
                    let fault = machine_is("greedy").then(|| "there is \x1b[31mno CPU 3".into());
                    guest.say(&AgentMessage::Took { in_use: wanted, fault });
                }
                HostMessage::CountProcesses { .. } if machine_is("mute") => {}
                HostMessage::CountProcesses { question } => guest.tell_processes(question),
                HostMessage::Answer(answer) => {
                    if let Some(asking) = guest.asking.lock().unwrap().remove(&answer.number) {
                        let _ = asking.send(answer);
                    }
                }
                HostMessage::LookAtWork(_) if machine_is("mute") => {}
                HostMessage::LookAtWork(look) => guest.look_at_work(look.question),
                HostMessage::Freeze if machine_is("unfrozen") => {
                    let reason = "its disk does not answer".into();
                    guest.say(&AgentMessage::FreezeFailed { reason });
                }
                HostMessage::Freeze if machine_is("deaf") && !DEAF.swap(true, Ordering::SeqCst) => {
                    // Once.
                    std::thread::sleep(Duration::from_secs(35));
                    guest.say(&AgentMessage::Frozen);
                }
                HostMessage::Freeze => {
                    guest.machine.stands.store(true, Ordering::SeqCst);
                    guest.say(&AgentMessage::Frozen);
                }
            }
        }
        match from.read(&mut chunk) {
            Ok(count) if count > 0 => decoder.feed(&chunk[..count]),
            // The service is gone, and the machine goes with it.
            _ => guest.end(),
        }
    }
}

fn machine_is(hint: &str) -> bool {
    std::env::var("HERMITAGE_LABEL").is_ok_and(|label| label.starts_with(hint))
}

fn attached(guest: &Guest, account: &str) {
    match account {
        "unready" => return,
        "stumbling" if guest.machine.is_first() => return,
        "tripping" if guest.machine.is_first() => guest.machine.end(End::Reset),
        _ => {}
    }
    guest.say(&AgentMessage::Awake);
    match account {
        "broken" => {
            let reason = "its file system \x1b[31mis damaged".into();
            return guest.say(&AgentMessage::AttachFailed { reason });
        }
        "slow" => std::thread::sleep(Duration::from_secs(2)),
        _ => {}
    }
    if account == "hanging" && guest.machine.is_first() {
        guest.hangs.store(true, Ordering::Relaxed);
    }
    if account == "liar" {
        let fault = Some("of what nobody asked".into());
        guest.say(&AgentMessage::Took { in_use: Resources::default(), fault });
        let fault = Some("of what nobody asked".into());
        guest.say(&AgentMessage::Processes(Processes {
            question: 1,
            fault,
            ..Processes::default()
        }));
    }
    guest.say(&AgentMessage::Attached);
    if account == "hostile" {
        // About nothing that was asked for, then no frame at all.
        guest.say(&AgentMessage::Exited { session: 9999, status: ExitStatus::Code(0) });
        guest.say(&AgentMessage::Attached);
        guest.say(&AgentMessage::Started { session: u64::MAX, pid: 0 });
        let machine = guest.machine.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(700));
            let _ = machine.agent.lock().unwrap().write_all(&[0xff; 64]);
        });
    }
}

impl Guest {
    /// Powers off, programs and all.
    fn end(&self) -> ! {
        for started in self.sessions.lock().unwrap().values() {
            let _ = killpg(started.group, Signal::SIGKILL);
        }
        self.machine.end(End::PowerOff)
    }

    fn say(&self, message: &AgentMessage) {
        let frame = encode(message).unwrap();
        let _ = self.machine.agent.lock().unwrap().write_all(&frame);
    }

    fn signal(&self, session: u64, signal: Signal) {
        if let Some(started) = self.sessions.lock().unwrap().get(&session) {
            let _ = killpg(started.group, signal);
        }
    }

    fn resize(&self, session: u64, window: Window) {
        let sessions = self.sessions.lock().unwrap();
        let Some(slave) = sessions.get(&session).and_then(|started| started.terminal.as_ref())
        else {
            return;
        };
        let slave = slave.try_clone().unwrap();
        let (rows, columns) = (window.rows.to_string(), window.columns.to_string());
        let mut stty = Command::new("stty");
        stty.args(["rows", &rows, "cols", &columns]).stdin(slave);
        stty.status().unwrap();
    }

    /// The root of "lifter" is her own mistress.
    fn tell_processes(&self, question: u64) {
        let most = self.most.lock().unwrap().filter(|_| !machine_is("lifter"));
        let fault = machine_is("faulty").then(|| "there is \x1b[31mno pids.max".into());
        self.say(&AgentMessage::Processes(Processes { question, count: 37, most, fault }));
    }

    /// "busy" has something to do for ever, "busy2" for two looks.
    fn look_at_work(&self, question: u64) {
        let looks = self.looks.fetch_add(1, Ordering::Relaxed);
        let label = std::env::var("HERMITAGE_LABEL").unwrap();
        let works = match label.strip_prefix("busy") {
            Some(count) => count.parse().map_or(true, |count: u32| looks < count),
            None => false,
        };
        let make = Busy {
            pid: 812,
            name: "make\x1b[2J".into(),
            cpu_permille: 900,
            waits_for: WaitsFor::Nothing,
        };
        let idle = Activity { question, ..Activity::default() };
        let activity = match works {
            true => Activity { cpu_permille: 970, busy: vec![make], ..idle },
            false => idle,
        };
        self.say(&AgentMessage::Activity(activity));
    }

    /// After a save that was called off everything is there; in a resumed machine other shells stand in
    /// for those that slept.
    fn resume(self: &Arc<Self>) {
        let slept = self.machine.sessions();
        let sessions = slept
            .iter()
            .map(|&(session, terminal)| LiveSession { session, terminal: Some(terminal), pid: 1 })
            .collect();
        self.say(&AgentMessage::Resumed { sessions });
        for (session, terminal) in slept {
            if self.sessions.lock().unwrap().contains_key(&session) {
                continue;
            }
            let open = OpenTerminal {
                session,
                terminal,
                term: "dumb".into(),
                window: Window { columns: 80, rows: 24, ..Window::default() },
                modes: vec![],
                env: vec![("RESUMED".into(), "yes".into())],
                command: None,
                greeting: String::new(),
            };
            let guest = self.clone();
            std::thread::spawn(move || guest.run_terminal(open, true));
        }
    }

    fn open_terminal(&self, open: OpenTerminal) {
        self.run_terminal(open, false);
    }

    fn run_terminal(&self, open: OpenTerminal, resumed: bool) {
        let size = Winsize {
            ws_row: open.window.rows,
            ws_col: open.window.columns,
            ws_xpixel: open.window.width_px,
            ws_ypixel: open.window.height_px,
        };
        // Its descriptors must not be inherited by a program that is started at the same moment.
        let starting = STARTING.lock().unwrap();
        let mut sessions = self.sessions.lock().unwrap();
        let pty = openpty(Some(&size), None).unwrap();
        for descriptor in [&pty.master, &pty.slave] {
            fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
        }
        // Becomes the session's leader with the terminal as its own.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "env", "--default-signal=HUP", "sh"]);
        if let Some(line) = &open.command {
            command.arg("-c").arg(String::from_utf8(line.clone()).unwrap());
        }
        environment(&mut command, &open.env).env("TERM", &open.term).env("PS1", "fake$ ");
        let slave = || Stdio::from(pty.slave.try_clone().unwrap());
        command.stdin(slave()).stdout(slave()).stderr(slave());
        let child = command.spawn().unwrap();
        let slave = pty.slave.try_clone().unwrap();
        sessions.insert(open.session, Started { group: group_of(&child), terminal: Some(slave) });
        drop(command);
        drop((sessions, starting));
        let mut master = File::from(pty.master);
        match resumed {
            true => self.machine.took_up(open.terminal, master.try_clone().unwrap()),
            false => {
                self.machine.opened(open.terminal, open.session, master.try_clone().unwrap());
            }
        }
        let session = open.session;
        drop(pty.slave);
        if !resumed {
            self.say(&AgentMessage::Started { session, pid: child.id() });
        }
        let machine = self.machine.clone();
        let showing = std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            // EIO when the last process has closed the terminal.
            while let Ok(count @ 1..) = master.read(&mut chunk) {
                machine.show(open.terminal, &chunk[..count]);
            }
        });
        self.reap(session, child, move || showing.join().unwrap());
    }

    fn exec(&self, exec: Exec) {
        let stdio = self.machine.stream(exec.stdio);
        let stderr = self.machine.stream(exec.stderr);
        if exec.program == Program::Forwarder {
            self.say(&AgentMessage::Started { session: exec.session, pid: 1 });
            fake_forwarder::run(&self.machine, stdio);
            let status = ExitStatus::Code(0);
            return self.say(&AgentMessage::Exited { session: exec.session, status });
        }
        if let Program::Command(line) = &exec.program
            && let Some(questions) = line.strip_prefix(b"ask! ")
        {
            self.say(&AgentMessage::Started { session: exec.session, pid: 1 });
            self.ask(std::str::from_utf8(questions).unwrap(), File::from(OwnedFd::from(stdio)));
            let status = ExitStatus::Code(0);
            return self.say(&AgentMessage::Exited { session: exec.session, status });
        }
        let mut command = match &exec.program {
            Program::Shell => shell(),
            Program::Command(line) => {
                let mut command = shell();
                command.arg("-c").arg(String::from_utf8(line.clone()).unwrap());
                command
            }
            Program::Sftp => Command::new("/usr/lib/openssh/sftp-server"),
            Program::Forwarder => unreachable!(),
        };
        environment(&mut command, &exec.env)
            .stdin(OwnedFd::from(stdio.try_clone().unwrap()))
            .stdout(OwnedFd::from(stdio))
            .stderr(OwnedFd::from(stderr))
            .process_group(0);
        let starting = STARTING.lock().unwrap();
        let mut sessions = self.sessions.lock().unwrap();
        let child = command.spawn().unwrap();
        sessions.insert(exec.session, Started { group: group_of(&child), terminal: None });
        drop((sessions, starting));
        drop(command);
        self.say(&AgentMessage::Started { session: exec.session, pid: child.id() });
        self.reap(exec.session, child, || {});
    }

    /// `COUNT WORD ARGUMENT` of questions that are asked at once; then their answers, a line each, as they
    /// come. `end` as the count: ten thousand, and the machine ends. `xxx…` as the word: a quarter of a MiB.
    fn ask(&self, questions: &str, mut to: File) {
        let mut parts = questions.splitn(3, ' ');
        let (count, word) = (parts.next().unwrap(), parts.next().unwrap());
        let argument = parts.next().unwrap_or("").to_owned();
        let word = if word == "xxx…" { "x".repeat(250_000) } else { word.to_owned() };
        let many: usize = count.parse().unwrap_or(10_000);
        let (answers, answered) = mpsc::channel();
        let first = self.asked.fetch_add(many as u64, Ordering::Relaxed) + 1;
        for number in first..first + many as u64 {
            self.asking.lock().unwrap().insert(number, answers.clone());
            let (word, argument) = (word.clone(), argument.clone());
            self.say(&AgentMessage::Ask(Ask { number, word, argument }));
        }
        if count == "end" {
            self.end();
        }
        // Refusals beyond what an agent takes in are dropped.
        let mut patience = Duration::from_secs(5);
        for _ in 0..many {
            let Ok(Answer { status, text, .. }) = answered.recv_timeout(patience) else { break };
            writeln!(to, "{status:?} {text:?}").unwrap();
            patience = Duration::from_millis(500);
        }
    }

    fn reap(&self, session: u64, mut child: Child, drain: impl FnOnce()) {
        let status = child.wait().unwrap();
        self.sessions.lock().unwrap().remove(&session);
        drain();
        self.machine.exited(session);
        let status = match status.signal() {
            Some(signal) => {
                let name = Signal::try_from(signal).unwrap().as_str();
                let name = name.trim_start_matches("SIG").into();
                ExitStatus::Signal { name, core_dumped: status.core_dumped() }
            }
            None => ExitStatus::Code(status.code().unwrap() as u8),
        };
        self.say(&AgentMessage::Exited { session, status });
    }
}

/// A shell that can be hung up, also where the tests run under nohup(1).
fn shell() -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP", "sh"]);
    command
}

fn group_of(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

fn environment<'a>(command: &'a mut Command, env: &[(String, String)]) -> &'a mut Command {
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .envs(env.iter().map(|(name, value)| (name, value)))
}
