//! Talking to the running service through its admin socket.

use super::context::Context;
use super::size;
use anyhow::{Context as _, bail};
use hermitage::admin::protocol::{MAX_REPLY, Reply, Request, SOCKET_NAME};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long the service may take for an answer. Stopping a machine takes what the guest is given to
/// power off, and then some.
fn patience(context: &Context, request: &Request) -> Duration {
    match request {
        Request::StopAccount { .. } | Request::ResetAccount { .. } => {
            let machines = &context.config.machines;
            machines.stop_timeout() + machines.save_timeout() + Duration::from_secs(30)
        }
        Request::StartAccount { .. } => {
            let machines = &context.config.machines;
            machines.start_timeout() + machines.stale_timeout() + Duration::from_secs(30)
        }
        _ => Duration::from_secs(30),
    }
}

/// A connection on which a request was answered.
pub struct Answer {
    pub reply: Reply,
    /// What follows the reply, for [`Request::Console`] and [`Request::CopyDisk`].
    pub stream: BufReader<UnixStream>,
}

/// `None`: no service is running.
pub fn ask(context: &Context, request: &Request) -> anyhow::Result<Option<Answer>> {
    let path = context.config.run_dir.join(SOCKET_NAME);
    let mut stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) => {
            return Err(error).with_context(|| format!("connecting to {}", path.display()));
        }
    };
    let answered = || -> anyhow::Result<Answer> {
        stream.set_read_timeout(Some(patience(context, request)))?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut stream = BufReader::new(stream);
        Ok(Answer { reply: next_reply(&mut stream)?, stream })
    };
    let answer =
        answered().with_context(|| format!("asking the service through {}", path.display()))?;
    Ok(Some(answer))
}

fn next_reply(stream: &mut BufReader<UnixStream>) -> anyhow::Result<Reply> {
    let mut line = Vec::new();
    stream.take(MAX_REPLY as u64).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        bail!("it closed without an answer");
    }
    Ok(serde_json::from_slice(&line)?)
}

/// Tells the service something; it not running is fine. True: it is running and did it.
pub fn tell(context: &Context, request: &Request) -> anyhow::Result<bool> {
    match ask(context, request)? {
        None => Ok(false),
        Some(Answer { reply: Reply::Error { message }, .. }) => {
            bail!("the service answered: {message}")
        }
        Some(_) => Ok(true),
    }
}

/// What the service made of the disk of a machine that runs.
pub enum Copied {
    /// No service is running.
    NoService,
    /// No machine is.
    NotRunning,
    /// Nobody else has it any more: it is gone when this is closed.
    Copy(File),
}

/// A copy that takes longer than this is spoken of, this often.
const QUIET: Duration = Duration::from_secs(2);
const PROGRESS: Duration = Duration::from_secs(10);

/// A copy of the disk of an account's running machine, as it is now.
pub fn copy_disk(context: &Context, account: &str) -> anyhow::Result<Copied> {
    let request = Request::CopyDisk { account: account.to_owned() };
    let Some(Answer { mut reply, mut stream }) = ask(context, &request)? else {
        return Ok(Copied::NoService);
    };
    let mut next = Instant::now() + QUIET;
    let mut waited = false;
    loop {
        match reply {
            reply @ (Reply::Waiting { .. } | Reply::Copying { .. }) => {
                let (waits, words) = match reply {
                    Reply::Copying { copied, of } => {
                        let (copied, of) = (size::show(copied), size::show(of));
                        (false, format!("copying the disk: {copied} of {of}"))
                    }
                    Reply::Waiting { for_another: true } => {
                        (true, "waiting for another copy to be done".into())
                    }
                    _ => (true, "waiting for its machine".into()),
                };
                // Whoever was told that it waits is told when it begins.
                if Instant::now() >= next || waited && !waits {
                    next = Instant::now() + PROGRESS;
                    waited = waits;
                    context.out.note(format!("{account} is in use; {words}"));
                }
            }
            Reply::Copied { path } => {
                // The file's name goes with the connection, the file with what is open here.
                let opened = File::open(&path);
                return opened
                    .map(Copied::Copy)
                    .with_context(|| format!("opening the copy {}", path.display()));
            }
            Reply::NotRunning => return Ok(Copied::NotRunning),
            Reply::Error { message } => bail!("the service answered: {message}"),
            other => bail!("the service answered what is no answer to it: {other:?}"),
        }
        reply = next_reply(&mut stream).context("waiting for the copy of the disk")?;
    }
}

/// The service looks at the account again. What was changed stays changed if it can't be told: that
/// is a warning.
pub fn account_changed(context: &Context, account: &str) {
    changed(context, &Request::AccountChanged { account: account.to_owned() });
}

/// The service makes ready for machines of another base, as [`account_changed`].
pub fn base_changed(context: &Context) {
    changed(context, &Request::BaseChanged);
}

fn changed(context: &Context, request: &Request) {
    if let Err(error) = tell(context, request) {
        eprintln!("hermitage: warning: the running service was not told of the change: {error:#}");
    }
}
