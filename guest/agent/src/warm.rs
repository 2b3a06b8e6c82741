//! Walks the kernel paths a login takes, before the snapshot: what they allocate and cache is then
//! in the base, shared by every fork, instead of in each.

use anyhow::Result;

pub fn warm() -> Result<()> {
    Ok(())
}
