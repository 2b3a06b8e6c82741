//! Where the metrics are asked for: `RUN_DIR/metrics.sock` (mode 0660, as its folder permits), and a port on
//! loopback if the configuration names one. HTTP/1.0 (RFC 1945), one request a connection, nothing kept:
//! whoever wants TLS, names or a network puts a proxy in front.

use std::{
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    time::{sleep, timeout},
};

use super::gather;
use crate::server::Server;

/// The socket's name inside the run directory.
pub const SOCKET_NAME: &str = "metrics.sock";

/// How long one client may take.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Clients at once, of both kinds together.
const MAX_CLIENTS: usize = 8;

/// Bytes of a request that are read: more than any scraper's.
const MAX_HEAD: usize = 8 * 1024;

/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub struct Exporter {
    unix: UnixListener,
    tcp: Option<TcpListener>,
    path: PathBuf,
}

impl Exporter {
    pub async fn bind(run_dir: &Path, address: Option<SocketAddr>) -> anyhow::Result<Self> {
        let path = run_dir.join(SOCKET_NAME);
        let beside = run_dir.join(format!("{SOCKET_NAME}.new"));
        let failed = || format!("can't make the metrics socket {}", path.display());
        let _ = std::fs::remove_file(&beside);
        // Bound under another name until its mode is right.
        let unix = UnixListener::bind(&beside).with_context(failed)?;
        std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o660))
            .and_then(|()| std::fs::rename(&beside, &path))
            .with_context(failed)?;
        let tcp = match address {
            Some(address) => Some(TcpListener::bind(address).await.with_context(|| {
                format!("can't listen on {address} for the metrics (metrics.address)")
            })?),
            None => None,
        };
        Ok(Self { unix, tcp, path })
    }

    /// The port that is listened on, real where 0 was asked for.
    pub fn address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref()?.local_addr().ok()
    }

    /// Answers for ever.
    pub async fn serve(self, server: Arc<Server>) {
        let places = Arc::new(Semaphore::new(MAX_CLIENTS));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let server = server.clone();
            let accepted = tokio::select! {
                accepted = self.unix.accept() => accepted.map(|(stream, _)| {
                    tokio::spawn(async move { (attend(&server, stream).await, place) });
                }),
                accepted = accept(&self.tcp) => accepted.map(|stream| {
                    tokio::spawn(async move { (attend(&server, stream).await, place) });
                }),
            };
            if let Err(error) = accepted {
                tracing::warn!(%error, "can't accept somebody who asks for metrics");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn accept(listener: &Option<TcpListener>) -> std::io::Result<tokio::net::TcpStream> {
    match listener {
        Some(listener) => Ok(listener.accept().await?.0),
        None => std::future::pending().await,
    }
}

/// One request. What a client does wrong ends its connection, nothing else.
async fn attend<S: AsyncRead + AsyncWrite + Unpin>(server: &Arc<Server>, mut stream: S) {
    let answered = timeout(CLIENT_TIMEOUT, async {
        let head = read_head(&mut stream).await?;
        let response = match asked(&head) {
            Asked::Metrics => {
                let server = server.clone();
                let text =
                    tokio::task::spawn_blocking(move || gather::text(&server, &server.watch));
                let text = text.await.map_err(std::io::Error::other)?;
                response("200 OK", CONTENT_TYPE, &text)
            }
            Asked::Else => refusal("404 Not Found", "metrics are at /metrics"),
            Asked::Wrongly => refusal("400 Bad Request", "this answers GET /metrics"),
        };
        stream.write_all(response.as_bytes()).await?;
        stream.shutdown().await
    });
    if let Ok(Err(error)) = answered.await {
        tracing::debug!(%error, "metrics client");
    }
}

/// Up to the empty line after the header fields, or as much as is read of them.
async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        let count = stream.read(&mut chunk).await?;
        head.extend_from_slice(chunk.get(..count).unwrap_or_default());
        let whole = head.windows(4).any(|end| end == b"\r\n\r\n") || head.ends_with(b"\n\n");
        if count == 0 || whole || head.len() >= MAX_HEAD {
            return Ok(head);
        }
    }
}

#[derive(Debug, PartialEq)]
enum Asked {
    Metrics,
    Else,
    Wrongly,
}

fn asked(head: &[u8]) -> Asked {
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let Ok(line) = std::str::from_utf8(line) else { return Asked::Wrongly };
    let mut words = line.trim_end().split(' ');
    let (method, path, version) = (words.next(), words.next(), words.next());
    let http = version.is_some_and(|version| version.starts_with("HTTP/1."));
    match (method, path) {
        _ if !http || words.next().is_some() => Asked::Wrongly,
        (Some("GET"), Some(path)) => match path.split('?').next() {
            Some("/metrics") => Asked::Metrics,
            _ => Asked::Else,
        },
        _ => Asked::Wrongly,
    }
}

fn refusal(status: &str, words: &str) -> String {
    response(status, "text/plain; charset=utf-8", &format!("{words}\n"))
}

fn response(status: &str, content_type: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.0 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        assert_eq!(asked(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), Asked::Metrics);
        assert_eq!(asked(b"GET /metrics?x=1 HTTP/1.0\n\n"), Asked::Metrics);
        assert_eq!(asked(b"GET / HTTP/1.1\r\n\r\n"), Asked::Else);
        for wrong in [&b"POST /metrics HTTP/1.1\r\n"[..], b"GET /metrics\r\n", b"", b"\xff\xfe\r\n"]
        {
            assert_eq!(asked(wrong), Asked::Wrongly, "{wrong:?}");
        }
    }

    #[tokio::test]
    async fn a_head_without_an_end_is_read_to_a_limit() {
        let mut endless = tokio::io::repeat(b'a');
        let head = read_head(&mut endless).await.unwrap();
        assert!(head.len() < MAX_HEAD + 1024);
        assert_eq!(asked(&head), Asked::Wrongly);
    }
}
