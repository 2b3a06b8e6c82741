//! Asking a machine what it is doing while nobody is logged in.
//!
//! The answer is a guest's: what it says of processor time and names is bounded and made printable here,
//! and is believed no further than the limit of the machine's linger.

use std::{net::SocketAddr, time::Duration};

use hermitage_guest_proto::{Activity, HostMessage, LookAtWork, MAX_BUSY};
use tokio::{sync::oneshot, time::timeout};

use super::{Machine, printable};

/// How long a guest may take beyond the time it looks; one that says nothing does nothing.
const PATIENCE: Duration = Duration::from_secs(5);

/// Longest name of a process that is passed on; Linux has 15 bytes.
const NAME_LENGTH: usize = 16;

/// Processor time that can be: of more processors than a machine has.
const MOST_PERMILLE: u32 = 64_000;

/// Who waits for the answer to which question.
#[derive(Default)]
pub struct Looking {
    last: u64,
    waiting: Option<oneshot::Sender<Activity>>,
}

impl Machine {
    /// What the user's processes do, seen over at least `window`; from now on if `fresh`, else since the last
    /// look. None: the guest does not answer.
    pub async fn look_at_work(&self, fresh: bool, window: Duration) -> Option<Activity> {
        let (sender, answer) = oneshot::channel();
        let question = {
            let look = &mut self.table().look;
            look.last += 1;
            look.waiting = Some(sender);
            look.last
        };
        let window_ms = window.as_millis().try_into().unwrap_or(u32::MAX);
        let message = HostMessage::LookAtWork(LookAtWork { question, fresh, window_ms });
        let answered = async {
            if !self.tell(message).await {
                return None;
            }
            answer.await.ok()
        };
        timeout(window + PATIENCE, answered).await.ok().flatten().map(plausible)
    }

    /// An answer to another question, or to none, is ignored.
    pub(super) fn looked(&self, activity: Activity) {
        let look = &mut self.table().look;
        if activity.question == look.last
            && let Some(waiting) = look.waiting.take()
        {
            let _ = waiting.send(activity);
        }
    }
}

fn plausible(mut activity: Activity) -> Activity {
    activity.cpu_permille = activity.cpu_permille.min(MOST_PERMILLE);
    activity.busy.truncate(MAX_BUSY);
    for busy in &mut activity.busy {
        busy.cpu_permille = busy.cpu_permille.min(MOST_PERMILLE);
        busy.name = printable(&busy.name).chars().take(NAME_LENGTH).collect();
    }
    // Written anew: what is no address is none.
    let peer = activity.peer.and_then(|peer| peer.parse::<SocketAddr>().ok());
    activity.peer = peer.map(|peer| peer.to_string());
    activity
}

#[cfg(test)]
mod tests {
    use hermitage_guest_proto::{Busy, WaitsFor};

    use super::*;

    #[test]
    fn a_hostile_answer_is_made_harmless() {
        let busy = Busy {
            pid: 9,
            name: format!("\x1b]0;own\x07{}", "x".repeat(9000)),
            cpu_permille: u32::MAX,
            waits_for: WaitsFor::Nothing,
        };
        let activity = plausible(Activity {
            cpu_permille: u32::MAX,
            busy: vec![busy; 1000],
            peer: Some("1.2.3.4:22\x1b[2J".into()),
            ..Activity::default()
        });
        assert_eq!((activity.busy.len(), activity.cpu_permille), (MAX_BUSY, MOST_PERMILLE));
        assert_eq!(activity.busy[0].name, " ]0;own xxxxxxxx");
        assert_eq!(activity.busy[0].cpu_permille, MOST_PERMILLE);
        assert_eq!(activity.peer, None);
    }
}
