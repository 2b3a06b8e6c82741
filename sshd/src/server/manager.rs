//! What the service tells systemd: that it is ready, that it lives, that it stops (sd_notify(3)). Without
//! a service manager there is nobody to tell.

use std::{
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval};

/// Tells the service manager. A failure is no reason not to serve.
pub fn tell(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let told = || {
        let path = path.to_string_lossy();
        let address = match path.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(path.as_ref())?,
        };
        UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)
    };
    if let Err(error) = told() {
        tracing::warn!(%error, state, "can't tell the service manager");
    }
}

/// Says that the service lives, for as long as its tasks are run. It returns at once where nobody listens.
pub async fn live() {
    let Some(limit) = watchdog() else { return };
    let mut tick = interval(limit / 3);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        tell("WATCHDOG=1");
    }
}

/// After what time of silence the service manager ends the service (sd_watchdog_enabled(3)).
fn watchdog() -> Option<Duration> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let for_us = match std::env::var("WATCHDOG_PID") {
        Ok(pid) => pid == std::process::id().to_string(),
        Err(_) => true,
    };
    let limit = number("WATCHDOG_USEC").filter(|limit| for_us && *limit > 0)?;
    Some(Duration::from_micros(limit))
}
