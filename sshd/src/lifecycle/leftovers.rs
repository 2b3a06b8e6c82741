//! What a killed service, or command, left half-made: nobody waits for the next one to stumble over it. A copy of a
//! disk takes as much room as the disk.

use std::path::PathBuf;

use hermitage_storage::{StateDir, leftovers};
use uuid::Uuid;

/// Everything that is there now. What somebody still writes stays.
pub(super) async fn sweep(state: StateDir) {
    delete(move || leftovers::folders(&state)).await;
}

/// Once more of an account whose machine has ended only now: it held what it was writing.
pub(super) async fn sweep_account(state: StateDir, account: Uuid) {
    delete(move || leftovers::account_folders(&state, account)).await;
}

/// Beside all else: large files take a file system seconds.
async fn delete(folders: impl FnOnce() -> Vec<PathBuf> + Send + 'static) {
    let swept = tokio::task::spawn_blocking(move || leftovers::sweep(folders())).await;
    let Ok((swept, fault)) = swept else { return };
    for path in swept {
        tracing::warn!(path = %path.display(), "deleted what was left half-made");
    }
    if let Err(error) = fault {
        tracing::error!(%error, "can't delete what was left half-made");
    }
}
