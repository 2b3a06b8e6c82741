//! What the stories are told with: accounts, ssh clients, terminals, and root commands on the serving
//! machine. Everything that waits ends at the story's deadline and says what it waited for.

pub mod account;
pub mod faults;
pub mod host;
pub mod process;
pub mod screen;
pub mod ssh;
pub mod terminal;

use std::{
    fmt::Write as _,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::Options;
use account::Account;
use host::Host;

/// How evidence tells of a guest that takes one fault after another and does nothing else.
pub const SPINNING: &str = "its guest takes the same fault for ever";

/// KVM's counters of each machine, twice. One whose guest is sent thousands of page faults in a second, and
/// neither halts nor reaches a device, is stuck: no program of a guest gets there without its kernel.
const COUNTERS: &str = r#"
cd /sys/kernel/debug/kvm 2>/dev/null || exit 0
counters() { for vm in [0-9]*-*; do echo $vm $(cat $vm/pf_guest $vm/halt_exits $vm/mmio_exits $vm/exits); done; }
counters > /tmp/counters.1; sleep 2; counters > /tmp/counters.2
join /tmp/counters.1 /tmp/counters.2 | while read vm faults halts mmio exits faults2 halts2 mmio2 exits2; do
  echo "$vm ($(cat /proc/${vm%-*}/comm)): in 2 s $((exits2 - exits)) exits, $((faults2 - faults)) faults sent, $((halts2 - halts)) halts, $((mmio2 - mmio)) accesses to devices"
  [ $((faults2 - faults)) -gt 2000 ] && [ $halts2 = $halts ] && [ $mmio2 = $mmio ] && echo "$vm: SPINNING"
done; true"#;

/// One run of the suite.
pub struct World {
    pub options: Options,
    pub seed: u64,
    /// Keys, known hosts and what else the clients need; gone at the end.
    pub dir: tempfile::TempDir,
    random: AtomicU64,
    names: AtomicU32,
}

impl World {
    pub fn new(options: &Options) -> Result<Self> {
        let seed = match options.seed {
            Some(seed) => seed,
            None => getrandom::u64().map_err(|e| anyhow!("no random numbers: {e}"))? >> 16,
        };
        let dir = tempfile::Builder::new()
            .prefix("hermitage-e2e-")
            .tempdir()
            .context("can't make a folder for the clients' keys")?;
        Ok(Self {
            options: options.clone(),
            seed,
            dir,
            random: AtomicU64::new(seed),
            names: AtomicU32::new(0),
        })
    }

    pub fn patient(&self, time: Duration) -> Duration {
        time.mul_f64(self.options.patience.clamp(0.1, 100.0))
    }

    /// Repeatable from the seed (SplitMix64). Not for keys.
    pub fn random(&self) -> u64 {
        let mut z = self
            .random
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed)
            .wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Forks that the service says it has made once more, up to now.
    pub fn lost_forks(self: &Arc<Self>) -> Result<usize> {
        let story =
            Story::new(self.clone(), Instant::now() + self.patient(Duration::from_secs(20)));
        let log = host::quote(&self.options.service_log.to_string_lossy());
        // Its status says whether there were any.
        let counted = story.host().try_run(&format!("grep -c 'forking another' {log}"))?;
        counted
            .out()
            .trim()
            .parse()
            .with_context(|| format!("can't count in {log}: {}", counted.err()))
    }

    /// What a person would look at after a failure: the traces of the service and of these accounts'
    /// machines.
    pub fn evidence(self: &Arc<Self>, accounts: &[String]) -> String {
        let story =
            Story::new(self.clone(), Instant::now() + self.patient(Duration::from_secs(20)));
        let log = host::quote(&self.options.service_log.to_string_lossy());
        let names: Vec<String> = accounts.iter().map(|name| format!("-e {name}")).collect();
        let log = match names.is_empty() {
            true => format!("tail -n 100 {log}"),
            false => format!("tail -n 2000 {log} | grep {} -e ERROR", names.join(" ")),
        };
        let counters = COUNTERS.replace("SPINNING", SPINNING);
        let mut text = String::new();
        for (title, script) in [
            ("accounts", "hermitage account list"),
            ("processes", "ps -eo pid,ppid,stat,rss,etime,args | grep -e hermitage -e PPID"),
            ("space and memory", "df -h; free -m"),
            ("kernel", "dmesg | tail -30"),
            ("what KVM counts", &counters),
            ("the service's log", &log),
        ] {
            let output = match story.host().try_run(script) {
                Ok(ended) => format!("{}{}", ended.out(), ended.err()),
                Err(error) => format!("{error:#}\n"),
            };
            let _ = write!(text, "== {title}\n{output}");
        }
        text
    }
}

/// One test's view of the world.
pub struct Story {
    pub world: Arc<World>,
    pub deadline: Instant,
    /// Scripts for the serving machine, run in reverse order when the story is over.
    cleanup: Mutex<Vec<String>>,
    /// Names of the accounts it made.
    accounts: Mutex<Vec<String>>,
}

impl Story {
    pub fn new(world: Arc<World>, deadline: Instant) -> Self {
        Self { world, deadline, cleanup: Mutex::default(), accounts: Mutex::default() }
    }

    pub fn host(&self) -> Host<'_> {
        Host::new(self, self.deadline)
    }

    /// A new account with a key, named after the hint.
    pub fn account(&self, hint: &str) -> Result<Account<'_>> {
        self.account_with(hint, &[])
    }

    /// A new account, with further arguments for `hermitage account add`.
    pub fn account_with(&self, hint: &str, arguments: &[&str]) -> Result<Account<'_>> {
        let account = Account::add(self, hint, arguments)?;
        if let Ok(mut accounts) = self.accounts.lock() {
            accounts.push(account.name.clone());
        }
        Ok(account)
    }

    /// Names of the accounts made so far.
    pub fn accounts(&self) -> Vec<String> {
        self.accounts.lock().map(|accounts| accounts.clone()).unwrap_or_default()
    }

    /// A name nobody has, for an account or a file.
    pub fn unique(&self, hint: &str) -> String {
        let number = self.world.names.fetch_add(1, Ordering::Relaxed);
        format!("{hint}-{:04x}{number}", self.world.seed & 0xffff)
    }

    pub fn path(&self, hint: &str) -> PathBuf {
        self.world.dir.path().join(self.unique(hint))
    }

    /// Has the script run on the serving machine when the story ends, however it ends.
    pub fn afterwards(&self, script: impl Into<String>) {
        if let Ok(mut cleanup) = self.cleanup.lock() {
            cleanup.push(script.into());
        }
    }

    /// For a story that has itself undone what it did.
    pub fn forget_cleanup(&self) {
        if let Ok(mut cleanup) = self.cleanup.lock() {
            cleanup.clear();
        }
    }

    pub fn finish(&self) -> Result<()> {
        let scripts = self.cleanup.lock().map(|mut c| std::mem::take(&mut *c)).unwrap_or_default();
        if scripts.is_empty() {
            return Ok(());
        }
        let deadline = Instant::now() + self.world.patient(Duration::from_secs(50));
        let script: Vec<String> = scripts.into_iter().rev().map(|s| format!("( {s}\n)")).collect();
        Host::new(self, deadline).run(&script.join("\n")).context("cleaning up")?;
        Ok(())
    }

    /// When a wait of so many seconds (with patience 1) is over; never later than the story is.
    pub fn within(&self, seconds: u64) -> Instant {
        let patient = self.world.patient(Duration::from_secs(seconds));
        (Instant::now() + patient).min(self.deadline)
    }

    pub fn sleep(&self, time: Duration) {
        thread::sleep(time.min(self.deadline.saturating_duration_since(Instant::now())));
    }

    /// Asks again and again until there is an answer.
    pub fn wait_for<T>(
        &self,
        what: &str,
        seconds: u64,
        mut ask: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let begun = Instant::now();
        let end = self.within(seconds);
        loop {
            if let Some(answer) = ask()? {
                return Ok(answer);
            }
            if Instant::now() >= end {
                bail!("waited {:.0} s for {what}", begun.elapsed().as_secs_f64());
            }
            self.sleep(Duration::from_millis(100));
        }
    }
}

/// `ensure!`, with the two values.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, wanted: T) -> Result<()> {
    if got != wanted {
        bail!("{what}: got {got:?}, wanted {wanted:?}");
    }
    Ok(())
}

/// Text contains a part, in any case of its letters.
pub fn says(what: &str, text: &str, part: &str) -> Result<()> {
    if !text.to_lowercase().contains(&part.to_lowercase()) {
        bail!("{what} should say {part:?}, but it says {text:?}");
    }
    Ok(())
}
