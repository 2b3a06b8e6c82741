//! Having a running machine's disk copied by its process, which alone has it open for writing (invariant 1).

use std::{fs::File, os::fd::AsFd, time::Duration};

use hermitage_vmm_proto::{MachineEvent, MachineRequest};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{Machine, printable};

/// How long it may take to begin, or to give up: a look over the disk's extents, and what is under way.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Who waits for which copy.
#[derive(Default)]
pub struct Asked {
    last: u64,
    waiting: Option<watch::Sender<Stand>>,
}

/// How it stands.
#[derive(Default)]
struct Stand {
    begun: Option<u64>,
    copied: u64,
    over: Option<Result<u64, String>>,
}

/// What its process says of one.
enum News {
    Begun(u64),
    Copied(u64),
    Over(Result<u64, String>),
}

/// A copy that is being made. The machine's process goes on with it until it is over or given up.
pub struct DiskCopy<'a> {
    machine: &'a Machine,
    number: u64,
    /// Bytes that are to be copied.
    pub bytes: u64,
    stand: watch::Receiver<Stand>,
}

impl Machine {
    /// From the moment that this returns on, nothing the guest writes is in the copy. `file` is empty, and may
    /// get `room` bytes.
    pub async fn copy_disk(&self, file: &File, room: u64) -> Result<DiskCopy<'_>, String> {
        let (sender, mut stand) = watch::channel(Stand::default());
        let copy = {
            let asked = &mut self.table().copy;
            asked.last += 1;
            asked.waiting = Some(sender);
            asked.last
        };
        self.request(&MachineRequest::CopyDisk { copy, room }, &[file.as_fd()])
            .await
            .map_err(|error| format!("the machine does not answer: {error}"))?;
        let begun = async {
            let stand = stand.wait_for(|stand| stand.begun.is_some() || stand.over.is_some()).await;
            match stand.as_deref() {
                Ok(Stand { begun: Some(bytes), .. }) => Ok(*bytes),
                Ok(Stand { over: Some(Err(reason)), .. }) => Err(reason.clone()),
                _ => Err("the machine forgot about it".into()),
            }
        };
        let bytes = tokio::select! {
            begun = begun => begun?,
            reason = self.ended() => return Err(reason),
            () = sleep(ANSWER_TIMEOUT) => {
                let _ = self.request(&MachineRequest::CancelCopy { copy }, &[]).await;
                return Err(format!("the machine did not begin within {} s", ANSWER_TIMEOUT.as_secs()));
            }
        };
        if bytes == 0 {
            tracing::info!(machine = self.label, "the disk's copy shares its blocks");
        }
        Ok(DiskCopy { machine: self, number: copy, bytes, stand })
    }

    /// An answer to another question, or to none, is ignored: one that nobody waits for any more is answered when
    /// its time comes.
    pub(super) fn copy_event(&self, event: MachineEvent) {
        let (copy, news) = match event {
            MachineEvent::CopyBegun { copy, bytes } => (copy, News::Begun(bytes)),
            MachineEvent::CopyProgress { copy, bytes } => (copy, News::Copied(bytes)),
            MachineEvent::CopyDone { copy, bytes } => (copy, News::Over(Ok(bytes))),
            MachineEvent::CopyFailed { copy, reason } => {
                (copy, News::Over(Err(printable(&reason))))
            }
            _ => return,
        };
        let asked = &mut self.table().copy;
        let Some(sender) = asked.waiting.as_ref().filter(|_| copy == asked.last) else { return };
        sender.send_modify(|stand| match news {
            News::Begun(bytes) => stand.begun = Some(bytes),
            News::Copied(bytes) => stand.copied = bytes,
            News::Over(outcome) => stand.over = Some(outcome),
        });
        if sender.borrow().over.is_some() {
            asked.waiting = None;
        }
    }
}

impl DiskCopy<'_> {
    /// Waits until there is something new: bytes copied so far, or how it ended.
    pub async fn progress(&mut self) -> Result<u64, Result<u64, String>> {
        tokio::select! {
            // A word that came before its end counts.
            biased;
            changed = self.stand.changed() => {
                let stand = self.stand.borrow_and_update();
                match (&stand.over, changed) {
                    (Some(outcome), _) => Err(outcome.clone()),
                    (None, Ok(())) => Ok(stand.copied),
                    (None, Err(_)) => Err(Err("the machine forgot about it".into())),
                }
            }
            reason = self.machine.ended() => Err(Err(reason)),
        }
    }

    /// Returns when the machine's process has let go of it.
    pub async fn give_up(mut self) {
        let cancel = MachineRequest::CancelCopy { copy: self.number };
        if self.machine.request(&cancel, &[]).await.is_err() {
            return;
        }
        let over = async { while self.progress().await.is_ok() {} };
        let _ = timeout(ANSWER_TIMEOUT, over).await;
    }
}
