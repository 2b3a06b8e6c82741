//! Threads that run virtual CPUs, and stopping them.

use std::{
    io,
    os::unix::thread::JoinHandleExt as _,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use hermitage_vmm_proto::End;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable as _, SIGRTMIN, register_signal_handler};

use super::Exits;

/// Locks even when another thread panicked while it held the lock: what the lock guards is then this
/// one machine's, which ends anyway.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    #[error("start the thread of CPU {0}: {1}")]
    Spawn(usize, #[source] io::Error),
    #[error("install the signal handler that stops CPUs: {0}")]
    Handler(#[source] vmm_sys_util::errno::Error),
    #[error("CPUs did not pause within {0:?}")]
    PauseTimeout(Duration),
}

pub struct Vcpus {
    /// The vCPUs; a running one's lock is held by its thread.
    pub fds: Vec<Arc<Mutex<VcpuFd>>>,
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    /// When the last of them first entered the guest.
    pub entered: Instant,
}

#[derive(Default)]
struct Gate {
    /// Looked at before each entry to the guest.
    pause: AtomicBool,
    paused: Mutex<usize>,
    changed: Condvar,
}

impl Vcpus {
    /// Starts a thread for each. Returns when all of them have entered the guest.
    pub fn start(fds: Vec<VcpuFd>, exits: &Arc<dyn Exits>) -> Result<Self, VcpuError> {
        register_signal_handler(SIGRTMIN(), interrupt).map_err(VcpuError::Handler)?;
        let gate = Arc::new(Gate::default());
        let fds: Vec<_> = fds.into_iter().map(|fd| Arc::new(Mutex::new(fd))).collect();
        let mut threads = Vec::with_capacity(fds.len());
        let (enters, entries) = mpsc::channel();
        for (n, fd) in fds.iter().enumerate() {
            let (fd, gate, exits) = (fd.clone(), gate.clone(), exits.clone());
            let enters = enters.clone();
            let thread = thread::Builder::new()
                .name(format!("vcpu{n}"))
                // Deep enough for the devices; each page touched counts for every machine.
                .stack_size(256 * 1024)
                .spawn(move || {
                    // Nobody waits for it if another thread could not be started.
                    let _ = enters.send(Instant::now());
                    drop(enters);
                    run(&fd, &gate, &*exits);
                })
                .map_err(|e| VcpuError::Spawn(n, e))?;
            threads.push(thread);
        }
        drop(enters);
        let entered = entries.iter().max().unwrap_or_else(Instant::now);
        Ok(Self { fds, threads, gate, entered })
    }

    /// Returns when no vCPU is in the guest and each one's last exit is complete, so that its state can
    /// be taken.
    pub fn pause(&self) -> Result<(), VcpuError> {
        const LIMIT: Duration = Duration::from_secs(10);
        let deadline = Instant::now() + LIMIT;
        self.gate.pause.store(true, Ordering::SeqCst);
        let mut paused = lock(&self.gate.paused);
        while *paused < self.threads.len() {
            if Instant::now() > deadline {
                return Err(VcpuError::PauseTimeout(LIMIT));
            }
            for thread in &self.threads {
                // A signal that comes just before KVM_RUN is lost; hence again and again.
                let _ = thread.kill(SIGRTMIN());
            }
            paused = self
                .gate
                .changed
                .wait_timeout(paused, Duration::from_millis(1))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// Whether they are to stand still.
    pub fn is_paused(&self) -> bool {
        self.gate.pause.load(Ordering::SeqCst)
    }

    /// Lets paused vCPUs go on.
    pub fn resume(&self) {
        // Under the lock, or a thread that has just looked at the flag would sleep through this.
        let _paused = lock(&self.gate.paused);
        self.gate.pause.store(false, Ordering::SeqCst);
        self.gate.changed.notify_all();
    }

    /// CPU time that each thread has used.
    pub fn cpu_time(&self) -> Vec<Duration> {
        self.threads
            .iter()
            .filter_map(|thread| {
                let clock = nix::time::ClockId::from_raw(thread_clock(thread)?);
                Some(nix::time::clock_gettime(clock).ok()?.into())
            })
            .collect()
    }
}

extern "C" fn interrupt(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn thread_clock(thread: &JoinHandle<()>) -> Option<libc::clockid_t> {
    let mut clock = 0;
    // SAFETY: the handle is neither joined nor detached, so the thread's id is valid.
    let failed = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &mut clock) };
    (failed == 0).then_some(clock)
}

fn run(fd: &Mutex<VcpuFd>, gate: &Gate, exits: &dyn Exits) {
    let mut vcpu = lock(fd);
    loop {
        if gate.pause.load(Ordering::SeqCst) {
            if let Some(end) = complete_last_exit(&mut vcpu, exits) {
                return exits.end(end);
            }
            drop(vcpu);
            let mut paused = lock(&gate.paused);
            *paused += 1;
            gate.changed.notify_all();
            while gate.pause.load(Ordering::SeqCst) {
                paused = gate.changed.wait(paused).unwrap_or_else(PoisonError::into_inner);
            }
            *paused -= 1;
            drop(paused);
            vcpu = lock(fd);
        }
        if let Some(end) = enter(&mut vcpu, exits) {
            return exits.end(end);
        }
    }
}

/// The result of an input or memory read reaches the CPU's registers only at the next KVM_RUN, which
/// `immediate_exit` makes return before the guest runs (KVM API 5).
fn complete_last_exit(vcpu: &mut VcpuFd, exits: &dyn Exits) -> Option<End> {
    vcpu.set_kvm_immediate_exit(1);
    let end = enter(vcpu, exits);
    vcpu.set_kvm_immediate_exit(0);
    end
}

/// Runs the guest until its next exit and handles that. Some: the machine has ended.
fn enter(vcpu: &mut VcpuFd, exits: &dyn Exits) -> Option<End> {
    match vcpu.run() {
        Ok(VcpuExit::MmioWrite(address, data)) => exits.mmio_write(address, data),
        Ok(VcpuExit::MmioRead(address, data)) => {
            exits.mmio_read(address, data);
            None
        }
        Ok(VcpuExit::IoOut(port, data)) => exits.port_write(port, data),
        Ok(VcpuExit::IoIn(port, data)) => {
            exits.port_read(port, data);
            None
        }
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => None,
        Ok(VcpuExit::Shutdown) => {
            say_where(vcpu);
            Some(End::Reset)
        }
        Ok(VcpuExit::InternalError) => Some(End::HostError(
            "KVM could not go on with the guest (internal error: this KVM may be paravirtual, \
             see `hermitage doctor`)"
                .into(),
        )),
        Ok(VcpuExit::FailEntry(reason, cpu)) => Some(End::HostError(format!(
            "KVM could not enter the guest on CPU {cpu}: hardware reason {reason:#x}"
        ))),
        Ok(other) => {
            Some(End::HostError(format!("KVM left the guest for no known reason: {other:?}")))
        }
        Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => None,
        Err(e) => Some(End::HostError(format!("KVM_RUN: {e}"))),
    }
}

/// A triple fault is usually the guest's own way to reset; when it is not, this is all there will be to
/// go by.
fn say_where(vcpu: &VcpuFd) {
    if let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) {
        tracing::info!(
            rip = format_args!("{:#x}", regs.rip),
            rsp = format_args!("{:#x}", regs.rsp),
            cr2 = format_args!("{:#x}", sregs.cr2),
            cr3 = format_args!("{:#x}", sregs.cr3),
            cs = format_args!("{:#x}", sregs.cs.selector),
            idt = format_args!("{:#x}", sregs.idt.base),
            "the guest shut down by a triple fault"
        );
    }
}
