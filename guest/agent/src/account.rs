//! The account's user in `/etc/passwd` and its companions: looked up for every session, so that
//! `chsh` and `usermod -G` mean something, and made at the first attach of a disk.
//!
//! The files are read here and not through NSS: static glibc can't load its modules. They are bytes,
//! not text: whatever the account's owner wrote into them must survive.

use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::sys;

mod rename;

/// Ids of people: below are the system's own users (Debian policy §9.2.2).
const FIRST_PERSON: u32 = 1000;

/// A user as a session needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub home: PathBuf,
    pub shell: PathBuf,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// A login name: Debian's rule (adduser's NAME_REGEX), 32 bytes at most. It becomes a path component
/// and a field of passwd(5), so it is checked here as well as on the host.
pub fn is_login_name(name: &str) -> bool {
    name.len() <= 32
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c))
}

/// Looks the user up below `root`.
pub fn find(root: &Path, name: &str) -> Result<Option<User>> {
    let passwd = read(&root.join("etc/passwd"))?;
    let Some(entry) = entry(&passwd, name) else {
        return Ok(None);
    };
    let field = |index: usize| entry.get(index).map(|field| text(field)).unwrap_or_default();
    let number = |index: usize, what: &str| -> Result<u32> {
        let field = field(index);
        field.parse().with_context(|| format!("/etc/passwd: {what} {field:?} of {name}"))
    };
    let shell = Some(field(6)).filter(|shell| !shell.is_empty());
    Ok(Some(User {
        name: name.to_owned(),
        uid: number(2, "uid")?,
        gid: number(3, "gid")?,
        home: field(5).into(),
        shell: shell.unwrap_or_else(|| "/bin/sh".to_owned()).into(),
        groups: groups_of(&read(&root.join("etc/group"))?, name),
    }))
}

/// Makes sure that the user exists below `root`, with its group, home and rights. Every file is
/// written beside its place and synced before any takes its place, so a power cut leaves the old
/// state or the new.
pub fn ensure(root: &Path, name: &str, uid: u32) -> Result<()> {
    if !is_login_name(name) {
        bail!("{name:?} can't be a login name");
    }
    match find(root, name)? {
        Some(user) if user.uid == uid => {}
        Some(user) => {
            bail!("the name {name} belongs to uid {}, not {uid}, in /etc/passwd", user.uid)
        }
        None => match owner_of_id(&read(&root.join("etc/passwd"))?, uid) {
            Some(old) if uid >= FIRST_PERSON => rename::rename(&root.join("etc"), &old, name)?,
            _ => create(root, name, uid)?,
        },
    }
    match find(root, name)? {
        // Hers is elsewhere: under a name that she had before, or where she has put it.
        Some(user) if is_there(root, &user.home) => Ok(()),
        _ => make_home(root, name, uid),
    }
}

/// Whether a path of the machine's is there; links in it are not followed out of `root`.
fn is_there(root: &Path, path: &Path) -> bool {
    path.strip_prefix("/").is_ok_and(|path| fs::symlink_metadata(root.join(path)).is_ok())
}

fn create(root: &Path, name: &str, uid: u32) -> Result<()> {
    let etc = root.join("etc");
    let passwd = read(&etc.join("passwd"))?;
    if let Some(owner) = owner_of_id(&passwd, uid) {
        bail!("uid {uid} belongs to {owner}, not {name}, in /etc/passwd");
    }
    let group = read(&etc.join("group"))?;
    let group = match entry(&group, name) {
        Some(_) => group,
        None => with_line(&group, &format!("{name}:x:{uid}:")),
    };
    // The password is locked, not empty; no aging (shadow(5): empty fields).
    let shadow = with_line(&read(&etc.join("shadow"))?, &format!("{name}:*:::::::"));
    let gshadow = match read(&etc.join("gshadow"))? {
        gshadow if entry(&gshadow, name).is_some() => gshadow,
        gshadow => with_line(&gshadow, &format!("{name}:!::")),
    };
    // For user namespaces (newuidmap): the range useradd would give to the first user.
    let range = format!("{name}:100000:65536");
    let files: [(&str, Vec<u8>); 6] = [
        ("group", with_member(&group, "sudo", name)),
        ("gshadow", with_member(&gshadow, "sudo", name)),
        ("shadow", shadow),
        ("subuid", with_line(&read(&etc.join("subuid"))?, &range)),
        ("subgid", with_line(&read(&etc.join("subgid"))?, &range)),
        // Last: its line says that the rest is there.
        (
            "passwd",
            with_line(&passwd, &format!("{name}:x:{uid}:{uid}:{name}:/home/{name}:/bin/bash")),
        ),
    ];
    replace(&etc, &files)
}

/// Replaces files of /etc in this order, once all of them are written and synced beside.
fn replace(etc: &Path, files: &[(&str, Vec<u8>)]) -> Result<()> {
    for (file, content) in files {
        write_beside(&etc.join(file), content)?;
    }
    sync(etc)?;
    for (file, _) in files {
        let path = etc.join(file);
        fs::rename(beside(&path), &path)
            .with_context(|| format!("replacing {}", path.display()))?;
    }
    Ok(())
}

/// The home directory, from /etc/skel, complete or not there.
fn make_home(root: &Path, name: &str, uid: u32) -> Result<()> {
    let home = root.join("home").join(name);
    if fs::symlink_metadata(&home).is_ok() {
        return Ok(());
    }
    let new = root.join(format!("home/.{name}.new"));
    if fs::symlink_metadata(&new).is_ok() {
        fs::remove_dir_all(&new).with_context(|| format!("removing {}", new.display()))?;
    }
    copy_tree(&root.join("etc/skel"), &new, uid)?;
    fs::set_permissions(&new, Permissions::from_mode(0o700))?;
    sync(&new)?;
    fs::rename(&new, &home).with_context(|| format!("making {}", home.display()))
}

fn copy_tree(from: &Path, to: &Path, uid: u32) -> Result<()> {
    fs::create_dir(to).with_context(|| format!("making {}", to.display()))?;
    chown(to, Some(uid), Some(uid)).with_context(|| format!("chown {}", to.display()))?;
    let entries = match fs::read_dir(from) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("reading {}", from.display())),
    };
    for entry in entries {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_tree(&source, &target, uid)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target).with_context(|| format!("copying {}", source.display()))?;
            chown(&target, Some(uid), Some(uid))?;
        }
    }
    Ok(())
}

/// Replaces a small file, if its content is not what it should be; says whether it did.
pub fn write_if_changed(path: &Path, content: &[u8], mode: u32) -> Result<bool> {
    if fs::read(path).is_ok_and(|current| current == content) {
        return Ok(false);
    }
    let new = beside(path);
    fs::write(&new, content).with_context(|| format!("writing {}", new.display()))?;
    fs::set_permissions(&new, Permissions::from_mode(mode))?;
    fs::rename(&new, path).with_context(|| format!("replacing {}", path.display()))?;
    Ok(true)
}

/// Writes the content to come beside `path`, with the owner and permissions that `path` has.
fn write_beside(path: &Path, content: &[u8]) -> Result<()> {
    let new = beside(path);
    let context = || format!("writing {}", new.display());
    let mut file = File::create(&new).with_context(context)?;
    // Before the content: shadow is nobody's to read.
    let permissions = match fs::metadata(path) {
        Ok(metadata) => {
            use std::os::unix::fs::MetadataExt;
            chown(&new, Some(metadata.uid()), Some(metadata.gid())).with_context(context)?;
            metadata.permissions()
        }
        Err(_) => Permissions::from_mode(0o644),
    };
    file.set_permissions(permissions).with_context(context)?;
    file.write_all(content).with_context(context)
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".hermitage");
    name.into()
}

fn sync(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    sys::sync_file_system(&file).with_context(|| format!("syncing {}", path.display()))
}

/// The file's bytes; nothing if it isn't there.
fn read(path: &Path) -> Result<Vec<u8>> {
    match fs::read(path) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field).into_owned()
}

fn fields(line: &[u8]) -> Vec<&[u8]> {
    line.split(|byte| *byte == b':').collect()
}

/// Fields of the first line whose first one is `name`.
fn entry<'a>(file: &'a [u8], name: &str) -> Option<Vec<&'a [u8]>> {
    file.split(|byte| *byte == b'\n').map(fields).find(|fields| fields[0] == name.as_bytes())
}

/// Name of the line of passwd(5) with this uid.
fn owner_of_id(passwd: &[u8], uid: u32) -> Option<String> {
    let wanted = uid.to_string();
    passwd
        .split(|byte| *byte == b'\n')
        .map(fields)
        .find(|fields| fields.get(2) == Some(&wanted.as_bytes()))
        .map(|fields| text(fields[0]))
}

/// Ids of the groups of group(5) that list `name`.
fn groups_of(group: &[u8], name: &str) -> Vec<u32> {
    group
        .split(|byte| *byte == b'\n')
        .map(fields)
        .filter(|fields| fields.len() == 4)
        .filter(|fields| {
            fields[3].split(|byte| *byte == b',').any(|member| member == name.as_bytes())
        })
        .filter_map(|fields| text(fields[2]).parse().ok())
        // NGROUPS_MAX is 65536; a login has no use for more than this
        .take(256)
        .collect()
}

fn with_line(file: &[u8], line: &str) -> Vec<u8> {
    let mut file = file.to_vec();
    if file.last().is_some_and(|last| *last != b'\n') {
        file.push(b'\n');
    }
    file.extend_from_slice(line.as_bytes());
    file.push(b'\n');
    file
}

/// Adds `user` to the members (the last field of group(5) and of gshadow(5)) of `group`, if there is
/// such a group and she isn't one yet.
fn with_member(file: &[u8], group: &str, user: &str) -> Vec<u8> {
    let lines = file.split(|byte| *byte == b'\n').map(|line| {
        let mut fields = fields(line);
        let member =
            |list: &[u8]| list.split(|byte| *byte == b',').any(|one| one == user.as_bytes());
        let (true, Some(list)) = (fields[0] == group.as_bytes(), fields.pop()) else {
            return line.to_vec();
        };
        if fields.len() != 3 || member(list) {
            return line.to_vec();
        }
        let comma = if list.is_empty() { "" } else { "," };
        [line, comma.as_bytes(), user.as_bytes()].concat()
    });
    lines.collect::<Vec<_>>().join(&b'\n')
}

#[cfg(test)]
#[path = "account_tests.rs"]
mod tests;
