//! A state directory on a file system that copies files by sharing their blocks (XFS; Btrfs does it by the same
//! call): what checkpoints and exports gain from it (docs/operating.md).

use anyhow::{Result, ensure};

use crate::{
    harness::{Story, account::new_key, host::quote, same, says},
    runner::{Test, test},
};

pub const TESTS: [Test; 1] = [test("copies_share_blocks_where_the_file_system_can", 300, shares)];

/// A second service beside the one that is tested, with the same image and base. `$1` is its folder, `$2` a
/// public key.
const SERVICE: &str = r#"
set -e
truncate -s 3G "$1.img"
mkfs.xfs -q "$1.img"
mkdir "$1" && mount -o loop "$1.img" "$1"
state=$(hermitage config show --json | sed -n 's/.*"state_dir": *"\([^"]*\)".*/\1/p')
mkdir -m 700 "$1/state" "$1/run"
cp -a "$state/images" "$state/bases" "$state/current-base" "$1/state/"
cat > "$1/toml" <<CONFIG
state_dir = "$1/state"
run_dir = "$1/run"
[ssh]
listen = ["127.0.0.1:2299"]
[machines]
linger = 600
cgroup = "/nowhere"
CONFIG
echo "$2" | hermitage --config "$1/toml" account add alice --key -
nohup hermitage --config "$1/toml" serve > "$1/log" 2>&1 &
for _ in $(seq 600); do ! grep -q listening "$1/log" || break; sleep 0.1; done
"#;

/// Its end, however far it came.
const END: &str = r#"
pkill -f -- "[c]onfig $1/toml serve"
for _ in $(seq 600); do pgrep -f -- "[c]onfig $1/toml serve" > /dev/null || break; sleep 0.1; done
for _ in $(seq 300); do umount "$1" 2>/dev/null && break; sleep 0.1; done
rm -rf "$1" "$1.img"
"#;

const DATA: u64 = 40_000_000;

fn shares(story: &Story) -> Result<()> {
    let dir = format!("/var/tmp/{}", story.unique("shared"));
    let (key, public) = new_key(story, "shared")?;
    let host = story.host();
    let call =
        |script: &str, more: &str| format!("service() {{\n{script}\n}}\n(service {dir} {more})");
    story.afterwards(call(END, ""));
    let private = std::fs::read_to_string(&key)?;
    host.run(&call(SERVICE, &quote(&public)))?;
    host.run(&format!("(umask 77; printf %s {} > {dir}/key)", quote(&private)))?;
    let ssh_as = |user: &str, script: &str| {
        host.run(&format!(
            "ssh -i {dir}/key -p 2299 -o BatchMode=yes -o StrictHostKeyChecking=no \
             -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR {user}@127.0.0.1 {}",
            quote(script)
        ))
    };
    let ssh = |script: &str| ssh_as("alice", script);
    let hermitage = |words: &str| host.run(&format!("hermitage --config {dir}/toml {words} 2>&1"));
    // Bytes that the file system has given to files; blocks that two share count once.
    let taken = || -> Result<u64> {
        let text = host.run(&format!("sync -f {dir}; df -B1 --output=used {dir} | tail -1"))?;
        Ok(text.trim().parse()?)
    };
    let sum = ssh(&format!("head -c {DATA} /dev/urandom > f; sync; sha256sum f"))?;

    // While her machine runs, its disk is there once more in an instant.
    let before = taken()?;
    let said = hermitage(&format!("account export alice -o {dir}/alice.hermitage"))?;
    says("the export", &said, "while in use")?;
    let log = host.run(&format!("grep -c 'copy shares its blocks' {dir}/log || true"))?;
    same("copies by sharing", log.trim(), "1")?;
    let archive = taken()? - before;
    ensure!(archive < DATA * 3 / 2, "the archive of {DATA} bytes took {archive}");

    // What is saved of her machine is the first of it, and as good as a file.
    hermitage("account stop alice")?;
    let before = taken()?;
    hermitage("checkpoint create alice one")?;
    let kept = taken()?.saturating_sub(before);
    ensure!(kept < DATA / 10, "a checkpoint of {DATA} bytes of files took {kept}");
    // What is written to the one is not in the other.
    ssh("echo other > f; sync")?;
    hermitage("checkpoint restore alice one --stop")?;
    same("the file at the checkpoint", ssh("sha256sum f")?, sum.clone())?;
    hermitage(&format!("account restore {dir}/alice.hermitage --name bob"))?;
    same("the file in the archive", ssh_as("bob", "sha256sum f")?, sum)
}
