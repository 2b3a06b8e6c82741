//! OpenSSH's client with several sessions on one connection.

use std::process::{Child, Command};

use crate::harness::{Service, at, wait_for};

/// Who has the connection.
pub struct Master<'s> {
    service: &'s Service,
    user: &'static str,
    child: Child,
}

impl<'s> Master<'s> {
    pub fn connect(service: &'s Service, user: &'static str) -> Self {
        let control = service.path("control");
        let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", "-M", "-N", "-S"]);
        let child = ssh.arg(&control).arg(at(user)).spawn().unwrap();
        wait_for("the control socket", || control.exists().then_some(()));
        Self { service, user, child }
    }

    /// A client with a session of it.
    pub fn session(&self, command: &str) -> Command {
        let mut ssh = self.service.ssh_with(&["-o", "BatchMode=yes", "-S"]);
        ssh.arg(self.service.path("control")).args([&at(self.user), command]);
        ssh
    }
}

impl Drop for Master<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
