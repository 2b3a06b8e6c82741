//! The loop: control messages, streams, terminals, ended processes.

mod standstill;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hermitage_guest_proto::{
    AgentMessage, Exec, HostMessage, OpenTerminal, Program, SessionId, VERSION,
};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::account::{self, User};
use crate::ask::{self, Questions};
use crate::attach;
use crate::boot::Booted;
use crate::control::Control;
use crate::environment::{OnTerminal, environment};
use crate::room::DiskRoom;
use crate::session::{self, Session};
use crate::spawn::{self, Run, Standard};
use crate::streams::{PATIENCE, Streams};
use crate::sys::{self, Poller, Readiness};
use crate::terminal::{Pty, Terminal};
use crate::work::{self, Work};
use crate::{log, poweroff, processes, resources, signals};

/// Sessions at once; terminals are fewer. A bound for a host that loses count.
const SESSIONS_MAX: usize = 1024;

/// How long programs have to end when the host is gone and so can't say.
const GRACE_WITHOUT_HOST: Duration = Duration::from_secs(5);

/// What poweroff(8) and its kin of small init systems send to PID 1, and a container's end. A reset
/// is the same to us: the machine ends, the next login starts it.
const POWER_SIGNALS: [Signal; 4] =
    [Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGPWR];

const SFTP_SERVER: &str = "/usr/lib/openssh/sftp-server";

pub struct Agent {
    booted: Booted,
    control: Control,
    signals: SignalFd,
    streams: Streams,
    /// Commands whose streams have not all come, and until when they may.
    waiting: Vec<(Exec, Instant)>,
    sessions: Vec<Session>,
    /// The account's name; None before `Attach`.
    account: Option<String>,
    room: DiskRoom,
    work: Work,
    questions: Questions,
}

/// What a polled descriptor is.
#[derive(Clone, Copy)]
enum Source {
    Control,
    Signals,
    StreamListener,
    /// Index into the unclaimed streams.
    Stream(usize),
    /// A side of a session's terminal, by the session's index.
    Master(usize),
    Port(usize),
    /// Where the user's questions come.
    Questions,
    /// One of those who ask, by index.
    Asker(usize),
}

impl Agent {
    /// Waits for the host's connection and greets it. After this the base snapshot is taken.
    pub fn connect(booted: Booted) -> Result<Agent> {
        let mask: SigSet = POWER_SIGNALS.into_iter().chain([Signal::SIGCHLD]).collect();
        mask.thread_block().context("blocking signals")?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .context("signalfd")?;

        let mut poller = Poller::new();
        let socket = loop {
            if let Some(socket) =
                sys::accept_from_host(&booted.control).context("the control port")?
            {
                break socket;
            }
            poller.clear();
            poller.add(&booted.control, (), true, false);
            poller.wait(None).context("poll")?;
        };
        let mut control = Control::new(socket);
        let kernel = nix::sys::utsname::uname().context("uname")?;
        let kernel = kernel.release().to_string_lossy().into_owned();
        control.send(&AgentMessage::Ready { version: VERSION, kernel })?;
        Ok(Agent {
            booted,
            control,
            signals,
            streams: Streams::default(),
            waiting: Vec::new(),
            sessions: Vec::new(),
            account: None,
            room: DiskRoom::new(),
            work: Work::default(),
            questions: Questions::default(),
        })
    }

    pub fn run(mut self) -> Result<()> {
        let mut poller = Poller::new();
        let mut events = Vec::new();
        loop {
            poller.clear();
            self.watch(&mut poller);
            poller.wait(self.time_left()).context("poll")?;
            events.clear();
            events.extend(poller.ready());
            // Sessions and streams keep their places until all events are done.
            for (source, readiness) in &events {
                self.handle(*source, *readiness)?;
            }
            self.claim_streams()?;
            self.finish_sessions()?;
            self.questions.sweep(Instant::now());
            let (cgroups, strays) = (&self.booted.cgroups, &mut self.booted.strays);
            if let Some(activity) = self.work.answer(cgroups, strays, Instant::now()) {
                self.control.send(&AgentMessage::Activity(activity))?;
            }
        }
    }

    fn watch(&self, poller: &mut Poller<Source>) {
        poller.add(&self.control, Source::Control, true, self.control.wants_to_write());
        poller.add(&self.signals, Source::Signals, true, false);
        poller.add(&self.booted.streams, Source::StreamListener, true, false);
        for (index, stream) in self.streams.incomplete() {
            poller.add(stream, Source::Stream(index), true, false);
        }
        if let Some(listener) = self.questions.listener() {
            poller.add(listener, Source::Questions, true, false);
        }
        for (index, asker) in self.questions.sockets() {
            poller.add(asker, Source::Asker(index), true, false);
        }
        for (index, session) in self.sessions.iter().enumerate() {
            let Some(terminal) = &session.terminal else { continue };
            if let Some(master) = terminal.master() {
                let wanted = terminal.master_interest();
                poller.add(master, Source::Master(index), wanted.readable, wanted.writable);
            }
            let wanted = terminal.port_interest();
            let port = &self.booted.ports[usize::from(terminal.number)];
            poller.add(port, Source::Port(index), wanted.readable, wanted.writable);
        }
    }

    /// Until the first deadline.
    fn time_left(&self) -> Option<Duration> {
        let commands = self.waiting.iter().map(|(_, deadline)| *deadline);
        let others = [self.streams.deadline(), self.work.deadline(), self.questions.deadline()];
        let first = commands.chain(others.into_iter().flatten()).min()?;
        Some(first.saturating_duration_since(Instant::now()))
    }

    fn handle(&mut self, source: Source, readiness: Readiness) -> Result<()> {
        match source {
            Source::Control => self.control_ready(readiness)?,
            Source::Signals => {
                while let Ok(Some(signal)) = self.signals.read_signal() {
                    if POWER_SIGNALS.iter().any(|power| *power as u32 == signal.ssi_signo) {
                        self.power_off(GRACE_WITHOUT_HOST);
                    }
                }
                self.reap();
            }
            Source::StreamListener => {
                while let Some(socket) =
                    sys::accept_from_host(&self.booted.streams).context("the stream port")?
                {
                    self.streams.arrived(socket, Instant::now());
                }
            }
            Source::Stream(index) => self.streams.readable(index),
            Source::Questions => self.questions.accept(Instant::now()),
            Source::Asker(index) => {
                if let Some(question) = self.questions.readable(index, Instant::now()) {
                    self.control.send(&AgentMessage::Ask(question))?;
                }
            }
            Source::Master(index) | Source::Port(index) => {
                let Some(terminal) =
                    self.sessions.get_mut(index).and_then(|session| session.terminal.as_mut())
                else {
                    return Ok(());
                };
                let port = self.booted.ports[usize::from(terminal.number)].as_fd();
                if matches!(source, Source::Port(_)) && readiness.hung_up {
                    terminal.port_gone();
                } else {
                    terminal.relay(port);
                }
            }
        }
        Ok(())
    }

    fn control_ready(&mut self, readiness: Readiness) -> Result<()> {
        if readiness.writable {
            self.control.flush()?;
        }
        if (readiness.readable || readiness.hung_up) && !self.control.receive().unwrap_or(false) {
            log::warn(format_args!("the host has closed the control connection: powering off"));
            self.power_off(GRACE_WITHOUT_HOST);
        }
        while let Some(message) = self.control.message()? {
            self.message(message)?;
        }
        Ok(())
    }

    fn message(&mut self, message: HostMessage) -> Result<()> {
        match message {
            HostMessage::Attach(attach) => {
                let answer = match self.attach(&attach) {
                    Ok(()) => AgentMessage::Attached,
                    Err(error) => AgentMessage::AttachFailed { reason: format!("{error:#}") },
                };
                self.control.send(&answer)?;
            }
            HostMessage::OpenTerminal(open) => {
                let result = self.open_terminal(&open);
                self.answer_start(open.session, result)?;
            }
            HostMessage::Exec(exec) => {
                self.waiting.push((exec, Instant::now() + PATIENCE));
            }
            HostMessage::Resize { session, window } => {
                if let Some(terminal) = self.session(session).and_then(|one| one.terminal.as_ref())
                {
                    log_failure("resizing a terminal", terminal.resize(window));
                }
            }
            HostMessage::Signal { session, name } => match signals::by_name(&name) {
                Some(signal) => {
                    if let Some(session) = self.session(session) {
                        log_failure("signalling a session", session.signal(signal));
                    }
                }
                None => log::warn(format_args!("the host asks for the unknown signal {name:?}")),
            },
            HostMessage::Hangup { session } => {
                let (cgroups, strays) = (&self.booted.cgroups, &mut self.booted.strays);
                let processes: Vec<_> = work::processes(cgroups, strays).collect();
                if let Some(session) = self.session(session) {
                    session.hang_up(&processes);
                }
            }
            HostMessage::SetClock(clock) => {
                if let Err(error) = self.booted.clock.set(clock) {
                    log::warn(format_args!("{error:#}"));
                }
            }
            HostMessage::PowerOff { grace_ms } => {
                self.power_off(Duration::from_millis(grace_ms.into()));
            }
            HostMessage::Freeze => self.freeze()?,
            HostMessage::Resume(resume) => self.resume(&resume)?,
            HostMessage::Ping(number) => self.control.send(&AgentMessage::Pong(number))?,
            // Without a disk there is nothing to fill.
            HostMessage::DiskRoom { scarce } if self.account.is_some() => self.room.set(scarce),
            HostMessage::DiskRoom { .. } => {}
            HostMessage::Take(wanted) => {
                let (in_use, fault) = resources::take(wanted);
                self.control.send(&AgentMessage::Took { in_use, fault })?;
            }
            HostMessage::LimitProcesses { question, most } => {
                let fault = self.limit_processes(most);
                self.tell_processes(question, fault)?;
            }
            HostMessage::CountProcesses { question } => self.tell_processes(question, None)?,
            HostMessage::LookAtWork(question) => {
                let (cgroups, strays) = (&self.booted.cgroups, &mut self.booted.strays);
                self.work.ask(question, cgroups, strays, Instant::now());
            }
            HostMessage::Answer(answer) => self.questions.answer(&answer),
        }
        Ok(())
    }

    fn attach(&mut self, attach: &hermitage_guest_proto::Attach) -> Result<()> {
        if let Some(account) = &self.account {
            bail!("this machine is {account}'s already");
        }
        let stages = attach::become_somebody(attach, &self.booted.clock)?;
        self.control.send(&AgentMessage::Awake)?;
        attach::take_disk(attach, stages)?;
        self.account = Some(attach.account.clone());
        // She does without, rather than without her machine.
        if let Err(error) = self.questions.listen(Path::new(ask::SOCKET), attach.uid) {
            log::warn(format_args!("nothing can be asked of the host: {}: {error:#}", ask::SOCKET));
        }
        Ok(())
    }

    /// What went wrong, if anything did.
    fn limit_processes(&self, most: Option<u32>) -> Option<String> {
        let error = processes::limit(&self.booted.cgroups, most).err()?;
        Some(format!("{error:#}"))
    }

    fn tell_processes(&mut self, question: u64, fault: Option<String>) -> Result<()> {
        let seen = processes::look(&self.booted.cgroups, question, fault);
        self.control.send(&AgentMessage::Processes(seen))
    }

    fn session(&mut self, id: SessionId) -> Option<&mut Session> {
        self.sessions.iter_mut().find(|session| session.id == id)
    }

    /// Her entry of /etc/passwd as it is now.
    fn user(&self) -> Result<User> {
        let account = self.account.as_deref().context("the machine is nobody's yet")?;
        account::find(Path::new("/"), account)?
            .with_context(|| format!("/etc/passwd has no {account} any more"))
    }

    fn check_new(&self, id: SessionId) -> Result<()> {
        if self.sessions.iter().any(|session| session.id == id) {
            bail!("session {id} exists");
        }
        if self.sessions.len() >= SESSIONS_MAX {
            bail!("there are {SESSIONS_MAX} sessions already");
        }
        Ok(())
    }

    fn open_terminal(&mut self, open: &OpenTerminal) -> Result<u32> {
        self.check_new(open.session)?;
        if usize::from(open.terminal) >= self.booted.ports.len() {
            bail!("there is no terminal {}", open.terminal);
        }
        let on_it = |session: &Session| {
            session.terminal.as_ref().is_some_and(|terminal| terminal.number == open.terminal)
        };
        if self.sessions.iter().any(on_it) {
            bail!("terminal {} is in use", open.terminal);
        }
        let user = self.user()?;
        let pty = Pty::open(user.uid, open.window, &open.modes)?;
        let terminal = OnTerminal { term: &open.term, number: pty.number };
        let environment = environment(&user, Some(&terminal), &open.env);
        let run = match &open.command {
            Some(command) => Run::Command(command),
            None => Run::LoginShell { greeting: &open.greeting },
        };
        let leader = spawn::spawn(
            &user,
            &run,
            &environment,
            &Standard::Terminal(pty.slave.as_fd()),
            &self.booted.home,
        )?;
        self.sessions.push(Session {
            id: open.session,
            leader,
            exit: None,
            terminal: Some(Terminal::new(open.terminal, pty.master)),
        });
        Ok(leader.as_raw() as u32)
    }

    /// Starts the commands whose streams are there, gives up on those whose time is over.
    fn claim_streams(&mut self) -> Result<()> {
        let now = Instant::now();
        let mut index = 0;
        while let Some((exec, deadline)) = self.waiting.get(index) {
            let complete = self.streams.has(exec.stdio) && self.streams.has(exec.stderr);
            if !complete && *deadline > now {
                index += 1;
                continue;
            }
            let (exec, _) = self.waiting.remove(index);
            let id = exec.session;
            let result = match (self.streams.claim(exec.stdio), self.streams.claim(exec.stderr)) {
                (Some(stdio), Some(stderr)) => self.start(&exec, &stdio, &stderr),
                _ => {
                    Err(anyhow::anyhow!("its streams did not come within {} s", PATIENCE.as_secs()))
                }
            };
            self.answer_start(id, result)?;
        }
        self.streams.expire(now);
        Ok(())
    }

    /// Starts a command on its streams; our copies close on return.
    fn start(&mut self, exec: &Exec, stdio: &OwnedFd, stderr: &OwnedFd) -> Result<u32> {
        self.check_new(exec.session)?;
        let user = self.user()?;
        let environment = environment(&user, None, &exec.env);
        spawn::set_blocking(stdio, true).context("a stream")?;
        spawn::set_blocking(stderr, true).context("a stream")?;
        let run = match &exec.program {
            Program::Shell => Run::LoginShell { greeting: "" },
            Program::Command(command) => Run::Command(command),
            Program::Sftp => Run::Program(Path::new(SFTP_SERVER)),
            Program::Forwarder => Run::Forwarder,
        };
        let standard = Standard::Streams { stdio: stdio.as_fd(), stderr: stderr.as_fd() };
        let leader = spawn::spawn(&user, &run, &environment, &standard, &self.booted.home)?;
        self.sessions.push(Session { id: exec.session, leader, exit: None, terminal: None });
        Ok(leader.as_raw() as u32)
    }

    fn answer_start(&mut self, session: SessionId, result: Result<u32>) -> Result<()> {
        self.control.send(&match result {
            Ok(pid) => AgentMessage::Started { session, pid },
            Err(error) => AgentMessage::StartFailed { session, reason: format!("{error:#}") },
        })
    }

    /// Collects every process that has ended; those that are no session's leader are orphans, which
    /// are PID 1's to collect.
    fn reap(&mut self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(status) => {
                    let Some((pid, exit)) = session::exit_status(&status) else { continue };
                    let ended = self
                        .sessions
                        .iter_mut()
                        .find(|one| one.leader == pid && one.exit.is_none());
                    if let Some(session) = ended {
                        session.exit = Some(exit);
                        if let Some(terminal) = &mut session.terminal {
                            terminal.program_ended();
                        }
                    }
                }
                // EINVAL: killed by a signal nix has no name for; the process is collected.
                Err(_) => {}
            }
        }
    }

    /// Reports the sessions that have ended and whose output is out.
    fn finish_sessions(&mut self) -> Result<()> {
        let ports = &self.booted.ports;
        let mut ended = Vec::new();
        self.sessions.retain_mut(|session| {
            let Some(status) = &session.exit else { return true };
            let drained = session.terminal.as_mut().is_none_or(|terminal| {
                terminal.is_drained(ports[usize::from(terminal.number)].as_fd())
            });
            if drained {
                ended.push(AgentMessage::Exited { session: session.id, status: status.clone() });
            }
            !drained
        });
        ended.iter().try_for_each(|message| self.control.send(message))
    }

    fn power_off(&mut self, grace: Duration) -> ! {
        // Interactive shells ignore SIGTERM, but not the end of their terminal.
        self.sessions.iter_mut().for_each(|session| session.hang_up(&[]));
        poweroff::in_order(&self.booted.initial_root, grace)
    }
}

fn log_failure(what: &str, result: nix::Result<()>) {
    if let Err(error) = result
        && error != Errno::ESRCH
    {
        log::warn(format_args!("{what}: {error}"));
    }
}
