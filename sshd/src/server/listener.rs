//! Taking connections, and the life of each from accept to close.
//!
//! The loop is ours: russh's returns at the first accept error, so that running out of descriptors
//! would end the service.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use russh::Disconnect;
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

use super::{
    Server,
    connections::{Place, Refusal, source},
    environment,
    handler::ClientHandler,
    penalties::Offence,
    stream::{Stream, Switch},
};
use crate::{link::Link, session::Inflow, watch::Event};

/// How long a client may take to close once the server has said all it has to say.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after a failed accept. It fails when descriptors run out, which passes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Accepts connections for ever.
pub async fn accept(server: Arc<Server>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((tcp, peer)) => admit(&server, tcp, peer),
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn admit(server: &Arc<Server>, tcp: TcpStream, peer: SocketAddr) {
    let free = match server.penalties.check(source(peer), Instant::now()) {
        Some(penalty) => Err(penalty.into()),
        None => server.connections.enter(peer, &server.config.ssh),
    };
    match free {
        Ok(place) => {
            tokio::spawn(attend(server.clone(), tcp, peer, place));
        }
        Err(refusal) => {
            server.watch.tell(Event::ConnectionRefused { reason: refusal.name() });
            // The beginning of a penalty was a warning: who tries on and on does not fill the log.
            match refusal {
                Refusal::Penalty(_) => tracing::debug!(%peer, %refusal, "connection refused"),
                _ => tracing::warn!(%peer, %refusal, "connection refused"),
            }
            // A server may say something before it names itself (RFC 4253 §4.2); whether it arrives
            // is not worth waiting for.
            let words = match refusal {
                Refusal::Penalty(_) => "too many failed logins from your address; try again later",
                _ => "too many connections; try again in a moment",
            };
            let _ = tcp.try_write(format!("hermitage: {words}\r\n").as_bytes());
        }
    }
}

/// Notes what a source has done, and logs the penalty that begins with it.
pub fn offend(server: &Server, peer: SocketAddr, offence: Offence) {
    if let Some(penalty) = server.penalties.note(source(peer), offence, Instant::now()) {
        tracing::warn!(source = %source(peer), %penalty, "source refused");
        server.watch.tell(Event::Penalty {
            source: source(peer).to_string(),
            seconds: penalty.left.as_secs(),
            after: penalty.offence.words(),
        });
    }
}

/// One connection, from its first byte to its last.
async fn attend(server: Arc<Server>, tcp: TcpStream, peer: SocketAddr, mut place: Place) {
    tracing::debug!(%peer, "connection");
    let entry = place.entry.clone();
    match prepare(&tcp) {
        Ok(link) => entry.set_link(link),
        Err(error) => tracing::debug!(%peer, %error, "can't set socket options"),
    }
    let ends = environment::connection(peer, tcp.local_addr().ok());
    let inflow = Arc::new(Inflow::default());
    let (stream, switch) = Stream::new(tcp, inflow.clone());
    let handler = ClientHandler::new(server.clone(), peer, ends, inflow, entry.clone());
    let grace = sleep(Duration::from_secs(server.config.ssh.login_grace));
    tokio::pin!(grace);

    let begun = tokio::select! {
        begun = russh::server::run_stream(server.russh.clone(), stream, handler) => begun,
        () = &mut grace => {
            tracing::info!(%peer, "said nothing in time");
            offend(&server, peer, Offence::Grace);
            return;
        }
        _ = entry.disconnected() => return,
    };
    let mut running = match begun {
        Ok(running) => running,
        Err(error) => {
            tracing::debug!(%peer, %error, "no ssh client");
            offend(&server, peer, Offence::NoAttempt);
            return;
        }
    };
    let handle = running.handle();
    let (mut authenticated, mut late) = (false, false);
    let ended = loop {
        tokio::select! {
            ended = &mut running => break ended,
            () = entry.wait_authenticated(), if !authenticated => {
                authenticated = true;
                place.authenticated();
            }
            () = &mut grace, if !authenticated => {
                tracing::info!(%peer, "did not authenticate in time");
                offend(&server, peer, Offence::Grace);
                late = true;
                switch.cut();
                break running.await;
            }
            reason = entry.disconnected() => {
                tracing::info!(%peer, reason, "disconnecting");
                let by_application = Disconnect::ByApplication;
                let said = handle.disconnect(by_application, reason, "en".into());
                let _ = timeout(CLOSE_TIMEOUT, said).await;
                entry.said_goodbye();
                break close(&switch, running).await;
            }
            () = switch.finished.cancelled() => break close(&switch, running).await,
        }
    };
    // One that was turned away at once may have gone before it was noticed that it had authenticated.
    if !entry.is_authenticated() && !late {
        offend(&server, peer, Offence::NoAttempt);
    }
    match ended {
        Ok(()) => tracing::debug!(%peer, "connection closed"),
        Err(error) => tracing::debug!(%peer, %error, "connection ended"),
    }
}

/// Gives the client a moment to close, then closes.
async fn close<E>(
    switch: &Switch,
    mut running: impl Future<Output = Result<(), E>> + Unpin,
) -> Result<(), E> {
    match timeout(CLOSE_TIMEOUT, &mut running).await {
        Ok(ended) => ended,
        Err(_) => {
            switch.cut();
            running.await
        }
    }
}

fn prepare(tcp: &TcpStream) -> std::io::Result<Link> {
    // Keystrokes are small and wait for nobody.
    tcp.set_nodelay(true)?;
    Link::new(tcp)
}
