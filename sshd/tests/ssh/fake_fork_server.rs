//! Stands in for `hermitage-vmm fork-server`: a machine is a process of this test program.

use std::{
    collections::HashMap,
    io::Write,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    sync::{Arc, Mutex},
};

use command_fds::{CommandFdExt, FdMapping};
use hermitage_vmm_proto::{ForkEvent, ForkRequest, ProcessExit, SocketError, receive, send};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::signal,
    unistd::Pid,
};

use crate::processes;

/// Names a file: where it is, no base can be used.
pub const REFUSAL: &str = "HERMITAGE_REFUSAL";

pub fn run() -> ! {
    // SAFETY: descriptor 3 is the socket that the service passed; nothing else here uses it.
    let socket = Arc::new(unsafe { OwnedFd::from_raw_fd(3) });
    fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    if std::env::var(REFUSAL).is_ok_and(|file| std::fs::exists(file).unwrap()) {
        let reason = "its guest uses what is not here".into();
        send(&socket, &ForkEvent::Refused { reason }, &[]).unwrap();
        std::process::exit(1);
    }
    let version = hermitage_vmm_proto::VERSION;
    let ready = ForkEvent::Ready { version, base: "fake".into() };
    send(&socket, &ready, &[]).unwrap();
    let pids: Arc<Mutex<HashMap<u64, Pid>>> = Arc::default();
    loop {
        let packet = match receive::<ForkRequest>(&socket) {
            Ok(packet) => packet,
            Err(SocketError::Closed) => std::process::exit(0),
            Err(error) => panic!("{error}"),
        };
        match packet.message {
            ForkRequest::Fork { machine, ref label, shape, cgroup }
            | ForkRequest::Resume { machine, ref label, shape, cgroup } => {
                let resumed = matches!(packet.message, ForkRequest::Resume { .. });
                let mut descriptors = packet.descriptors;
                // Who moves itself into a real group is written there by the kernel.
                let procs = if cgroup { descriptors.pop() } else { None };
                let mappings = descriptors
                    .into_iter()
                    .zip(3..)
                    .map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd })
                    .collect();
                let mut command = processes::command("machine");
                command.env("HERMITAGE_LABEL", label);
                let memory = shape.map_or(1 << 20, |shape| shape.memory_bytes);
                command.env("HERMITAGE_MEMORY", memory.to_string());
                if resumed {
                    command.env("HERMITAGE_RESUME", "yes");
                }
                command.fd_mappings(mappings).unwrap();
                let mut child = command.spawn().unwrap();
                drop(command);
                let pid = child.id() as i32;
                if let Some(procs) = procs {
                    writeln!(std::fs::File::from(procs), "{pid}").unwrap();
                }
                eprintln!("fake machine {machine} of {label}: {pid}, {shape:?}");
                pids.lock().unwrap().insert(machine, Pid::from_raw(pid));
                send(&socket, &ForkEvent::Forked { machine, pid }, &[]).unwrap();
                let (socket, pids) = (socket.clone(), pids.clone());
                std::thread::spawn(move || {
                    let status = child.wait().unwrap();
                    pids.lock().unwrap().remove(&machine);
                    let exit = match status.signal() {
                        Some(signal) => ProcessExit::Signal(signal),
                        None => ProcessExit::Code(status.code().unwrap_or(-1)),
                    };
                    let _ = send(&socket, &ForkEvent::Exited { machine, exit }, &[]);
                });
            }
            ForkRequest::Kill { machine } => {
                if let Some(pid) = pids.lock().unwrap().get(&machine) {
                    let _ = signal::kill(*pid, signal::Signal::SIGKILL);
                }
            }
        }
    }
}
