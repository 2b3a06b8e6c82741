//! The virtio-console ports that carry terminals (virtio 1.2 §5.3, generic ports).

use std::fs;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use hermitage_guest_proto::TERMINALS;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// A port as sysfs shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Port {
    /// `vport<device>p<id>`
    file: String,
    /// The host's name for it, when it has said one.
    name: Option<String>,
}

/// Opens the ports, by terminal number; None while some are missing. They are opened once and stay
/// open (the driver allows one opener), without blocking: a blocking write would not poll.
pub fn open_all() -> Result<Option<Vec<OwnedFd>>> {
    let Some(files) = in_order(&list()?) else {
        return Ok(None);
    };
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    files
        .iter()
        .map(|file| {
            let path = format!("/dev/{file}");
            open(path.as_str(), flags, Mode::empty()).with_context(|| format!("opening {path}"))
        })
        .collect::<Result<Vec<_>>>()
        .map(Some)
}

fn list() -> Result<Vec<Port>> {
    const CLASS: &str = "/sys/class/virtio-ports";
    let mut ports = Vec::new();
    let Ok(entries) = fs::read_dir(CLASS) else {
        return Ok(ports);
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {CLASS}"))?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        let name = Some(name.trim()).filter(|name| !name.is_empty() && *name != "(null)");
        ports.push(Port {
            file: entry.file_name().to_string_lossy().into_owned(),
            name: name.map(str::to_owned),
        });
    }
    Ok(ports)
}

/// Device files of terminals 0, 1, …: those named `terminal.N`, or where the host names none, the
/// ports in the order of their ids. None until there are enough, and while only some have names.
fn in_order(ports: &[Port]) -> Option<Vec<String>> {
    let named: Option<Vec<String>> = (0..TERMINALS)
        .map(|number| {
            let wanted = format!("terminal.{number}");
            let port = ports.iter().find(|port| port.name.as_deref() == Some(wanted.as_str()))?;
            Some(port.file.clone())
        })
        .collect();
    if named.is_some() || ports.iter().any(|port| port.name.is_some()) {
        return named;
    }
    let mut by_id: Vec<((u32, u32), &str)> =
        ports.iter().filter_map(|port| Some((device_and_id(&port.file)?, &*port.file))).collect();
    by_id.sort_unstable();
    (by_id.len() >= usize::from(TERMINALS)).then(|| {
        by_id.into_iter().take(TERMINALS.into()).map(|(_, file)| file.to_owned()).collect()
    })
}

/// `vport2p11` → (2, 11)
fn device_and_id(file: &str) -> Option<(u32, u32)> {
    let (device, id) = file.strip_prefix("vport")?.split_once('p')?;
    Some((device.parse().ok()?, id.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(file: &str, name: Option<&str>) -> Port {
        Port { file: file.to_owned(), name: name.map(str::to_owned) }
    }

    #[test]
    fn without_names_the_ids_count_as_numbers() {
        let ports: Vec<Port> =
            [10, 9, 3, 2, 4, 8, 7, 1].map(|id| port(&format!("vport0p{id}"), None)).into();
        let order = in_order(&ports).unwrap();
        assert_eq!(order.first().unwrap(), "vport0p1");
        assert_eq!(order.last().unwrap(), "vport0p10");
        assert_eq!(in_order(&ports[1..]), None, "one is missing");
    }

    #[test]
    fn names_win_and_all_are_waited_for() {
        let mut ports: Vec<Port> = (0..8)
            .map(|number| {
                port(&format!("vport0p{}", 8 - number), Some(&format!("terminal.{number}")))
            })
            .collect();
        let order = in_order(&ports).unwrap();
        assert_eq!(order[0], "vport0p8");
        assert_eq!(order[7], "vport0p1");
        ports[3].name = None;
        assert_eq!(in_order(&ports), None);
    }
}
