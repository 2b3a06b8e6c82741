//! Questions from inside of a machine: what its user types is `hermitage status`.
//!
//! Which account asks is known by the machine that the question came from. That it was she who asked is not: any
//! program in there may, and the machine's kernel may be anybody's. So there is an answer to what shows her
//! nothing new and takes nothing from her; the rest is asked over ssh, by who has her key.

use std::{sync::Arc, time::Instant};

use tokio::sync::mpsc;

use super::{Desk, Way, Word, at_once, checked, enter, fits, note};
use crate::{
    machine::{Asked, printable},
    watch::{NewSession, Presence, Watch},
};

/// In place of an address, and of what a login was by.
const INSIDE: &str = "from inside";

/// Answers machines' questions, each beside the others: a machine has few at a time.
pub async fn answer_all(desk: Arc<Desk>, watch: Watch, mut questions: mpsc::Receiver<Asked>) {
    while let Some(asked) = questions.recv().await {
        let (desk, watch) = (desk.clone(), watch.clone());
        tokio::spawn(async move {
            let outcome = answer(&desk, &watch, &asked).await;
            asked.answer(outcome).await;
        });
    }
}

/// What is asked too often leaves no line in any log.
async fn answer(desk: &Desk, watch: &Watch, asked: &Asked) -> Result<String, String> {
    desk.inside.take(asked.account, Instant::now())?;
    let account = enter(desk, asked.account).await?;
    let argument = checked(&asked.argument)?;
    let shown = printable(&asked.word);
    note(&account, INSIDE, &shown, argument);
    let Some(word) = Word::parse(&asked.word) else {
        return Err(format!("there is no \"{shown}\"; \"hermitage help\" lists what there is"));
    };
    let presence = Presence::new(
        watch,
        NewSession {
            account: account.name.clone(),
            id: account.id,
            source: INSIDE.into(),
            kind: word.with_plus(),
            terminal: false,
            login: INSIDE.into(),
        },
    );
    let live = presence.live();
    let answered = async {
        fits(word, argument, Way::Inside)?;
        at_once(desk, word, argument, &account, Way::Inside).await
    };
    let outcome = tokio::select! {
        outcome = answered => outcome,
        reason = live.must_end() => Err(reason),
    };
    let words = match &outcome {
        Ok(_) => "exit status 0".to_owned(),
        Err(reason) => reason.clone(),
    };
    presence.ended(&words);
    // Beside the answer, which waits for no log.
    let store = desk.store.clone();
    tokio::spawn(async move {
        let (source, login) = (INSIDE.to_owned(), INSIDE.to_owned());
        let noted = match store.session_started(account.id, source, word.with_plus(), login).await {
            Ok(id) => store.session_ended(id, words, None).await,
            Err(error) => Err(error),
        };
        if let Err(error) = noted {
            tracing::error!(account = account.name, %error, "can't write the sessions log");
        }
    });
    outcome
}
