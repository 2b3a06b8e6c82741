//! In the child: a machine made of the base and a snapshot. It is checked and whole before `serve` is
//! asked, and runs only when `serve` has marked the snapshot as consumed (invariant 3).

use std::{
    fmt::Display,
    fs::File,
    os::fd::{AsFd as _, OwnedFd},
    time::Instant,
};

use hermitage_storage::{
    base::Size,
    faults::{self, Point},
    snapshot::Run,
};
use hermitage_vmm_proto::{
    End, GO_LIMIT, MachineEvent, MachineRequest, SocketError, receive, send,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::Template;
use crate::{machine::Machine, snapshot, stages::Stages};

pub struct Parts {
    pub agent: OwnedFd,
    pub disk: OwnedFd,
    pub snapshot: OwnedFd,
    /// What it is to have, if that is more than it had.
    pub size: Size,
}

/// Makes the machine and starts it. Also returns which pages are the snapshot's. `stages` are from then on
/// those since the word to go.
pub fn make(
    template: &Template,
    parts: Parts,
    control: &OwnedFd,
    stages: &mut Stages,
) -> Result<(Machine, Vec<Run>), End> {
    fn refused(error: impl Display) -> End {
        End::SnapshotRefused(error.to_string())
    }
    let from = snapshot::From {
        base: &template.id,
        sizes: template.sizes,
        vcpus: &template.state.machine.vcpus,
        memory: &template.memory,
    };
    let resume =
        snapshot::load(File::from(parts.snapshot), &from, parts.size, stages).map_err(refused)?;
    let held = Machine::hold(
        &template.kvm,
        resume.memory,
        (&resume.state, resume.state.vcpus.len()),
        File::from(parts.disk),
        &mut |stage| stages.done(stage),
    )
    .map_err(refused)?;
    faults::at(Point::ResumeBuilt).map_err(refused)?;
    held.set_resumed();
    let restored = MachineEvent::Restored { stages: std::mem::take(&mut stages.list) };
    send(control, &restored, &[]).map_err(|_| End::Stopped)?;
    let failed = |e: std::io::Error| End::HostError(format!("resume: {e}"));
    faults::at(Point::ResumeTold).map_err(failed)?;
    wait_for_go(control)?;
    faults::at(Point::ResumeGo).map_err(failed)?;
    *stages = Stages::since(Instant::now());
    held.mark_stopped().map_err(refused)?;
    let machine = held.run(parts.agent).map_err(|e| End::HostError(format!("resume: {e}")))?;
    stages.done_at("start vCPUs", machine.entered());
    faults::at(Point::ResumeRuns).map_err(failed)?;
    Ok((machine, resume.runs))
}

/// Nothing else is done meanwhile: there is nothing to serve yet.
fn wait_for_go(control: &OwnedFd) -> Result<(), End> {
    let deadline = Instant::now() + GO_LIMIT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let seconds = GO_LIMIT.as_secs();
            return Err(End::HostError(format!("the word to go did not come within {seconds} s")));
        }
        // First: the socket may be one that blocks.
        let mut fds = [PollFd::new(control.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => {}
            Err(e) => return Err(End::HostError(format!("poll: {e}"))),
        }
        match receive::<MachineRequest>(control) {
            Ok(packet) => match packet.message {
                MachineRequest::Go => return Ok(()),
                MachineRequest::Stop => return Err(End::Stopped),
                other => tracing::warn!(?other, "asked of a machine that does not run yet"),
            },
            Err(SocketError::WouldBlock) => {}
            Err(SocketError::Closed) => return Err(End::Stopped),
            Err(e) => return Err(End::HostError(format!("control socket: {e}"))),
        }
    }
}
