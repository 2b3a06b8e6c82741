//! A loop device over a file: [`crate::warm`] practises on one.

use std::fs::File;
use std::os::fd::AsRawFd;

mod raw {
    // linux/loop.h
    nix::ioctl_none_bad!(control_get_free, 0x4C82);
    nix::ioctl_write_int_bad!(set_fd, 0x4C00);
    nix::ioctl_none_bad!(clear_fd, 0x4C01);
}

/// Detached when dropped.
pub struct LoopDevice {
    device: File,
    path: String,
}

impl LoopDevice {
    pub fn attach(file: &File) -> std::io::Result<LoopDevice> {
        let control = File::options().read(true).write(true).open("/dev/loop-control")?;
        // SAFETY: takes no argument.
        let number = unsafe { raw::control_get_free(control.as_raw_fd()) }?;
        let path = format!("/dev/loop{number}");
        let device = File::options().read(true).write(true).open(&path)?;
        // SAFETY: takes a descriptor's number, which is open for the call.
        unsafe { raw::set_fd(device.as_raw_fd(), file.as_raw_fd()) }?;
        Ok(LoopDevice { device, path })
    }

    pub fn path(&self) -> &str {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // SAFETY: takes no argument.
        let _ = unsafe { raw::clear_fd(self.device.as_raw_fd()) };
    }
}
