//! What the lifecycle decided, done.

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Driver, POWER_OFF_MARGIN};
use crate::lifecycle::{
    How, Lease, LoginError, save, start,
    state::{Effect, Timer},
    words,
};

impl Driver {
    pub(super) async fn carry_out(&mut self, effect: Effect) {
        if matches!(effect, Effect::Release | Effect::PowerOff | Effect::Kill)
            && let Some(attached) = &self.machine
        {
            // Of what is gone the kernel counts nothing any more.
            attached.machine.1.settle();
        }
        match effect {
            Effect::Record(intent) => self.record(intent).await,
            Effect::Start => {
                let (context, account) = (self.context.clone(), self.account);
                let former = self.former.clone().unwrap_or_default();
                let quota = self.quota.clone();
                let task = start::start(context, account, former, quota);
                self.starting = Some(tokio::spawn(task));
            }
            Effect::Save => {
                self.saved_because = self.rest_cause();
                if let Some(machine) = self.machine() {
                    let (context, account) = (self.context.clone(), self.account);
                    self.call_off = CancellationToken::new();
                    let called_off = self.call_off.clone();
                    let task = save::save(context, account, machine, called_off);
                    self.saving = Some(tokio::spawn(task));
                }
            }
            Effect::CallOff => self.call_off.cancel(),
            Effect::Copy => self.copy(),
            Effect::CallOffCopy => self.call_off_copy.cancel(),
            Effect::Release => {
                if let Some(machine) = self.machine() {
                    tokio::spawn(async move { machine.release().await });
                }
            }
            Effect::Drop => self.drop_memory().await,
            Effect::Admit => self.admit(),
            Effect::Refuse(reason) => {
                for reply in self.waiting.drain(..) {
                    let _ = reply.send(Err(LoginError::NoMachine(reason.clone())));
                }
            }
            Effect::EndSessions(reason) => {
                if let Some(attached) = &self.machine {
                    attached.end.send_replace(Some(reason));
                }
            }
            Effect::PowerOff => {
                if let Some(machine) = self.machine() {
                    let grace = self.context.config.machines.stop_timeout();
                    let grace = grace.saturating_sub(POWER_OFF_MARGIN).max(grace / 2);
                    // Beside this task: a guest that does not read must not hold it up.
                    tokio::spawn(async move { machine.power_off(grace).await });
                }
            }
            Effect::Kill => {
                if let Some(machine) = self.machine() {
                    tracing::warn!(account = %self.account, pid = machine.pid, "killing the machine");
                    tokio::spawn(async move { machine.kill().await });
                }
            }
            Effect::Look => self.look(),
            Effect::Greet(awake) => {
                if let Some(attached) = &self.machine {
                    attached.arrival.add(words::still_running(&awake));
                }
            }
            Effect::SetTimer(timer) => {
                if matches!(timer, Timer::Linger | Timer::Expected) {
                    self.vigil.begin();
                }
                self.timer = Some(Instant::now() + self.length(timer));
            }
            Effect::CancelTimer => self.timer = None,
            Effect::Gone => {
                for reply in self.stopping.drain(..) {
                    let _ = reply.send(());
                }
            }
        }
    }

    fn admit(&mut self) {
        let Some(attached) = &mut self.machine else { return };
        for reply in self.waiting.drain(..) {
            let lease = Lease {
                arrival: attached.arrival.clone(),
                machine: attached.machine.0.clone(),
                how: std::mem::replace(&mut attached.how, How::Running),
                end: attached.end.subscribe(),
                leaves: self.leaves.clone(),
            };
            // Somebody who did not wait leaves at once, by the lease's drop.
            let _ = reply.send(Ok(lease));
        }
    }
}
