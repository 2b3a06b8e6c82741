//! This test program is also the programs that the tests need: started again with `HERMITAGE_FAKE`
//! set, one of these "tests" is the service, the fork server or a machine.

use std::process::{Command, Stdio};

use crate::{fake_fork_server, fake_machine};

const ROLE: &str = "HERMITAGE_FAKE";

/// The shell command that becomes `role`; for the script that stands in for `hermitage-vmm`.
pub fn command_line(role: &str) -> String {
    let program = std::env::current_exe().unwrap();
    format!(
        "{ROLE}={role} exec '{}' --exact processes::{role} --ignored --nocapture --test-threads=1",
        program.display()
    )
}

/// A command that becomes `role`.
pub fn command(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", &format!("processes::{role}"), "--ignored", "--nocapture"])
        .arg("--test-threads=1")
        .env(ROLE, role)
        .stdin(Stdio::null());
    command
}

fn is(role: &str) -> bool {
    std::env::var(ROLE).is_ok_and(|mine| mine == role)
}

#[test]
#[ignore = "a program for the other tests"]
fn serve() {
    if is("serve") {
        hermitage::logging::start("hermitage=debug,russh=warn");
        let path = std::env::var("HERMITAGE_TEST_CONFIG").unwrap();
        let read = move || Ok(hermitage::config::Config::load(Some(path.as_ref()))?);
        if let Err(error) = hermitage::server::run(read().unwrap(), Box::new(read)) {
            eprintln!("error: {error:#}");
            std::process::exit(1);
        }
        std::process::exit(0);
    }
}

#[test]
#[ignore = "a program for the other tests"]
fn fork_server() {
    if is("fork_server") {
        fake_fork_server::run();
    }
}

#[test]
#[ignore = "a program for the other tests"]
fn machine() {
    if is("machine") {
        fake_machine::run();
    }
}
