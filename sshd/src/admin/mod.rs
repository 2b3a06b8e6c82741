//! The admin socket: what operators ask of the running service. See [`protocol`] for the words.
//!
//! Only the service's own user may connect: the socket is mode 0600 and made that way before it is
//! listened on.

mod copying;
pub mod protocol;
mod sessions;

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

use crate::{
    closing,
    lifecycle::StopCause,
    machine::Counted,
    server::Server,
    watch::{Event, Who},
};
use protocol::{AccountStatus, Enforcement, MAX_REQUEST, Reply, Request, SOCKET_NAME, Status};

/// How long a client may take for its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Requests, and consoles, at once.
const MAX_CLIENTS: usize = 64;

/// The socket, removed when the service ends.
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl AdminSocket {
    pub fn bind(run_dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(run_dir)
            .with_context(|| format!("can't make the run directory {}", run_dir.display()))?;
        let path = run_dir.join(SOCKET_NAME);
        if std::os::unix::net::UnixStream::connect(&path).is_ok() {
            bail!(
                "another hermitage serve answers at {}; give this one a run_dir of its own",
                path.display()
            );
        }
        let beside = run_dir.join(format!("{SOCKET_NAME}.new"));
        let _ = std::fs::remove_file(&beside);
        // Bound under another name until its mode is right.
        let listener = UnixListener::bind(&beside)
            .with_context(|| format!("can't make the admin socket {}", beside.display()))?;
        std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600))
            .and_then(|()| std::fs::rename(&beside, &path))
            .with_context(|| format!("can't make the admin socket {}", path.display()))?;
        Ok(Self { listener, path })
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Answers requests for ever.
pub async fn serve(server: Arc<Server>, socket: AdminSocket) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match socket.listener.accept().await {
            Ok((stream, _)) => {
                let server = server.clone();
                tokio::spawn(async move {
                    if let Err(error) = attend(&server, stream).await {
                        tracing::debug!(%error, "admin client");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept an admin client");
                sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

async fn attend(server: &Server, mut stream: UnixStream) -> std::io::Result<()> {
    let request = match timeout(REQUEST_TIMEOUT, read_line(&mut stream)).await {
        Ok(line) => line?,
        Err(_) => return Ok(()),
    };
    let request = match request.map(|line| serde_json::from_slice::<Request>(&line)) {
        Some(Ok(request)) => request,
        Some(Err(error)) => {
            return answer(&mut stream, &refused(format!("no request: {error}"))).await;
        }
        None => {
            let words = format!("a request is a line of at most {MAX_REQUEST} bytes");
            return answer(&mut stream, &refused(words)).await;
        }
    };
    if !looks_only(&request) {
        tracing::info!(?request, "admin request");
        server.watch.tell(Event::AdminRequest {
            who: asker(&stream),
            request: serde_json::to_value(&request)?,
        });
    }
    match request {
        Request::AccountChanged { account } => {
            let reply = account_changed(server, &account).await;
            answer(&mut stream, &reply).await
        }
        Request::StartAccount { account } => {
            let reply = start_account(server, &account).await;
            answer(&mut stream, &reply).await
        }
        Request::ResetAccount { account } => {
            let reply = reset_account(server, &account).await;
            answer(&mut stream, &reply).await
        }
        Request::StopAccount { account } => {
            let reply = stop_account(server, &account).await;
            answer(&mut stream, &reply).await
        }
        Request::Status => {
            let reply = status(server).await;
            answer(&mut stream, &reply).await
        }
        Request::Sessions { account } => {
            let reply = sessions::list(server, account).await;
            answer(&mut stream, &reply).await
        }
        Request::EndSessions { numbers, account } => {
            let reply = sessions::end(server, &numbers, account).await;
            answer(&mut stream, &reply).await
        }
        Request::Message { numbers, account, text } => {
            let reply = sessions::message(server, &numbers, account, &text).await;
            answer(&mut stream, &reply).await
        }
        Request::Console { account } => console(server, &account, stream).await,
        Request::CopyDisk { account, memory } => {
            copying::copy_disk(server, &account, memory, stream).await
        }
        Request::CountProcesses { account } => {
            let reply = count_processes(server, &account).await;
            answer(&mut stream, &reply).await
        }
        Request::BaseChanged => {
            server.registry.warm_up();
            answer(&mut stream, &Reply::Done).await
        }
    }
}

/// Such requests change nothing and show nothing of what is in a machine: they are not worth a word.
fn looks_only(request: &Request) -> bool {
    matches!(request, Request::Status | Request::Sessions { .. } | Request::CountProcesses { .. })
}

/// Who is at the other end, as the kernel says.
fn asker(stream: &UnixStream) -> Who {
    let who = stream.peer_cred().map(|peer| Who::of(peer.uid(), peer.pid().unwrap_or(0)));
    who.unwrap_or_default()
}

/// A line without its newline; None if it is too long or cut short. Byte by byte, because what follows
/// a console's line is not ours; it is short.
async fn read_line(stream: &mut UnixStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            return Ok(None);
        }
        match byte {
            [b'\n'] => return Ok(Some(line)),
            [byte] => line.push(byte),
        }
        if line.len() >= MAX_REQUEST {
            return Ok(None);
        }
    }
}

async fn answer(stream: &mut UnixStream, reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

fn refused(message: String) -> Reply {
    Reply::Error { message }
}

/// Only an account that may no longer be here is acted on, and what becomes of an idle machine: keys and
/// passwords count for logins to come.
async fn account_changed(server: &Server, name: &str) -> Reply {
    let account = match server.store.by_name(name).await {
        Ok(account) => account,
        Err(error) => return refused(error.to_string()),
    };
    if let Some(account) = account.as_ref().filter(|account| account.is_open()) {
        server.registry.reconsider(account.id);
        return Reply::Done;
    }
    // Removed accounts have no name any more: whoever is here and may not be is found by looking.
    let here = server.registry.known().into_iter().chain(server.connections.accounts());
    let mut suspects: Vec<_> = here.chain(account.map(|account| account.id)).collect();
    suspects.sort();
    suspects.dedup();
    for id in suspects {
        match server.store.by_id(id).await {
            Ok(account) => {
                if let Some(closed) = closing::closed(account.as_ref()) {
                    closing::end(server, id, closed);
                }
            }
            Err(error) => return refused(error.to_string()),
        }
    }
    Reply::Done
}

async fn stop_account(server: &Server, name: &str) -> Reply {
    match server.store.by_name(name).await {
        Ok(Some(account)) => {
            server.registry.stop(account.id, StopCause::Admin).await;
            Reply::Done
        }
        Ok(None) => refused(format!("there is no account \"{name}\"")),
        Err(error) => refused(error.to_string()),
    }
}

async fn start_account(server: &Server, name: &str) -> Reply {
    match server.store.by_name(name).await {
        Ok(Some(account)) => match server.registry.start(&account).await {
            Ok(()) => Reply::Done,
            Err(error) => refused(format!("{name}'s machine does not start: {error}")),
        },
        Ok(None) => refused(format!("there is no account \"{name}\"")),
        Err(error) => refused(error.to_string()),
    }
}

async fn reset_account(server: &Server, name: &str) -> Reply {
    match server.store.by_name(name).await {
        Ok(Some(account)) => {
            server.registry.reset(&account).await;
            Reply::Done
        }
        Ok(None) => refused(format!("there is no account \"{name}\"")),
        Err(error) => refused(error.to_string()),
    }
}

async fn status(server: &Server) -> Reply {
    let mut accounts = vec![];
    for (id, status) in server.registry.status() {
        let name = match server.store.by_id(id).await {
            Ok(account) => account.map_or_else(|| id.to_string(), |account| account.name),
            Err(error) => return refused(error.to_string()),
        };
        accounts.push(AccountStatus { account: name, ..status });
    }
    accounts.sort_by(|a, b| a.account.cmp(&b.account));
    let since = server.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Reply::Status(Status {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        since: since.as_secs().try_into().unwrap_or(i64::MAX),
        listen: server.listen.iter().map(ToString::to_string).collect(),
        base: (server.current_base)(),
        connections: server.connections.count().try_into().unwrap_or(u32::MAX),
        accounts,
        limits: match server.cgroups.describe() {
            Ok(path) => Enforcement { path: Some(path), reason: None },
            Err(reason) => Enforcement { path: None, reason: Some(reason) },
        },
    })
}

async fn count_processes(server: &Server, name: &str) -> Reply {
    let machine = match server.store.by_name(name).await {
        Ok(Some(account)) => server.registry.machine(account.id),
        Ok(None) => return refused(format!("there is no account \"{name}\"")),
        Err(error) => return refused(error.to_string()),
    };
    match machine {
        Some(machine) => {
            let Counted { count, fault } = machine.count_processes().await;
            Reply::Processes { count, fault }
        }
        None => Reply::NotRunning,
    }
}

async fn console(server: &Server, name: &str, mut stream: UnixStream) -> std::io::Result<()> {
    let machine = match server.store.by_name(name).await {
        Ok(Some(account)) => server.registry.machine(account.id),
        Ok(None) => {
            let reply = refused(format!("there is no account \"{name}\""));
            return answer(&mut stream, &reply).await;
        }
        Err(error) => return answer(&mut stream, &refused(error.to_string())).await,
    };
    let Some(machine) = machine else {
        let words = format!("no machine of \"{name}\" is running; log in as {name} to start it");
        return answer(&mut stream, &refused(words)).await;
    };
    let mut console = match machine.console().await {
        Ok(console) => console,
        Err(error) => return answer(&mut stream, &refused(error.to_string())).await,
    };
    answer(&mut stream, &Reply::Done).await?;
    copy_bidirectional(&mut stream, &mut console).await?;
    Ok(())
}
