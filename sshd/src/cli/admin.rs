//! Talking to the running service through its admin socket.

use super::context::Context;
use anyhow::{Context as _, bail};
use hermitage::admin::protocol::{MAX_REPLY, Reply, Request, SOCKET_NAME};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

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
    /// What follows the reply, for [`Request::Console`].
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
        let mut line = Vec::new();
        (&mut stream).take(MAX_REPLY as u64).read_until(b'\n', &mut line)?;
        if line.pop() != Some(b'\n') {
            bail!("it closed without an answer");
        }
        Ok(Answer { reply: serde_json::from_slice(&line)?, stream })
    };
    let answer =
        answered().with_context(|| format!("asking the service through {}", path.display()))?;
    Ok(Some(answer))
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
