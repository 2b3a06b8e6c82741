//! What runs on the serving machine: the base snapshot, the service, the demo account.

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::guest_image::GuestImage;
use crate::process::{run_captured, wait_until, write_whole};
use crate::programs::digest;
use crate::serving::Serving;
use crate::ssh::quote;

const LAB_SERVE: &str = include_str!("../machine/lab-serve");
const SERVE_BOUND: Duration = Duration::from_secs(90);
const DEMO: &str = "demo";

/// What all clients of an emulated machine come from (QEMU's user network).
const GATEWAY: &str = "10.0.2.2";

/// Puts `lab-serve` (and natively our configuration and a `hermitage` that uses it) in place.
pub fn install(serving: &mut Serving) -> Result<()> {
    let own = serving.layout().own();
    if !serving.is_native() {
        let script = LAB_SERVE
            .replace("@program@", "/usr/local/bin/hermitage")
            .replace("@config@", "")
            .replace("@pidfile@", "/run/lab-serve.pid")
            .replace("@log@", &serving.log_file());
        let file = own.join("lab-serve");
        write_program(&file, &script)?;
        let digest = digest(&file)?;
        serving.push(&file, "/usr/local/bin/lab-serve", &digest)?;
        let config = own.join("hermitage.toml");
        write_whole(&config, format!("[ssh]\n{}\n", exempt(GATEWAY)).as_bytes())?;
        let key = self::digest(&config)?;
        serving.push(&config, "/etc/hermitage/hermitage.toml", &key)?;
        return Ok(());
    }
    let home = own.join("native");
    let bin = serving.native_bin();
    fs::create_dir_all(&bin).with_context(|| format!("make {}", bin.display()))?;
    let config = home.join("hermitage.toml");
    let text = format!(
        "state_dir = {:?}\nrun_dir = {:?}\n\n[ssh]\nlisten = [\"127.0.0.1:{}\"]\n{}\n",
        home.join("state"),
        home.join("run"),
        serving.state().port,
        exempt("127.0.0.1")
    );
    write_whole(&config, text.as_bytes())?;
    let program = serving.layout().program("hermitage");
    let path = |path: &PathBuf| quote(&path.to_string_lossy());
    write_program(
        &bin.join("hermitage"),
        &format!("#!/bin/sh\nexec {} --config {} \"$@\"\n", path(&program), path(&config)),
    )?;
    for other in ["hermitage-vmm", "hermitage-bench"] {
        let program = serving.layout().program(other);
        write_program(&bin.join(other), &format!("#!/bin/sh\nexec {} \"$@\"\n", path(&program)))?;
    }
    let script = LAB_SERVE
        .replace("@program@", &path(&program))
        .replace("@config@", &path(&config))
        .replace("@pidfile@", &path(&home.join("serve.pid")))
        .replace("@log@", &quote(&serving.log_file()));
    write_program(&bin.join("lab-serve"), &script)
}

/// Tests fail to log in on purpose, all of them from one address.
fn exempt(source: &str) -> String {
    format!("penalty_exempt = [\"{source}\"]")
}

fn write_program(file: &PathBuf, text: &str) -> Result<()> {
    write_whole(file, text.as_bytes())?;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("make {} executable", file.display()))
}

/// What a base depends on; kept beside the bases, so that it goes where they go.
pub fn base_key(serving: &Serving, image: &GuestImage) -> Result<String> {
    let vmm = digest(&serving.layout().program("hermitage-vmm"))?;
    Ok(format!("image {} vmm {}", image.key(), vmm.get(..16).unwrap_or(&vmm)))
}

pub fn base_is_current(serving: &Serving, key: &str) -> bool {
    let state = serving.state_dir();
    serving
        .run(&format!("test -s {state}/current-base; cat {state}/.lab-base"))
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).trim() == key)
}

pub fn has_base(serving: &Serving) -> bool {
    serving.run(&format!("test -s {}/current-base", serving.state_dir())).is_ok()
}

/// Brings the image over when it is not there.
pub fn bring_image(serving: &mut Serving, image: &GuestImage) -> Result<String> {
    if serving.is_native() {
        return Ok(image.dir().to_string_lossy().into_owned());
    }
    let images = format!("{}/.lab-image", serving.state_path());
    let place = format!("{images}/{}", image.key());
    if serving.run(&format!("test -f {}/image.json", quote(&place))).is_err() {
        // Of one that was brought and has gone, with the data or for another, there must be no memory.
        serving.empty(&images)?;
        serving.push(image.dir(), &place, image.key())?;
        serving.run(&format!("sync -f {}", quote(&place)))?;
    }
    Ok(place)
}

pub fn make_base(serving: &Serving, image: &str, key: &str) -> Result<()> {
    run_captured(&mut serving.command(&["hermitage", "base", "build", "--image", image], false))?;
    let state = serving.state_dir();
    // Every change to the vmm makes one: the former stays for machines that run on it, older ones go.
    serving.run(&format!(
        "printf '%s\\n' {} > {state}/.lab-base; cd {state}/bases; \
         ls -1t | grep -vxF -- \"$(cat ../current-base)\" | tail -n +2 | xargs -r rm -rf --",
        quote(key)
    ))?;
    Ok(())
}

pub fn is_serving(serving: &Serving) -> bool {
    serving.run("lab-serve status").is_ok() && banner(serving).is_ok()
}

/// (Re)starts the service and waits until an ssh client would be greeted.
pub fn start(serving: &Serving) -> Result<()> {
    serving.run("lab-serve restart")?;
    let started = wait_until("the service's greeting on its ssh port", SERVE_BOUND, || {
        if banner(serving).is_ok() {
            return Ok(true);
        }
        if serving.run("lab-serve status").is_err() {
            bail!("`hermitage serve` has ended");
        }
        Ok(false)
    });
    started.with_context(|| format!("its log ends:\n{}", log_tail(serving)))
}

pub fn stop(serving: &Serving) -> Result<()> {
    serving.run("if command -v lab-serve >/dev/null; then lab-serve stop; fi").map(|_| ())
}

/// QEMU's forwarding takes connections that nobody answers: only the greeting proves a server.
fn banner(serving: &Serving) -> Result<()> {
    let address = SocketAddr::from(([127, 0, 0, 1], serving.state().port));
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut start = [0u8; 4];
    stream.read_exact(&mut start)?;
    if &start != b"SSH-" {
        bail!("port {} is no ssh server's", address.port());
    }
    Ok(())
}

fn log_tail(serving: &Serving) -> String {
    match serving.run(&format!("tail -n 40 {}", quote(&serving.log_file()))) {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(error) => format!("(it can't be read: {error:#})"),
    }
}

/// The demo account and how to log in to it.
pub struct Demo {
    pub password: String,
    /// Given with `-i` when the caller has no key of their own.
    pub identity: Option<PathBuf>,
}

pub fn demo(serving: &Serving) -> Result<Demo> {
    let password = demo_password(serving)?;
    if serving.run(&format!("hermitage account show {DEMO}")).is_err() {
        let line = format!("{password}\n");
        serving.run_with_input(
            &["hermitage", "account", "add", DEMO, "--password-stdin"],
            line.as_bytes(),
        )?;
    }
    let (keys, identity) = caller_keys(serving)?;
    serving.run_with_input(&["hermitage", "account", "key", "add", DEMO, "-"], keys.as_bytes())?;
    Ok(Demo { password, identity })
}

/// Chosen once for each lab and kept where only the caller reads it, to be shown again.
fn demo_password(serving: &Serving) -> Result<String> {
    const LETTERS: &[u8] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let file = serving.layout().own().join("demo-password");
    match fs::read_to_string(&file) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
    }
    let mut random = [0u8; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut random))
        .context("read /dev/urandom")?;
    let password: String =
        random.iter().map(|byte| LETTERS[usize::from(*byte) % LETTERS.len()] as char).collect();
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&file)
        .and_then(|mut file| std::io::Write::write_all(&mut file, password.as_bytes()))
        .with_context(|| format!("write {}", file.display()))?;
    Ok(password)
}

/// The caller's public keys; a key of the lab's when there is none.
fn caller_keys(serving: &Serving) -> Result<(String, Option<PathBuf>)> {
    let mut keys = String::new();
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    if let Ok(entries) = fs::read_dir(home.join(".ssh")) {
        let mut files: Vec<PathBuf> = entries
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "pub"))
            .collect();
        files.sort();
        for file in files {
            let text = fs::read_to_string(&file).unwrap_or_default();
            let line = text.lines().find(|line| is_public_key(line));
            keys.extend(line.map(|line| format!("{line}\n")));
        }
    }
    if !keys.is_empty() {
        return Ok((keys, None));
    }
    let identity = serving.layout().shared().join("key/demo_ed25519");
    if !identity.exists() {
        let part = identity.with_file_name("demo_part");
        for leftover in [part.clone(), part.with_extension("pub")] {
            if leftover.exists() {
                fs::remove_file(leftover)?;
            }
        }
        run_captured(
            Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", "demo", "-f"])
                .arg(&part),
        )?;
        fs::rename(part.with_extension("pub"), identity.with_extension("pub"))?;
        fs::rename(&part, &identity)?;
    }
    let keys = fs::read_to_string(identity.with_extension("pub"))?;
    Ok((keys, Some(identity)))
}

/// Certificates (`…-cert-v01@openssh.com`) also end in `.pub`, and are not keys to be added.
fn is_public_key(line: &str) -> bool {
    let kind = line.split_ascii_whitespace().next().unwrap_or("");
    ["ssh-", "ecdsa-sha2-", "sk-"].iter().any(|prefix| kind.starts_with(prefix))
        && !kind.contains("-cert-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_not_keys() {
        assert!(is_public_key("ssh-ed25519 AAAA me"));
        assert!(is_public_key("sk-ssh-ed25519@openssh.com AAAA"));
        assert!(!is_public_key("ssh-ed25519-cert-v01@openssh.com AAAA"));
        assert!(!is_public_key("# comment"));
    }
}
