//! `hermitage serve`: start-up checks, the listeners, and an end in order.

mod admission;
mod banner;
mod channels;
mod connections;
mod crypto;
mod ended;
mod environment;
pub(crate) mod eow;
mod forwarding;
mod handler;
mod listener;
mod login_name;
mod manager;
mod penalties;
mod permits;
mod settings;
mod stream;
mod user;
mod words;

pub use connections::{Entry, Refusal};
pub use crypto::{HostKeyError, read_host_key};
pub use ended::Ended;
pub use login_name::Wishes;
pub use settings::{Reader, Settings};

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use hermitage_storage::{StateDir, faults};
use tokio::{
    net::{TcpListener, TcpSocket},
    signal::unix::{SignalKind, signal},
    sync::{
        Semaphore, mpsc,
        watch::{Sender, channel},
    },
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{self, AdminSocket},
    auth::{Authenticator, Trust},
    cgroup::Cgroups,
    closing,
    config::Config,
    copies,
    history::Recorder,
    lifecycle::{self, Registry, StopCause},
    lobby::{self, Desk},
    machine::{Asked, DESK_QUEUE, ForkServers},
    process,
    promises::Promises,
    room::{self, Floor},
    store::Store,
    watch::{self, Event, Watch, exporter::Exporter},
};
use connections::Connections;
use penalties::Penalties;

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: u32 = 256;

/// How long connections may take to end when the service stops.
const GOODBYE: Duration = Duration::from_secs(5);

/// Beyond a guest's own time to power off: for being killed, and reaped.
const STOP_MARGIN: Duration = Duration::from_secs(15);

/// What every connection stands on.
pub struct Server {
    pub(crate) config: Settings,
    pub(crate) store: Store,
    pub(crate) authenticator: Authenticator,
    pub(crate) registry: Registry,
    pub(crate) desk: Arc<Desk>,
    pub(crate) connections: Arc<Connections>,
    pub(crate) penalties: Penalties,
    pub(crate) current_base: Box<dyn Fn() -> Option<String> + Send + Sync>,
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) since: SystemTime,
    pub(crate) watch: Watch,
    pub(crate) cgroups: Cgroups,
    russh: Arc<russh::server::Config>,
}

/// Runs the service until SIGTERM or SIGINT, or until something it can't do without fails. At SIGHUP it has
/// the configuration read again.
pub fn run(config: Config, reader: Reader) -> anyhow::Result<()> {
    process::leave_no_core();
    if faults::arm()? {
        tracing::warn!("{} is set: this service is under a test of crashes", faults::VARIABLE);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let hangup = signal(SignalKind::hangup())?;
        let stopping = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("stopping");
            manager::tell("STOPPING=1\nSTATUS=saving machines");
            stopping.cancel();
        });
        tokio::spawn(manager::live());
        let service = Service::start(config).await?;
        tokio::spawn(settings::reload_on(hangup, service.server.clone(), reader));
        manager::tell("READY=1\nSTATUS=accounts can log in");
        service.serve(stop).await
    });
    // What is left are calls on their own threads, which have no more to say.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

/// A service that listens.
pub struct Service {
    server: Arc<Server>,
    listeners: Vec<TcpListener>,
    admin: AdminSocket,
    exporter: Exporter,
    scarce: Sender<bool>,
    copies: copies::Keeper,
    recorder: Recorder,
    questions: mpsc::Receiver<Asked>,
    _lock: File,
}

impl Service {
    /// Everything that can fail, before anybody is let in.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let config = Settings::new(config);
        let state_dir = StateDir::new(&config.state_dir);
        state_dir.create().context("the state directory can't be made")?;
        let lock = lock(&state_dir)?;
        let vmm = vmm(&config)?;
        if state_dir.current_base().context("the current base can't be told")?.is_none() {
            bail!(
                "there is no base in {}; make one first: hermitage image build, then \
                 hermitage base build",
                state_dir.bases_dir().display()
            );
        }
        let trust = trust(&config);
        check_files(&config)?;
        let key = crypto::host_key(&state_dir.host_key())?;
        let store = Store::open(&state_dir.database())?;
        let copies = copies::Keeper::open(&state_dir.database())?;
        let listeners = config
            .ssh
            .listen
            .iter()
            .filter_map(|address| listen(*address).transpose())
            .collect::<anyhow::Result<Vec<_>>>()?;
        if listeners.is_empty() {
            bail!("ssh.listen names no address that this host can listen on");
        }
        let addresses = listeners.iter().filter_map(|listener| listener.local_addr().ok());

        let bases = state_dir.clone();
        let current_base = move || match bases.current_base() {
            Ok(id) => Ok(id.map(|id| id.as_str().to_owned())),
            Err(error) => Err(error.to_string()),
        };
        let told = current_base.clone();
        let forks = ForkServers::new(
            vmm,
            user::uid(&config.machines.user)?,
            state_dir.bases_dir(),
            current_base,
        );
        let cgroups = Cgroups::open(&config.machines, &config.state_dir)
            .context("machines.require_limits is set, and limits can't be enforced here")?;
        cgroups.sweep();
        let (scarce, watched) = channel(false);
        let (asking, questions) = mpsc::channel(DESK_QUEUE);
        let watch = Watch::new(watch::audit_log(&config.audit, &config.state_dir));
        let registry = Registry::new(lifecycle::Context {
            config: config.clone(),
            state_dir: state_dir.clone(),
            store: store.clone(),
            forks,
            watch: watch.clone(),
            promises: Promises::default(),
            cgroups: cgroups.clone(),
            scarce: watched,
            copies: Semaphore::new(1),
            desk: asking,
        });
        let ssh = &config.ssh;
        let authenticator = Authenticator::new(
            store.clone(),
            trust,
            ssh.password_checks,
            Duration::from_millis(ssh.failure_delay_ms),
        );
        let recorder = Recorder::open(
            &state_dir.database(),
            state_dir.clone(),
            config.clone(),
            registry.clone(),
            watch.clone(),
        )?;
        let desk = Desk::new(
            registry.clone(),
            store.clone(),
            authenticator.clone(),
            config.clone(),
            state_dir,
            watch.clone(),
        );
        let server = Arc::new(Server {
            authenticator,
            desk: Arc::new(desk),
            connections: Arc::default(),
            penalties: Penalties::new(ssh.max_penalty(), ssh.penalty_exempt.clone()),
            current_base: Box::new(move || told().ok().flatten()),
            listen: addresses.collect(),
            since: SystemTime::now(),
            watch,
            cgroups,
            russh: Arc::new(crypto::server_config(ssh, key)),
            registry,
            store,
            config,
        });
        let admin = AdminSocket::bind(&server.config.run_dir)?;
        let metrics = server.config.metrics.address;
        let exporter = Exporter::bind(&server.config.run_dir, metrics).await?;
        server.registry.reconcile().await;
        server.registry.warm_up();
        Ok(Self {
            server,
            listeners,
            admin,
            exporter,
            scarce,
            copies,
            recorder,
            questions,
            _lock: lock,
        })
    }

    /// The addresses listened on; the port is real where 0 was asked for.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.server.listen
    }

    /// Serves until `stop`, then ends everything in order.
    pub async fn serve(self, stop: CancellationToken) -> anyhow::Result<()> {
        let Self { server, listeners, admin, exporter, scarce, copies, recorder, questions, _lock } =
            self;
        for address in &server.listen {
            tracing::info!(%address, "listening");
        }
        if let Some(address) = exporter.address() {
            tracing::info!(%address, "metrics");
        }
        server.watch.tell(Event::ServiceStarted {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            listen: server.listen.iter().map(ToString::to_string).collect(),
        });
        let mut tasks = tokio::task::JoinSet::new();
        for listener in listeners {
            tasks.spawn(listener::accept(server.clone(), listener));
        }
        tasks.spawn(admin::serve(server.clone(), admin));
        tasks.spawn(closing::keep_hours(server.clone()));
        tasks.spawn(exporter.serve(server.clone()));
        tasks.spawn(copies.keep());
        tasks.spawn(recorder.clone().keep());
        tasks.spawn(lobby::answer_all(server.desk.clone(), server.watch.clone(), questions));
        let floor = Floor::new(server.config.machines.guest_floor());
        tasks.spawn(room::keep_watch(server.config.state_dir.clone(), floor, scarce));
        tokio::select! {
            () = stop.cancelled() => {}
            // They run for ever.
            Some(ended) = tasks.join_next() => {
                tracing::error!(?ended, "a listener ended; stopping");
            }
        }
        tasks.abort_all();
        server.shut_down().await;
        recorder.write().await;
        Ok(())
    }
}

impl Server {
    async fn shut_down(&self) {
        self.watch.tell(Event::ServiceStopping);
        let machines = &self.config.machines;
        let stopping = machines.stop_timeout() + STOP_MARGIN;
        let left = self.registry.shutdown(machines.save_timeout(), stopping).await;
        if left > 0 {
            tracing::error!(left, "machines did not stop in time; they end with this process");
        }
        // Sessions have been told by now; what remains are connections without one.
        self.connections.disconnect_all(&StopCause::Shutdown.to_string());
        if timeout(GOODBYE, self.connections.all_gone()).await.is_err() {
            tracing::warn!(left = self.connections.count(), "connections cut off");
        }
        self.watch.tell(Event::ServiceStopped { machines_left: left });
        self.watch.flush().await;
    }
}

/// Whether the files that the configuration names can be used.
pub fn check_files(config: &Config) -> anyhow::Result<()> {
    if let Some(path) = &config.ssh.banner {
        banner::read(path).with_context(|| {
            format!("ssh.banner names {}, which can't be shown", path.display())
        })?;
    }
    let files = "ssh.user_ca_keys and ssh.revoked_keys have to name usable files";
    trust(config).check().context(files)
}

fn trust(config: &Config) -> Trust {
    Trust { authorities: config.ssh.user_ca_keys.clone(), revoked: config.ssh.revoked_keys.clone() }
}

/// One service per state directory: the lock is this process's, however it ends.
fn lock(state_dir: &StateDir) -> anyhow::Result<File> {
    match state_dir.lock_service() {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => {
            bail!("another hermitage serve uses {}; stop it first", state_dir.root().display())
        }
        Err(error) => Err(error).context("the state directory can't be locked"),
    }
}

fn vmm(config: &Config) -> anyhow::Result<PathBuf> {
    let path = config.libexec_dir().join("hermitage-vmm");
    if !Path::is_file(&path) {
        bail!(
            "there is no {}; install it there, or say where it is with libexec_dir or \
             HERMITAGE_LIBEXEC",
            path.display()
        );
    }
    Ok(path)
}

/// None, with a warning, for an address family that this host does not have.
fn listen(address: SocketAddr) -> anyhow::Result<Option<TcpListener>> {
    let open = || {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => {
                let socket = TcpSocket::new_v6()?;
                // 0.0.0.0 and [::] side by side, whatever the host's default is.
                socket2::SockRef::from(&socket).set_only_v6(true)?;
                socket
            }
        };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    match open() {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
            tracing::warn!(%address, "not listening there: this host does not have that protocol");
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| {
            format!(
                "can't listen on {address}; is something else there? (ssh.listen sets the addresses)"
            )
        }),
    }
}
