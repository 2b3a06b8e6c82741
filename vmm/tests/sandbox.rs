//! The jail from inside: what a machine's process can't do. What it looks like from outside is a story of
//! `tests/e2e`.

use std::process::Command;

use hermitage_vmm::sandbox::check;

/// The jail needs it to be entered, and so does some of what is tried.
fn is_root() -> bool {
    let root = nix::unistd::Uid::effective().is_root();
    if !root {
        eprintln!("skipped: the sandbox needs root");
    }
    root
}

#[test]
fn a_machine_can_do_nothing_to_the_host_nor_to_another_machine() {
    if !is_root() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    for means in [None, Some("--by-filter")] {
        let output = Command::new(env!("CARGO_BIN_EXE_hermitage-vmm"))
            .arg("check-sandbox")
            .args(means)
            .arg("--sandbox-root")
            .arg(root.path())
            .output()
            .unwrap();
        let (said, complained) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{means:?}: {said}{complained}");
        assert!(said.lines().count() > 20, "{said}");
    }
}

/// What is tried there would work elsewhere: else its failure would prove nothing.
#[test]
fn outside_of_the_sandbox_every_attempt_works() {
    // In another process, which is this test again: the attempts fork, and one seizes a process.
    if std::env::var_os("HERMITAGE_TEST_OUTSIDE").is_some() {
        for attempt in check::outside().unwrap() {
            assert!(attempt.worked, "{attempt:?}");
        }
        return;
    }
    if !is_root() {
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "outside_of_the_sandbox_every_attempt_works", "--nocapture"])
        .env("HERMITAGE_TEST_OUTSIDE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}
