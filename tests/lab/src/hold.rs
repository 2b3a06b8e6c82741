//! Keeps one idle VM open on the lab machine. With none alive, rapid creation and removal of VMs has
//! locked an emulated machine of two CPUs up.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use kvm_ioctls::Kvm;

pub fn hold() -> Result<std::convert::Infallible> {
    let kvm = Kvm::new().context("open /dev/kvm")?;
    let _vm = kvm.create_vm().context("create a VM")?;
    loop {
        sleep(Duration::from_secs(3600));
    }
}
