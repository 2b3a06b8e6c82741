//! A base's fork server: the process whose children are the machines.
//!
//! One runs per base in use. It is started at the first fork, started again when it died, and replaced
//! for new machines when `current-base` names another base; the old one stays until its last machine is
//! gone.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use hermitage_storage::base::{self, Base, Size};
use hermitage_vmm_proto::{
    ForkEvent, ForkRequest, MachineId, ProcessExit, Shape, SocketError, message_pair,
};
use tokio::{process::Command, sync::oneshot, time::timeout};
use tokio_util::sync::CancellationToken;

use super::socket::MessageSocket;
use crate::cgroup::Group;

/// How long a base may take to be checked and mapped: it is hashed, which takes seconds under
/// emulation.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// How long one fork may take.
const FORK_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, thiserror::Error)]
pub enum ForkError {
    #[error("there is no base to fork from; `hermitage base build` makes one")]
    NoBase,
    #[error("can't read which base is current: {0}")]
    CurrentBase(String),
    #[error("can't start {program}: {reason}")]
    Spawn { program: PathBuf, reason: String },
    #[error("base {base} can't be used: {reason}")]
    Refused { base: String, reason: String },
    #[error(
        "the fork server of base {base} speaks version {theirs} of the protocol, this is {ours}"
    )]
    Version { base: String, theirs: u16, ours: u16 },
    #[error("the fork server of base {base} did not answer in {0:?}", .after)]
    Timeout { base: String, after: Duration },
    #[error("the fork server of base {base} ended")]
    Gone { base: String },
    #[error("fork of base {base} failed: {reason}")]
    Failed { base: String, reason: String },
}

/// A machine's process, as its fork server knows it.
pub struct Forked {
    pub id: MachineId,
    pub pid: i32,
    /// Comes when the process is gone and reaped; an error if the fork server is gone first.
    pub exited: oneshot::Receiver<ProcessExit>,
    pub server: Arc<ForkServer>,
}

/// Finds the right fork server for new machines.
pub struct ForkServers {
    vmm: PathBuf,
    /// Whom machines run as, unless it is whom the fork server takes by itself.
    uid: Option<u32>,
    bases: PathBuf,
    current_base: Box<dyn Fn() -> Result<Option<String>, String> + Send + Sync>,
    next_machine: AtomicU64,
    /// Also serialises starting: two logins at once start one server.
    current: tokio::sync::Mutex<Option<Arc<ForkServer>>>,
    /// Of bases that machines were saved on, as long as there are such machines.
    others: tokio::sync::Mutex<HashMap<String, Weak<ForkServer>>>,
}

impl ForkServers {
    /// `current_base` reads the id of the base to fork from.
    pub fn new(
        vmm: PathBuf,
        uid: Option<u32>,
        bases: PathBuf,
        current_base: impl Fn() -> Result<Option<String>, String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            vmm,
            uid,
            bases,
            current_base: Box::new(current_base),
            next_machine: AtomicU64::new(1),
            current: Default::default(),
            others: Default::default(),
        }
    }

    /// The id of the base that new machines fork from.
    pub fn current_base(&self) -> Result<Option<String>, ForkError> {
        (self.current_base)().map_err(ForkError::CurrentBase)
    }

    /// The fork server of the current base, started if need be.
    pub async fn server(&self) -> Result<Arc<ForkServer>, ForkError> {
        let base = self.current_base()?.ok_or(ForkError::NoBase)?;
        let mut current = self.current.lock().await;
        if let Some(server) = current.as_ref()
            && server.base == base
            && !server.gone.is_cancelled()
        {
            return Ok(server.clone());
        }
        let server = ForkServer::start(&self.vmm, self.uid, &self.bases.join(&base), base).await?;
        Ok(current.insert(server).clone())
    }

    /// The fork server of a base that may no longer be the current one; it ends with its last machine.
    pub async fn server_of(&self, base: &str) -> Result<Arc<ForkServer>, ForkError> {
        if self.current_base()?.as_deref() == Some(base) {
            return self.server().await;
        }
        let mut others = self.others.lock().await;
        others.retain(|_, server| server.strong_count() > 0);
        if let Some(server) = others.get(base).and_then(Weak::upgrade)
            && !server.gone.is_cancelled()
        {
            return Ok(server);
        }
        let server =
            ForkServer::start(&self.vmm, self.uid, &self.bases.join(base), base.to_owned()).await?;
        others.insert(base.to_owned(), Arc::downgrade(&server));
        Ok(server)
    }

    /// Forks a machine, handing over `descriptors` (see [`ForkRequest::Fork`]), into that group.
    pub async fn fork(
        &self,
        server: Arc<ForkServer>,
        label: String,
        size: Option<Size>,
        descriptors: [OwnedFd; 3],
        group: Option<&Group>,
    ) -> Result<Forked, ForkError> {
        let machine = self.next_machine.fetch_add(1, Ordering::Relaxed);
        let shape = size.map(shape);
        let request = ForkRequest::Fork { machine, label, shape, cgroup: group.is_some() };
        server.make(machine, request, descriptors.into(), group).await
    }

    /// Makes a machine of a snapshot (see [`ForkRequest::Resume`]).
    pub async fn resume(
        &self,
        server: Arc<ForkServer>,
        label: String,
        size: Option<Size>,
        descriptors: [OwnedFd; 4],
        group: Option<&Group>,
    ) -> Result<Forked, ForkError> {
        let machine = self.next_machine.fetch_add(1, Ordering::Relaxed);
        let shape = size.map(shape);
        let request = ForkRequest::Resume { machine, label, shape, cgroup: group.is_some() };
        server.make(machine, request, descriptors.into(), group).await
    }
}

fn shape(Size { memory_bytes, vcpus }: Size) -> Shape {
    Shape { memory_bytes, vcpus }
}

pub struct ForkServer {
    pub base: String,
    /// What its machines can have, if the base says.
    pub sizes: Option<base::Machine>,
    /// What their agent speaks, if the base says.
    pub agent_protocol: Option<u16>,
    socket: MessageSocket,
    table: Mutex<Table>,
    gone: CancellationToken,
}

#[derive(Default)]
struct Table {
    forking: HashMap<MachineId, oneshot::Sender<Result<i32, String>>>,
    running: HashMap<MachineId, oneshot::Sender<ProcessExit>>,
}

impl ForkServer {
    async fn start(
        vmm: &Path,
        uid: Option<u32>,
        dir: &Path,
        base: String,
    ) -> Result<Arc<Self>, ForkError> {
        let spawn = |reason: std::io::Error| ForkError::Spawn {
            program: vmm.into(),
            reason: reason.to_string(),
        };
        let (ours, theirs) = message_pair(false).map_err(spawn)?;
        let mut command = Command::new(vmm);
        command.arg("fork-server").arg("--base").arg(dir);
        if let Some(uid) = uid {
            command.arg("--uid").arg(uid.to_string());
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // A Ctrl-C at the service's terminal is for the service, which then stops the machines in order.
        command.process_group(0);
        command
            .fd_mappings(vec![FdMapping { parent_fd: theirs, child_fd: 3 }])
            .map_err(|error| spawn(std::io::Error::other(error)))?;
        let mut child = command.spawn().map_err(spawn)?;
        // The command holds the far end, which has to be closed here for an end to be seen.
        drop(command);
        let socket = MessageSocket::new(ours).map_err(spawn)?;

        let event = timeout(READY_TIMEOUT, socket.receive::<ForkEvent>())
            .await
            .map_err(|_| ForkError::Timeout { base: base.clone(), after: READY_TIMEOUT })?;
        match event.map(|packet| packet.message) {
            Ok(ForkEvent::Ready { version, .. }) if version != hermitage_vmm_proto::VERSION => {
                return Err(ForkError::Version {
                    base,
                    theirs: version,
                    ours: hermitage_vmm_proto::VERSION,
                });
            }
            Ok(ForkEvent::Ready { base: id, .. }) => {
                tracing::info!(base = id, pid = child.id(), "fork server ready");
            }
            Ok(ForkEvent::Refused { reason }) => return Err(ForkError::Refused { base, reason }),
            Ok(_) | Err(_) => return Err(ForkError::Gone { base }),
        }
        let of_base = dir.to_owned();
        let manifest = tokio::task::spawn_blocking(move || Base::manifest(&of_base)).await;
        let content = match manifest {
            Ok(Ok(manifest)) => Some(manifest.content),
            other => {
                let error = other.map(|manifest| manifest.err());
                tracing::warn!(
                    base,
                    ?error,
                    "can't tell how much memory machines of this base have"
                );
                None
            }
        };
        let server = Arc::new(Self {
            base,
            sizes: content.as_ref().map(|content| content.machine),
            agent_protocol: content.as_ref().map(|content| content.agent_protocol),
            socket,
            table: Mutex::default(),
            gone: CancellationToken::new(),
        });
        // The tasks hold the server weakly: it ends when the last machine and the manager let go.
        let gone = server.gone.clone();
        let weak = Arc::downgrade(&server);
        tokio::spawn(async move {
            while let Some(server) = weak.upgrade() {
                // Wakes up now and then to let go of the server.
                match timeout(Duration::from_secs(5), server.socket.receive::<ForkEvent>()).await {
                    Err(_) => continue,
                    Ok(Ok(packet)) => server.handle(packet.message),
                    Ok(Err(error)) => {
                        server.end(&error);
                        break;
                    }
                }
            }
            gone.cancel();
            match timeout(Duration::from_secs(10), child.wait()).await {
                Ok(Ok(status)) => tracing::info!(%status, "fork server ended"),
                Ok(Err(error)) => tracing::warn!(%error, "can't wait for the fork server"),
                Err(_) => {
                    tracing::warn!(pid = child.id(), "the fork server does not end; killing it");
                    let _ = child.kill().await;
                }
            }
        });
        Ok(server)
    }

    async fn make(
        self: Arc<Self>,
        machine: MachineId,
        request: ForkRequest,
        descriptors: Vec<OwnedFd>,
        group: Option<&Group>,
    ) -> Result<Forked, ForkError> {
        let base = self.base.clone();
        let (forked, was_forked) = oneshot::channel();
        let (exit, exited) = oneshot::channel();
        {
            let mut table = self.table();
            table.forking.insert(machine, forked);
            table.running.insert(machine, exit);
        }
        let borrowed = descriptors.iter().map(|descriptor| descriptor.as_fd());
        let borrowed: Vec<_> = borrowed.chain(group.map(Group::procs)).collect();
        let sent = self.socket.send(&request, &borrowed).await.map_err(drop);
        drop(borrowed);
        // From here on the machine alone holds the disk and its lock.
        drop(descriptors);
        let answer = match sent {
            Ok(()) => timeout(FORK_TIMEOUT, was_forked).await,
            Err(()) => Ok(Ok(Err("the fork server is gone".into()))),
        };
        match answer {
            Ok(Ok(Ok(pid))) => Ok(Forked { id: machine, pid, exited, server: self }),
            Ok(Ok(Err(reason))) => {
                self.forget(machine);
                Err(ForkError::Failed { base, reason })
            }
            Ok(Err(_)) => Err(ForkError::Gone { base }),
            Err(_) => {
                self.forget(machine);
                self.kill(machine).await;
                Err(ForkError::Timeout { base, after: FORK_TIMEOUT })
            }
        }
    }

    /// Ends a machine without its help. No error if it is gone already.
    pub async fn kill(&self, machine: MachineId) {
        let request = ForkRequest::Kill { machine };
        let sent = timeout(Duration::from_secs(5), self.socket.send(&request, &[])).await;
        if !matches!(sent, Ok(Ok(()))) {
            tracing::warn!(machine, base = self.base, "can't ask the fork server to kill");
        }
    }

    fn handle(&self, event: ForkEvent) {
        let mut table = self.table();
        match event {
            ForkEvent::Forked { machine, pid } => {
                if let Some(waiting) = table.forking.remove(&machine) {
                    let _ = waiting.send(Ok(pid));
                }
            }
            ForkEvent::ForkFailed { machine, reason } => {
                table.running.remove(&machine);
                if let Some(waiting) = table.forking.remove(&machine) {
                    let _ = waiting.send(Err(reason));
                }
            }
            ForkEvent::Exited { machine, exit } => {
                if let Some(waiting) = table.forking.remove(&machine) {
                    let _ = waiting.send(Err(format!("the new machine ended at once ({exit:?})")));
                }
                if let Some(waiting) = table.running.remove(&machine) {
                    let _ = waiting.send(exit);
                }
            }
            ForkEvent::Ready { .. } | ForkEvent::Refused { .. } => {
                tracing::warn!(base = self.base, ?event, "unexpected from the fork server");
            }
        }
    }

    /// Everybody who waits for this server learns that it is gone, by their senders' end.
    fn end(&self, error: &SocketError) {
        tracing::warn!(base = self.base, %error, "lost the fork server");
        self.gone.cancel();
        let mut table = self.table();
        table.forking.clear();
        table.running.clear();
    }

    fn forget(&self, machine: MachineId) {
        let mut table = self.table();
        table.forking.remove(&machine);
        table.running.remove(&machine);
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
