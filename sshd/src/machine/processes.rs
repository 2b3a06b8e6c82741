//! How many processes a machine's user may have: docs/limits.md, "Processes".
//!
//! Her guest's kernel keeps the limit, told by the agent: it is for her own good, and whoever is root there can lift
//! it. What the agent says of it is shown, and believed no further.

use std::{sync::Arc, time::Duration};

use hermitage_guest_proto::{HostMessage, KNOWS_PROCESSES, Processes};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::{Machine, printable};

/// How long a guest may take to count.
const PATIENCE: Duration = Duration::from_secs(3);

/// The number of the first question, which a machine is forked with.
const FIRST: u64 = 1;

/// What the agent was asked.
pub struct Asked {
    last: u64,
    /// Which one told it a limit and is not answered.
    limit: Option<u64>,
    /// What it said to that.
    fault: Option<String>,
    waiting: Option<(u64, oneshot::Sender<Processes>)>,
}

impl Default for Asked {
    fn default() -> Self {
        Self { last: FIRST, limit: None, fault: None, waiting: None }
    }
}

/// The user's processes in a running machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// As her guest says; `None`: it does not.
    pub count: Option<u32>,
    /// Why the limit does not count.
    pub fault: Option<String>,
}

/// What goes with `Attach` to a new machine. One of which nothing is said has its base's limit.
pub(super) fn first_message(agent: Option<u16>, most: Option<u32>) -> Option<HostMessage> {
    most.filter(|_| knows(agent))?;
    Some(HostMessage::LimitProcesses { question: FIRST, most })
}

fn knows(agent: Option<u16>) -> bool {
    agent.is_some_and(|version| version >= KNOWS_PROCESSES)
}

impl Machine {
    /// Before the first event is looked at: it was forked with such a message.
    pub(super) fn expect_first_answer(&self, most: Option<u32>) {
        self.table().processes.limit = first_message(self.agent_version, most).map(|_| FIRST);
    }

    /// At most so many from now on; `None`: as many as its kernel has.
    pub fn limit_processes(&self, most: Option<u32>) {
        let changed = |is: &mut Option<u32>| std::mem::replace(is, most) != most;
        self.most_processes.send_if_modified(changed);
    }

    /// Tells the agent. One that stands still takes it up when it goes on.
    pub(super) async fn tell_limit(&self, most: Option<u32>) -> bool {
        if !knows(self.agent_version) {
            return true;
        }
        let question = {
            let asked = &mut self.table().processes;
            asked.last += 1;
            asked.limit = Some(asked.last);
            asked.last
        };
        self.tell(HostMessage::LimitProcesses { question, most }).await
    }

    /// Passes every change on, until the machine ends. `told`: what its agent has been told already.
    pub(super) fn keep_limited(self: &Arc<Self>, told: Option<u32>) {
        let machine = self.clone();
        let mut wanted = machine.most_processes.subscribe();
        let telling = async move {
            let mut told = told;
            loop {
                let is = *wanted.borrow_and_update();
                if told != is {
                    // Not to one that stands still: nothing may be on its way when it is saved.
                    let standing = machine.stand().await;
                    let heard = machine.tell_limit(is).await;
                    drop(standing);
                    if !heard {
                        // It does not read, or is about to be gone, which ends this task.
                        sleep(Duration::from_secs(1)).await;
                        continue;
                    }
                    told = is;
                }
                if wanted.changed().await.is_err() {
                    return;
                }
            }
        };
        let machine = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = telling => {}
                _ = machine.ended() => {}
            }
        });
    }

    /// How many there are now.
    pub async fn count_processes(&self) -> Counted {
        let most = *self.most_processes.borrow();
        if !knows(self.agent_version) {
            let fault = most.map(|_| {
                "its base is from before there were such limits; with one that is built now it counts from the \
                 next start from the disk on"
                    .into()
            });
            return Counted { count: None, fault };
        }
        let (sender, answer) = oneshot::channel();
        let question = {
            let asked = &mut self.table().processes;
            asked.last += 1;
            asked.waiting = Some((asked.last, sender));
            asked.last
        };
        let answered = async {
            let standing = self.stand().await;
            if !self.tell(HostMessage::CountProcesses { question }).await {
                return None;
            }
            drop(standing);
            answer.await.ok()
        };
        let answer = timeout(PATIENCE, answered).await.ok().flatten();
        let fault = self.table().processes.fault.clone();
        match answer {
            Some(processes) => Counted {
                count: Some(processes.count),
                fault: fault
                    .or_else(|| processes.fault.as_deref().map(printable))
                    .or_else(|| lifted(most, processes.most)),
            },
            None => Counted { count: None, fault: fault.or(Some("its agent does not say".into())) },
        }
    }

    /// An answer to another question, or to none, is ignored.
    pub(super) fn counted(&self, processes: Processes) {
        let asked = &mut self.table().processes;
        if asked.limit.take_if(|question| *question == processes.question).is_some() {
            asked.fault = processes.fault.as_deref().map(printable);
            if let Some(fault) = &asked.fault {
                let machine = &self.label;
                tracing::warn!(machine, fault, "the number of processes is not limited");
            }
        } else if let Some((_, waiting)) =
            asked.waiting.take_if(|(question, _)| *question == processes.question)
        {
            let _ = waiting.send(processes);
        }
    }
}

/// What her kernel has in place of the limit. It may have less: no kernel has as many as can be typed.
fn lifted(wanted: Option<u32>, has: Option<u32>) -> Option<String> {
    let wanted = wanted?;
    match has {
        Some(has) if has <= wanted => None,
        Some(has) => Some(format!("her machine's root has made it {has}")),
        None => Some("her machine's root has lifted it".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_agents_that_know_of_it_are_told_and_only_what_their_base_does_not_have() {
        let message = HostMessage::LimitProcesses { question: FIRST, most: Some(60) };
        assert_eq!(first_message(Some(KNOWS_PROCESSES), Some(60)), Some(message));
        assert_eq!(first_message(Some(KNOWS_PROCESSES), None), None);
        assert_eq!(first_message(Some(KNOWS_PROCESSES - 1), Some(60)), None);
        assert_eq!(first_message(None, Some(60)), None);
    }

    #[test]
    fn a_limit_that_a_guests_root_lifted_is_shown_as_such() {
        assert_eq!(lifted(None, None), None);
        assert_eq!(lifted(Some(60), Some(60)), None);
        assert_eq!(lifted(Some(60_000), Some(3500)), None, "its kernel has no more");
        assert!(lifted(Some(60), Some(3500)).unwrap().contains("3500"));
        assert!(lifted(Some(60), None).unwrap().contains("lifted"));
    }
}
