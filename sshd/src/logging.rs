//! The service's log, for whoever runs it: lines on standard error.

use std::io::{IsTerminal as _, stderr};

use tracing_subscriber::{
    EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use crate::{server, watch::errors::Counted};

/// Begins it, once in a process: what `RUST_LOG` asks for, otherwise `default`, of the service and its libraries.
pub fn start(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let lines =
        tracing_subscriber::fmt::layer().with_writer(stderr).with_ansi(stderr().is_terminal());
    // The filter is for the lines and what counts them: clients are heard whatever is logged.
    tracing_subscriber::registry()
        .with(lines.and_then(Counted).with_filter(filter))
        .with(server::eow::layer())
        .init();
}
