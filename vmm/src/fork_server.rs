//! The fork server: one process per base, which holds the base's memory mapped and its state decoded,
//! and forks itself for every machine. A fork pays neither for `exec` nor for reading anything.
//!
//! It has one thread, so that fork(2) is safe: the child goes on with everything the parent had.

mod admission;
mod resumed;

use std::{
    collections::HashMap,
    fs::File,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use hermitage_storage::base::{self, BaseId, Size};
use hermitage_vmm_proto::{
    End, ForkEvent, ForkRequest, MachineEvent, MachineId, Packet, ProcessExit, Shape, SocketError,
    VERSION, receive, send,
};
use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::Kvm;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask},
        signalfd::{SfdFlags, SignalFd},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid},
};

use admission::Passed;

use crate::{
    base_state::BaseState,
    kvm::{self, IdleVm},
    machine::{Machine, control},
    memory::{self, GuestMemory},
    sandbox::MachineJail,
    snapshot::Origin,
    stages::Stages,
    working_set::Pristine,
};

/// A base, ready to be forked.
pub struct Template {
    id: BaseId,
    /// What its machines can have.
    sizes: base::Machine,
    kvm: Kvm,
    memory: GuestMemory,
    state: BaseState,
    /// Opened before the sandbox has no files any more.
    null: File,
    /// What each machine puts itself under; None: there is no sandbox.
    pub jail: Option<MachineJail>,
    idle: IdleVm,
    /// For saves: most of what they compare a machine's memory with.
    pristine: Pristine,
    /// For saves: finding them out takes a VM, and as long as all of a machine's state.
    fresh_msrs: Vec<kvm_msr_entry>,
}

impl Template {
    pub fn new(
        id: BaseId,
        sizes: base::Machine,
        kvm: Kvm,
        memory: GuestMemory,
        state: BaseState,
    ) -> anyhow::Result<Self> {
        let idle = IdleVm::new(&kvm)?;
        let null = File::open("/dev/null").context("open /dev/null")?;
        // All of a machine's vCPUs are of one kind.
        let fresh_msrs = match state.machine.vcpus.first() {
            Some(vcpu) => kvm::fresh_msrs(&kvm, &vcpu.cpuid)?,
            None => Vec::new(),
        };
        let pristine = Pristine::keep(&memory, &state.working_set)
            .context("keep what the base has where logins write")?;
        Ok(Self { id, sizes, kvm, memory, state, null, jail: None, idle, pristine, fresh_msrs })
    }
}

/// Keeps large buffers out of the heap, for good: the C library would raise the limit with the first one
/// that is freed, and the buffers that a base is checked with would stay, as free memory of this process
/// that is in the page tables of every machine and counts as its own. To be called before any is made.
pub fn keep_large_buffers_out_of_the_heap() {
    // SAFETY: mallopt(3) may be called at any time.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024) };
}

/// Returns what checking the base left free in the heap.
pub fn give_back_free_memory() {
    // SAFETY: malloc_trim(3) may be called at any time.
    unsafe { libc::malloc_trim(0) };
}

/// Serves `socket` until its other end closes. Machines live on then, until they notice by their own
/// sockets.
pub fn serve(template: &Template, socket: OwnedFd) -> anyhow::Result<()> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None).context("block SIGCHLD")?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("signalfd")?;
    let mut server = Server { template, socket, signals, machines: HashMap::new() };
    server.tell(&ForkEvent::Ready { version: VERSION, base: template.id.to_string() })?;
    server.run()
}

struct Server<'a> {
    template: &'a Template,
    socket: OwnedFd,
    signals: SignalFd,
    machines: HashMap<Pid, MachineId>,
}

impl Server<'_> {
    fn run(&mut self) -> anyhow::Result<()> {
        loop {
            let mut fds = [
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                result => result.context("poll")?,
            };
            let [requests, children] = fds.map(|fd| fd.any().unwrap_or(false));
            if children {
                while let Ok(Some(_)) = self.signals.read_signal() {}
                self.reap()?;
            }
            if requests && !self.request()? {
                return Ok(());
            }
        }
    }

    /// Handles one request. False: there will be no more.
    fn request(&mut self) -> anyhow::Result<bool> {
        let received = Instant::now();
        let packet = match receive::<ForkRequest>(&self.socket) {
            Ok(packet) => packet,
            Err(SocketError::Closed) => return Ok(false),
            Err(SocketError::WouldBlock) => return Ok(true),
            Err(e) => return Err(e).context("receive a request"),
        };
        match packet {
            Packet {
                message: ForkRequest::Fork { machine, label, shape, cgroup },
                descriptors,
            } => {
                let answer = Passed::fork(descriptors, cgroup)
                    .and_then(|passed| self.fork(machine, &label, shape, passed, received));
                self.answer(machine, answer)?;
            }
            Packet {
                message: ForkRequest::Resume { machine, label, shape, cgroup },
                descriptors,
            } => {
                let answer = Passed::resume(descriptors, cgroup)
                    .and_then(|passed| self.fork(machine, &label, shape, passed, received));
                self.answer(machine, answer)?;
            }
            Packet { message: ForkRequest::Kill { machine }, .. } => {
                // Only children that are not reaped yet are in the table: the pid is still theirs.
                for (pid, _) in self.machines.iter().filter(|(_, id)| **id == machine) {
                    let _ = kill(*pid, Signal::SIGKILL);
                }
            }
        }
        Ok(true)
    }

    fn answer(&self, machine: MachineId, answer: Result<Pid, String>) -> anyhow::Result<()> {
        self.tell(&match answer {
            Ok(pid) => ForkEvent::Forked { machine, pid: pid.as_raw() },
            Err(reason) => ForkEvent::ForkFailed { machine, reason },
        })
    }

    fn fork(
        &mut self,
        machine: MachineId,
        label: &str,
        shape: Option<Shape>,
        passed: Passed,
        received: Instant,
    ) -> Result<Pid, String> {
        let sizes = &self.template.sizes;
        let size = shape.map_or(sizes.least(), |shape| Size {
            memory_bytes: shape.memory_bytes,
            vcpus: shape.vcpus,
        });
        if !sizes.allows(size) {
            return Err(format!(
                "machines of this base can't have {} bytes of memory and {} CPUs",
                size.memory_bytes, size.vcpus
            ));
        }
        // SAFETY: this process has a single thread, so the child's memory is whole: no lock is held by
        // a thread that is not there.
        match unsafe { nix::unistd::fork() } {
            Ok(ForkResult::Parent { child }) => {
                self.machines.insert(child, machine);
                Ok(child)
            }
            Ok(ForkResult::Child) => {
                let code = self.become_machine(label, size, passed, received);
                // Nothing of the server is unwound in the child, nor its exit handlers run.
                // SAFETY: _exit has no preconditions.
                unsafe { libc::_exit(code) }
            }
            Err(e) => Err(format!("fork: {e}")),
        }
    }

    /// In the child: runs the machine to its end.
    fn become_machine(
        &mut self,
        label: &str,
        size: Size,
        Passed { control, agent, disk, snapshot, cgroup }: Passed,
        received: Instant,
    ) -> i32 {
        let mut stages = Stages::since(received);
        stages.done("fork process");
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
        let template = self.template;
        let failed = |reason: String| {
            let end = End::HostError(format!("fork: {reason}"));
            let _ = send(&control, &MachineEvent::Ended(end), &[]);
            1
        };
        // First of all: what is taken from here on is counted and limited.
        if let Some(cgroup) = cgroup {
            if let Err(reason) = admission::enter(cgroup) {
                return failed(reason);
            }
            stages.done("enter the control group");
        }
        if let Some(Err(e)) = template.jail.as_ref().map(MachineJail::enter) {
            return failed(e.to_string());
        }
        self.release_server_descriptors();
        stages.done("narrow the jail");
        let name: String = format!("vm:{label}").chars().filter(|c| *c != '\0').take(15).collect();
        if let Ok(name) = std::ffi::CString::new(name) {
            let _ = prctl::set_name(&name);
        }
        let resumed = snapshot.is_some();
        let made = match snapshot {
            None => memory::limited(&template.memory, size.memory_bytes)
                .map_err(|e| End::HostError(format!("fork: {e}")))
                .and_then(|memory| {
                    Machine::restore(
                        &template.kvm,
                        memory,
                        (&template.state.machine, size.vcpus.into()),
                        File::from(disk),
                        agent,
                        &mut |stage| stages.done(stage),
                    )
                    .map_err(|e| End::HostError(format!("fork: {e}")))
                })
                .inspect(|machine| stages.done_at("start vCPUs", machine.entered()))
                .map(|machine| (machine, Vec::new())),
            Some(snapshot) => {
                let parts = resumed::Parts { agent, disk, snapshot, size };
                resumed::make(template, parts, &control, &mut stages)
            }
        };
        let (machine, resumed_with) = match made {
            Ok(made) => made,
            Err(end) => {
                let _ = send(&control, &MachineEvent::Ended(end), &[]);
                return 1;
            }
        };
        let running =
            MachineEvent::Running { at: monotonic(machine.entered()), stages: stages.list };
        if let Err(e) = send(&control, &running, &[]) {
            tracing::warn!(error = %e, "tell serve that the machine runs");
        }
        // A resumed machine has other things to write.
        let written = if resumed { &[][..] } else { &template.state.working_set.written };
        let Template { id: base, pristine, fresh_msrs, .. } = template;
        let origin = Origin { base, pristine, fresh_msrs, resumed_with };
        let end = control::serve(&machine, &origin, control, written);
        tracing::debug!(%end, "machine ended");
        // The guest's acknowledged writes are in the file by now (a write is acknowledged after
        // pwritev); the lock goes with the process.
        0
    }

    /// The child has no business with the server's socket and its idle VM, and its signals are its own.
    /// The numbers stay taken, so that whatever still refers to them refers to nothing of use.
    fn release_server_descriptors(&self) {
        let idle = self.template.idle.descriptors();
        let jail = self.template.jail.as_ref().and_then(MachineJail::descriptor);
        let own = [self.socket.as_fd(), self.signals.as_fd()];
        for fd in own.into_iter().chain(idle).chain(jail) {
            replace(fd, self.template.null.as_fd());
        }
    }

    fn reap(&mut self) -> anyhow::Result<()> {
        loop {
            let (pid, exit) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, ProcessExit::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    (pid, ProcessExit::Signal(signal as i32))
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(e) => return Err(e).context("waitpid"),
            };
            if let Some(machine) = self.machines.remove(&pid) {
                self.tell(&ForkEvent::Exited { machine, exit })?;
            }
        }
    }

    fn tell(&self, event: &ForkEvent) -> anyhow::Result<()> {
        loop {
            match send(&self.socket, event, &[]) {
                Err(SocketError::WouldBlock) => {
                    let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
                    let _ = poll(&mut fds, PollTimeout::from(1000u16));
                }
                // The request side will see the same and end the server.
                Err(SocketError::Closed) => return Ok(()),
                result => return result.context("tell serve"),
            }
        }
    }
}

/// Makes `fd`'s number refer to what `with` does.
pub fn replace(fd: BorrowedFd<'_>, with: BorrowedFd<'_>) {
    use std::os::fd::AsRawFd as _;
    // SAFETY: dup3 on two open descriptors; the number stays open, as its owner expects.
    let _ = unsafe { libc::dup3(with.as_raw_fd(), fd.as_raw_fd(), libc::O_CLOEXEC) };
}

/// An instant of the past as nanoseconds of CLOCK_MONOTONIC.
fn monotonic(at: Instant) -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32);
    u64::try_from(now.saturating_sub(at.elapsed()).as_nanos()).unwrap_or(u64::MAX)
}
