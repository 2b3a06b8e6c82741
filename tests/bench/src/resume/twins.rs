//! One snapshot resumed twice, side by side, which the service never does (invariant 3): what two machines
//! of one memory draw at once is as different as it can be only if the agent makes it so (invariant 7).

use std::{collections::BTreeSet, fs, os::fd::AsRawFd as _, path::PathBuf};

use anyhow::{Context as _, bail, ensure};

use super::{Alive, Proof};
use crate::{
    fork,
    machines::{Machine, save::Restored, server::ForkServer},
};

/// Draws on each line, itself and through a process that it starts.
const PROGRAM: &str = r#"
import ctypes, os, subprocess, sys
fresh = "import ctypes, os; at = ctypes.CDLL(None).getauxval; at.restype = ctypes.c_void_p; "
fresh += "print(ctypes.string_at(at(25), 16).hex(), os.getrandom(16).hex())"
print("@@ ready", flush=True)
for line in sys.stdin:
    if line != "draw\n":
        continue
    drawn = [os.getrandom(16).hex(), os.urandom(16).hex()]
    drawn.append(open("/proc/sys/kernel/random/uuid").read().strip())
    drawn += subprocess.check_output([sys.executable, "-c", fresh], text=True).split()
    print("@@ drew", *drawn, flush=True)
"#;

/// What each line draws.
const DRAWN: usize = 5;

impl Proof<'_> {
    pub(super) fn twins(&mut self, server: &mut ForkServer) -> anyhow::Result<()> {
        let template = fork::used_disk(self.base, server)?;
        let mut alive = self.fork(server, &template)?;
        let command = format!("stty -echo; exec python3 -c '{PROGRAM}'");
        alive.machine.run_on_terminal(command.into_bytes())?;
        alive.machine.ask("", "@@ ready")?;
        let mut all = draw(&mut alive.machine)?;
        self.save(&mut alive)?;
        alive.machine.stop()?;
        server.end(alive.machine)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", alive.disk.as_raw_fd()));
        let copy = self.base.disk(&path)?;
        let mut twins = Vec::new();
        for disk in [alive.disk, copy] {
            let Alive { mut machine, .. } = self.begin(server, &disk)?;
            if let Restored::Refused(reason) = machine.restored()? {
                bail!("the snapshot is refused: {reason}");
            }
            machine.go()?;
            machine.running()?;
            twins.push(machine);
        }
        for machine in &mut twins {
            machine.resume_agent()?;
            machine.attach_terminal()?;
        }
        for machine in &mut twins {
            let drawn = draw(machine)?;
            let shared: Vec<_> = drawn.intersection(&all).collect();
            ensure!(shared.is_empty(), "two machines of one snapshot have both drawn {shared:?}");
            all.extend(drawn);
        }
        println!("one snapshot resumed twice: {} random values, no two alike", all.len());
        twins.into_iter().try_for_each(|machine| server.end(machine))?;
        fs::remove_file(&self.snapshot).context("remove the snapshot")
    }
}

fn draw(machine: &mut Machine) -> anyhow::Result<BTreeSet<String>> {
    let line = machine.ask("draw", "@@ drew")?;
    let drawn: BTreeSet<String> = line.split_whitespace().skip(2).map(str::to_owned).collect();
    ensure!(drawn.len() == DRAWN, "the program drew {line:?}");
    Ok(drawn)
}
