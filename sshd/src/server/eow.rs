//! `eow@openssh.com`: a client takes no more of a program's output (OpenSSH's PROTOCOL, 2.1).
//!
//! russh does not know this request, and has no callback for requests that it does not know: it logs a warning. It
//! does so in the task that runs the connection, in which it calls this service's callbacks too. So [`layer`]
//! listens to the log, and a connection's callbacks have said before, by [`Meant`], whose output it is.
//!
//! The warning does not name the channel. So somebody is meant only as long as there is nobody else who could be.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

use tokio::task;
use tokio_util::sync::CancellationToken;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, filter::Targets, layer::Context, registry::LookupSpan};

/// As russh 0.65.1 has it (src/server/encrypted.rs), with the name of this request.
const WARNING: &str = "unknown channel request eow@openssh.com";
const NAME: &str = "eow@openssh.com";
const TARGET: &str = "russh::server";

/// Whose output it is, by the connection's task. At most one for each connection there is.
static MEANT: LazyLock<Mutex<HashMap<task::Id, CancellationToken>>> = LazyLock::new(Mutex::default);

fn meant() -> MutexGuard<'static, HashMap<task::Id, CancellationToken>> {
    MEANT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection's entry there, if it has one. It goes with the connection.
#[derive(Default)]
pub struct Meant(Option<task::Id>);

impl Meant {
    /// From a callback: if the client of this connection says `eow`, that is cancelled. `None`: nothing happens.
    pub fn set(&mut self, unread: Option<CancellationToken>) {
        let Some(unread) = unread else { return self.forget() };
        // Outside of any task there is nobody to hear it either.
        self.0 = self.0.or_else(task::try_id);
        if let Some(task) = self.0 {
            meant().insert(task, unread);
        }
    }

    fn forget(&mut self) {
        if let Some(task) = self.0.take() {
            meant().remove(&task);
        }
    }
}

impl Drop for Meant {
    fn drop(&mut self) {
        self.forget();
    }
}

/// Hears the warning, and keeps it from all other layers, whatever name is in it: it is no news for a log, and any
/// client can say it as often as it likes.
pub fn layer<S>() -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    Ear.with_filter(Targets::new().with_target(TARGET, Level::WARN))
}

struct Ear;

impl<S: Subscriber> Layer<S> for Ear {
    fn event_enabled(&self, event: &Event<'_>, _context: Context<'_, S>) -> bool {
        let mut said = Said::Other;
        event.record(&mut said);
        if said == Said::Eow
            && let Some(task) = task::try_id()
        {
            let unread = meant().get(&task).cloned();
            if let Some(unread) = unread {
                unread.cancel();
            }
        }
        said == Said::Other
    }
}

/// What an event is.
#[derive(PartialEq)]
enum Said {
    Eow,
    /// The warning, of another request.
    Unknown,
    Other,
}

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let mut rest = Rest(WARNING);
            let whole = write!(rest, "{value:?}").is_ok();
            *self = match rest.0.len() {
                0 if whole => Self::Eow,
                left if left <= NAME.len() => Self::Unknown,
                _ => Self::Other,
            };
        }
    }
}

/// What a text must still be followed by to be the one that is looked for. The first difference ends it: a client
/// chooses how long the name of a request is.
struct Rest(&'static str);

impl fmt::Write for Rest {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let same =
            part.bytes().zip(self.0.bytes()).take_while(|(said, looked)| said == looked).count();
        self.0 = self.0.get(same..).unwrap_or_default();
        if same == part.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use tracing::subscriber::DefaultGuard;
    use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _};

    use super::*;

    /// What else is listening counts what it hears.
    #[derive(Clone, Default)]
    struct Count(Arc<AtomicUsize>);

    impl Count {
        fn heard(&self) -> usize {
            self.0.swap(0, Ordering::Relaxed)
        }
    }

    impl<S: Subscriber> Layer<S> for Count {
        fn on_event(&self, _event: &Event<'_>, _context: Context<'_, S>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn listen(filter: &str) -> (Count, DefaultGuard) {
        let count = Count::default();
        let rest = count.clone().with_filter(EnvFilter::new(filter));
        let subscriber = tracing_subscriber::registry().with(rest).with(layer());
        (count, tracing::subscriber::set_default(subscriber))
    }

    macro_rules! russh_warns {
        ($($text:tt)*) => { tracing::warn!(target: "russh::server::encrypted", $($text)*) };
    }

    #[tokio::test]
    async fn who_is_meant_is_told_whatever_is_logged() {
        for filter in ["info", "off", "hermitage=debug"] {
            let (count, _guard) = listen(filter);
            let told = tokio::spawn(async {
                let (unread, mut meant) = (CancellationToken::new(), Meant::default());
                meant.set(Some(unread.clone()));
                // As russh writes it: the name is an argument.
                russh_warns!("unknown channel request {}", "eow@openssh.com");
                unread.is_cancelled()
            });
            assert!(told.await.unwrap(), "{filter}");
            assert_eq!(count.heard(), 0, "it is in the log too");
        }
    }

    #[tokio::test]
    async fn nothing_else_that_is_logged_means_anybody_and_all_of_it_goes_on() {
        let (count, _guard) = listen("info");
        let told = tokio::spawn(async {
            let (unread, mut meant) = (CancellationToken::new(), Meant::default());
            meant.set(Some(unread.clone()));
            russh_warns!("unknown channel request {}", "eow@openssh.com.example");
            russh_warns!("unknown channel request {}", "eow@openssh.co");
            russh_warns!("unknown channel request {}", "");
            assert!(!unread.is_cancelled());
            russh_warns!("unknown global request {}", "eow@openssh.com");
            russh_warns!("unknown channel reques");
            russh_warns!(said = "unknown channel request eow@openssh.com", "something");
            tracing::warn!(target: "other", "{WARNING}");
            tracing::info!(target: "russh::server", "{WARNING}");
            unread.is_cancelled()
        });
        assert!(!told.await.unwrap());
        // Those that are not the warning.
        assert_eq!(count.heard(), 5);
    }

    #[tokio::test]
    async fn each_connection_is_told_of_its_own_client() {
        let (_count, _guard) = listen("info");
        let (one, other) = (CancellationToken::new(), CancellationToken::new());
        let theirs = other.clone();
        let beside = tokio::spawn(async move {
            let mut meant = Meant::default();
            meant.set(Some(theirs));
            std::future::pending::<()>().await;
        });
        let unread = one.clone();
        let task = tokio::spawn(async move {
            tokio::task::yield_now().await;
            let mut meant = Meant::default();
            meant.set(Some(unread.clone()));
            // A second session: nobody knows who is meant any more.
            meant.set(None);
            russh_warns!("unknown channel request {}", "eow@openssh.com");
            assert!(!unread.is_cancelled());
            assert_eq!(meant.0, None);
            meant.set(Some(unread));
            russh_warns!("unknown channel request {}", "eow@openssh.com");
            meant
        });
        let meant = task.await.unwrap();
        assert!(one.is_cancelled() && !other.is_cancelled());
        // It is dropped wherever the connection is.
        let id = meant.0.unwrap();
        assert!(super::meant().contains_key(&id));
        drop(meant);
        assert!(!super::meant().contains_key(&id));
        beside.abort();
    }
}
