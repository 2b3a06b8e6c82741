//! Clients other than OpenSSH's: each has ideas of its own about the protocol. One that is not on this
//! machine is skipped by name; `cargo lab test` installs what Debian has.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    harness::{
        Story,
        account::Account,
        host::quote,
        process::{self, Input},
        same, says,
    },
    runner::{Test, skip, test},
};

pub const TESTS: [Test; 8] = [
    test("client_putty", 120, putty),
    test("client_dropbear", 120, dropbear),
    test("client_curl", 120, curl),
    test("client_sshfs", 120, sshfs),
    test("client_paramiko", 120, paramiko),
    test("client_libssh", 120, libssh),
    test("client_asyncssh", 120, asyncssh),
    test("ssh_audit_finds_what_is_known", 60, audit),
];

/// Debian's own: other Pythons don't have its modules.
const PYTHON: &str = "/usr/bin/python3";

fn require(program: &str, package: &str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    if there { Ok(()) } else { skip(format!("there is no {program} here (Debian's {package})")) }
}

/// Says that its input and output are a terminal, and of which kind.
const ON_A_TERMINAL: &str = "test -t 0 && test -t 1 && echo on $(basename $(dirname $(tty)))";

fn port(story: &Story) -> String {
    story.world.options.ssh_port.to_string()
}

fn run(story: &Story, what: &str, command: Command) -> Result<String> {
    process::run(what, command, Input::Nothing, story.within(60))?.success()
}

/// A home for the client, so that it knows no host and asks nobody.
fn home(story: &Story) -> Result<PathBuf> {
    let home = story.path("home");
    fs::create_dir_all(home.join(".ssh"))?;
    Ok(home)
}

fn putty(story: &Story) -> Result<()> {
    require("psftp", "putty-tools")?;
    let alice = story.account("alice")?;
    let (home, key) = (home(story)?, story.path("key.ppk"));
    let mut convert = Command::new("puttygen");
    convert.arg(&alice.key).arg("-o").arg(&key).env("HOME", &home);
    run(story, "puttygen", convert)?;
    let host_key = host_key(story, &alice)?;
    let client = |program: &str| {
        let mut command = Command::new(program);
        command.args(["-batch", "-P", &port(story), "-hostkey", &host_key, "-i"]).arg(&key);
        command.env("HOME", &home);
        command
    };
    let mut plink = client("plink");
    plink.args(["-ssh", &alice.login().destination(), "echo out; echo err >&2; exit 3"]);
    let ended = process::run("plink", plink, Input::Nothing, story.within(60))?;
    same("plink's status", ended.code(), Some(3))?;
    same("its output", (ended.out().trim(), ended.err().trim()), ("out", "err"))?;
    let mut plink = client("plink");
    plink.args(["-ssh", "-t", &alice.login().destination(), ON_A_TERMINAL]);
    says("plink -t", &run(story, "plink -t", plink)?, "on pts")?;

    let (there, back, batch) = (story.path("there"), story.path("back"), story.path("batch"));
    super::session::make_random(story, 300_000, &there)?;
    let script = format!("put {} up\nget up {}\nls\n", there.display(), back.display());
    fs::write(&batch, script)?;
    let mut psftp = client("psftp");
    psftp.arg("-b").arg(&batch).arg(alice.login().destination());
    says("psftp", &run(story, "psftp", psftp)?, "up")?;
    ensure!(fs::read(&there)? == fs::read(&back)?, "what came back is not what went");
    Ok(())
}

/// The host key's fingerprint, as OpenSSH has got to know it.
fn host_key(story: &Story, alice: &Account) -> Result<String> {
    alice.output("true")?;
    let mut command = Command::new("ssh-keygen");
    command.arg("-lf").arg(story.world.dir.path().join("known_hosts"));
    let told = run(story, "ssh-keygen", command)?;
    let fingerprint = told.split(' ').find(|word| word.starts_with("SHA256:"));
    Ok(fingerprint.context("no host key is known")?.to_owned())
}

fn dropbear(story: &Story) -> Result<()> {
    require("dbclient", "dropbear-bin")?;
    let alice = story.account("alice")?;
    let (home, key) = (home(story)?, story.path("key.dropbear"));
    let mut convert = Command::new("dropbearconvert");
    convert.args(["openssh", "dropbear"]).arg(&alice.key).arg(&key);
    run(story, "dropbearconvert", convert)?;
    let client = |flags: &[&str]| {
        let mut command = Command::new("dbclient");
        command.args(["-y", "-y", "-p", &port(story)]).args(flags).arg("-i").arg(&key);
        command.arg(alice.login().destination()).env("HOME", &home);
        command
    };
    let mut command = client(&["-T"]);
    command.arg("cat; exit 4");
    let sent = Input::Bytes(vec![b'x'; 200_000]);
    let ended = process::run("dbclient", command, sent, story.within(60))?;
    same("dbclient's status", ended.code(), Some(4))?;
    same("bytes that came back", ended.stdout.len(), 200_000)?;
    // It sets its own terminal first, so it needs one.
    let mut typed = client(&["-t"]);
    typed.arg(ON_A_TERMINAL);
    let words: Vec<_> = std::iter::once(typed.get_program())
        .chain(typed.get_args())
        .map(|word| quote(&word.to_string_lossy()))
        .collect();
    let mut script = Command::new("script");
    script.args(["-qec", &words.join(" "), "/dev/null"]).env("HOME", &home);
    says("dbclient -t", &run(story, "dbclient -t", script)?, "on pts")?;
    // -B: its standard input and output are a forwarded stream.
    let mut server = alice.login().start("echo served | nc -lN 127.0.0.1 7100", Input::Nothing)?;
    let served = story.wait_for("the server in the machine", 30, || {
        let command = client(&["-B", "127.0.0.1:7100"]);
        let ended = process::run("dbclient -B", command, Input::Nothing, story.within(60))?;
        Ok(Some(ended.out()).filter(|served| !served.is_empty()))
    })?;
    server.kill();
    same("through dbclient -B", served.as_str(), "served\n")
}

fn curl(story: &Story) -> Result<()> {
    require("curl", "curl")?;
    let version = run(story, "curl", {
        let mut command = Command::new("curl");
        command.arg("--version");
        command
    })?;
    if !version.contains("libssh2/") {
        return skip("this curl does not speak sftp");
    }
    let alice = story.account("alice")?;
    let (there, back) = (story.path("there"), story.path("back"));
    super::session::make_random(story, 300_000, &there)?;
    let url =
        format!("sftp://{}@{}:{}/~/up", alice.name, story.world.options.ssh_host, port(story));
    for (flag, file) in [("-T", &there), ("-o", &back)] {
        let mut command = Command::new("curl");
        command.args(["-sS", "--insecure", "--key"]).arg(&alice.key);
        command.arg("--pubkey").arg(alice.key.with_extension("pub"));
        command.arg(flag).arg(file).arg(&url);
        run(story, "curl sftp://", command)?;
    }
    ensure!(fs::read(&there)? == fs::read(&back)?, "what came back is not what went");
    Ok(())
}

fn sshfs(story: &Story) -> Result<()> {
    require("sshfs", "sshfs")?;
    if !Path::new("/dev/fuse").exists() {
        return skip("there is no /dev/fuse");
    }
    let alice = story.account("alice")?;
    let point = story.path("mounted");
    fs::create_dir(&point)?;
    let client = alice.login().client("sftp")?;
    let mut command = Command::new("sshfs");
    command.arg(format!("{}:", alice.login().destination())).arg(&point);
    command.args(["-f", "-p", &port(story)]);
    // What is said with -o; its ssh takes the same.
    let words: Vec<String> = client.get_args().map(|w| w.to_string_lossy().into_owned()).collect();
    for pair in words.windows(2).filter(|pair| pair[0] == "-o") {
        command.args(["-o", &pair[1]]);
    }
    command.args(["-o", &format!("IdentityFile={}", alice.key.display())]);
    let mut mounted = process::start("sshfs", command, Input::Nothing)?;
    let is_mounted = || {
        fs::read_to_string("/proc/self/mounts")
            .is_ok_and(|mounts| mounts.contains(&point.display().to_string()))
    };
    let waited = story.wait_for("the mount", 60, || {
        if mounted.has_ended()? {
            return Ok(Some(Err(mounted.errors_so_far()?)));
        }
        Ok(is_mounted().then_some(Ok(())))
    })?;
    if let Err(why) = waited {
        ensure!(why.contains("fuse"), "sshfs: {why}");
        return skip(format!("nothing can be mounted here: {}", why.trim()));
    }
    let told = (|| -> Result<()> {
        fs::create_dir(point.join("a folder"))?;
        let text: String = (0..20_000).map(|n| format!("{n}\n")).collect();
        fs::write(point.join("a folder/one"), &text)?;
        fs::rename(point.join("a folder/one"), point.join("two"))?;
        same("what was read again", fs::read_to_string(point.join("two"))?.len(), text.len())?;
        same("what is there", alice.output("wc -l < two; ls -d a*")?.as_str(), "20000\na folder")?;
        fs::remove_dir(point.join("a folder")).context("removing a folder")
    })();
    let mut unmount = Command::new("fusermount3");
    unmount.arg("-u").arg(&point);
    let unmounted = run(story, "fusermount3", unmount);
    told?;
    unmounted.map(drop)
}

/// A Python program with the account's key as its argument, where it imports.
fn python(story: &Story, module: &str, program: &str, alice: &Account) -> Result<String> {
    run_python(story, Command::new(PYTHON), module, program, alice)
}

fn run_python(
    story: &Story,
    mut command: Command,
    module: &str,
    program: &str,
    alice: &Account,
) -> Result<String> {
    let file = story.path(module);
    fs::write(&file, program)?;
    let options = &story.world.options;
    command.arg(&file).args([&options.ssh_host, &port(story), &alice.name]).arg(&alice.key);
    run(story, module, command)
}

fn require_python(module: &str) -> Result<()> {
    let there = Command::new(PYTHON).args(["-c", &format!("import {module}")]).output();
    match there.is_ok_and(|output| output.status.success()) {
        true => Ok(()),
        false => skip(format!("{PYTHON} has no {module} (Debian's python3-{module})")),
    }
}

fn paramiko(story: &Story) -> Result<()> {
    require_python("paramiko")?;
    let alice = story.account("alice")?;
    let told = python(
        story,
        "paramiko",
        r#"
import io, os, sys, paramiko
host, port, user, key = sys.argv[1:5]
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
client.connect(host, int(port), user, key_filename=key, allow_agent=False, look_for_keys=False)
stdin, stdout, stderr = client.exec_command("cat; echo err >&2; exit 5")
stdin.write("in"); stdin.channel.shutdown_write()
print(stdout.read().decode(), stderr.read().decode().strip(), stdout.channel.recv_exit_status())
sftp = client.open_sftp()
data = os.urandom(300000)
sftp.putfo(io.BytesIO(data), "up")
back = io.BytesIO(); sftp.getfo("up", back)
print(back.getvalue() == data, sftp.stat("up").st_size)
shell = client.invoke_shell(width=100, height=30)
shell.send("stty size; exit\n")
text = b""
while part := shell.recv(4096):
    text += part
print("30 100" in text.decode())
try:
    client.get_transport().open_channel("direct-tcpip", ("127.0.0.1", 1), ("127.0.0.1", 2))
except paramiko.ChannelException as error:
    print(error.code, error.text)
bound = client.get_transport().request_port_forward("127.0.0.1", 0)
print(bound > 0)
_, out, _ = client.exec_command(f"echo outward | nc -N 127.0.0.1 {bound}")
print(client.get_transport().accept(30).recv(100).decode().strip())
client.get_transport().cancel_port_forward("127.0.0.1", bound)
client.close()
"#,
        &alice,
    )?;
    let refused = "2 Connect failed";
    let wanted = format!("in err 5\nTrue 300000\nTrue\n{refused}\nTrue\noutward\n");
    same("what paramiko saw", told, wanted)
}

fn asyncssh(story: &Story) -> Result<()> {
    require_python("asyncssh")?;
    let alice = story.account("alice")?;
    let local = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let program = r#"
import asyncio, sys, asyncssh
host, port, user, key = sys.argv[1:5]
async def main():
    async with asyncssh.connect(host, int(port), username=user, client_keys=[key],
                                known_hosts=None, agent_path=None) as one:
        done = await asyncio.gather(*[one.run(f"echo {n}; exit {n}") for n in range(6)])
        print([(d.stdout.strip(), d.exit_status) for d in done] == [(str(n), n) for n in range(6)])
        done = await one.run("kill -TERM $$")
        print(done.exit_signal[0])
        done = await one.run("stty size; tty", term_type="xterm", term_size=(90, 31))
        print(done.stdout.split()[:2], done.stdout.split()[2].startswith("/dev/pts/"))
        async with one.start_sftp_client() as sftp:
            async with sftp.open("up", "wb") as file:
                await file.write(b"x" * 200000)
            print(await sftp.getsize("up"))
            # OpenSSH's server takes these two the other way round; clients tell by the server's name.
            await sftp.symlink("up", "link")
            print(await sftp.readlink("link"))
        server = await one.create_process("nc -lN 127.0.0.1 7200")
        listener = await one.forward_local_port("127.0.0.1", LOCAL, "localhost", 7200)
        for _ in range(100):
            reader, writer = await asyncio.open_connection("127.0.0.1", LOCAL)
            writer.write(b"through it\n"); writer.write_eof()
            await reader.read()
            writer.close()
            if server.stdout.at_eof() or server.exit_status is not None:
                break
            await asyncio.sleep(0.2)
        print((await server.wait()).stdout.strip())
        listener.close()
asyncio.run(main())
"#;
    let told = python(story, "asyncssh", &program.replace("LOCAL", &local.to_string()), &alice)?;
    same(
        "what asyncssh saw",
        told.as_str(),
        "True\nTERM\n['31', '90'] True\n200000\nup\nthrough it\n",
    )
}

/// libssh by the Python module that Ansible uses, which brings the library along. It was built for the Python that
/// installed it, which need not be Debian's.
fn libssh(story: &Story) -> Result<()> {
    let modules = from_pypi(story, "pylibsshext")?;
    let alice = story.account("alice")?;
    let mut python = Command::new("python3");
    python.env("PYTHONPATH", modules);
    let told = run_python(
        story,
        python,
        "libssh",
        r#"
import os, sys
from pylibsshext.session import Session
host, port, user, key = sys.argv[1:5]
session = Session()
session.connect(host=host, port=int(port), user=user, private_key=open(key, "rb").read(),
                host_key_checking=False, look_for_keys=False)
for n in range(3):
    done = session.new_channel().exec_command(f"echo out{n}; echo err >&2; exit {n + 4}")
    print(done.stdout.decode().strip(), done.stderr.decode().strip(), done.returncode)
data = os.urandom(300000)
up, back = __file__ + ".up", __file__ + ".back"
open(up, "wb").write(data)
for copy in (session.sftp(), session.scp()):
    copy.put(up, "up")
    copy.get("up", back)
    print(open(back, "rb").read() == data)
    os.remove(back)
shell = session.invoke_shell()
shell.sendall(b"tty; echo $((6 * 7)) is; exit\n")
text = b""
for _ in range(100):
    text += shell.read_bulk_response(timeout=0.3, retry=1)
    if b"42 is" in text:
        break
print(b"/dev/" in text)
shell.close()
session.close()
"#,
        &alice,
    )?;
    let wanted = "out0 err 4\nout1 err 5\nout2 err 6\nTrue\nTrue\nTrue\n";
    same("what libssh saw", told.as_str(), wanted)
}

/// The folder with that module, or the test is skipped.
fn from_pypi<'a>(story: &'a Story, module: &str) -> Result<&'a Path> {
    match &story.world.options.python_modules {
        Some(modules) if modules.join(module).exists() => Ok(modules),
        _ => skip(format!(
            "there is no {module} (--python-modules; `cargo lab test` takes it from PyPI)"
        )),
    }
}

/// What ssh-audit has against us; docs/ssh.md says why it stays.
const KNOWN: [(&str, &str, &str); 3] = [
    ("kex", "curve25519-sha256", BEFORE_QUANTA),
    ("kex", "curve25519-sha256@libssh.org", BEFORE_QUANTA),
    ("mac", "hmac-sha2-256", "using encrypt-and-MAC mode"),
];
const BEFORE_QUANTA: &str = "does not provide protection against post-quantum attacks";

fn audit(story: &Story) -> Result<()> {
    let options = &story.world.options;
    let modules = from_pypi(story, "ssh_audit")?;
    let mut command = Command::new(PYTHON);
    command.env("PYTHONPATH", modules).args(["-m", "ssh_audit", "--json", "--skip-rate-test"]);
    command.args(["-p", &port(story), &options.ssh_host]);
    // Its status is that of the worst it has found.
    let told = process::run("ssh-audit", command, Input::Nothing, story.within(60))?;
    let report: Value = serde_json::from_slice(&told.stdout)
        .with_context(|| format!("ssh-audit's report: {}{}", told.out(), told.err()))?;
    let mut found = Vec::new();
    for kind in ["kex", "key", "enc", "mac"] {
        let algorithms = report[kind].as_array().context("no algorithms")?;
        ensure!(!algorithms.is_empty(), "ssh-audit has seen no {kind}");
        for algorithm in algorithms {
            for grade in ["fail", "warn"] {
                for words in algorithm["notes"][grade].as_array().into_iter().flatten() {
                    let (name, words) = (algorithm["algorithm"].as_str(), words.as_str());
                    found.push((kind, name.unwrap_or_default(), words.unwrap_or_default()));
                }
            }
        }
    }
    same("what ssh-audit has against us", found.as_slice(), &KNOWN)?;
    same("known vulnerabilities", report["cves"].as_array().map(Vec::len), Some(0))
}
