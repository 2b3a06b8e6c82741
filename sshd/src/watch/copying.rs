//! What becomes of an account's files, told in one event when it is over.

use std::{fmt::Display, time::Instant};

use uuid::Uuid;

use super::{Copied, Event, Who};
use crate::time;

/// Begins with what is to be told.
#[derive(Clone, Debug)]
pub struct CopyNote {
    what: Copied,
    account: String,
    id: Option<Uuid>,
    who: Option<Who>,
    place: Option<String>,
    begun: Instant,
}

impl CopyNote {
    /// What the account's user does. `id`: None while there is no such account.
    pub fn new(what: Copied, account: &str, id: Option<Uuid>) -> Self {
        let (account, begun) = (account.to_owned(), Instant::now());
        Self { what, account, id, who: None, place: None, begun }
    }

    /// Now it is there.
    pub fn is(&mut self, id: Uuid) {
        self.id = Some(id);
    }

    /// An operator does it.
    pub fn by(self, who: Who) -> Self {
        Self { who: Some(who), ..self }
    }

    /// Where to, or where from.
    pub fn at(self, place: String) -> Self {
        Self { place: Some(place), ..self }
    }

    /// `outcome`: bytes, or why there are none.
    pub fn over(self, outcome: Result<u64, impl Display>) -> Event {
        let milliseconds = time::ms(self.begun.elapsed());
        let (bytes, error) = match outcome {
            Ok(bytes) => (Some(bytes), None),
            Err(reason) => (None, Some(reason.to_string())),
        };
        let Self { what, account, id, who, place, .. } = self;
        Event::Copy { who, what, account, id, place, bytes, milliseconds, error }
    }
}
