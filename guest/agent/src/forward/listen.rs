//! Listening on addresses of the machine, with the user's rights.

use std::fs::{self, Metadata};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hermitage_guest_proto::forward::Place;
use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, Backlog, SockaddrStorage, UnixAddr, setsockopt, sockopt,
};
use nix::sys::stat::{Mode, umask};

use super::dial::new_socket;
use super::names;
use crate::sys;

/// Connections that wait to be accepted, by socket.
const BACKLOG: i32 = 128;

pub struct Listener {
    place: Place,
    sockets: Vec<OwnedFd>,
    _file: Option<SocketFile>,
}

/// A socket's name in the file system; removed with it, unless somebody else has put something there.
struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
    /// Made for it alone.
    folder: Option<PathBuf>,
}

impl Listener {
    pub fn open(at: Place) -> Result<Self, String> {
        match at {
            Place::Tcp { host, port } => Self::tcp(host, port),
            Place::Unix { path } => {
                let (socket, file) = unix(Path::new(&path), None)?;
                Ok(Self { place: Place::Unix { path }, sockets: vec![socket], _file: Some(file) })
            }
            Place::Private => {
                let folder = private_folder()?;
                let path = folder.join("socket");
                let (socket, file) = unix(&path, Some(folder))?;
                let place = Place::Unix { path: path.to_string_lossy().into_owned() };
                Ok(Self { place, sockets: vec![socket], _file: Some(file) })
            }
        }
    }

    /// On all the addresses that the name has; one that this machine lacks (no IPv6, say) is passed
    /// over if another is there.
    fn tcp(host: String, port: u16) -> Result<Self, String> {
        let mut sockets = Vec::new();
        let (mut bound, mut trouble) = (port, None);
        for ip in names::resolve_bind(&host)? {
            match bind(SocketAddr::new(ip, bound)) {
                Ok((socket, port)) => {
                    bound = port;
                    sockets.push(socket);
                }
                Err(error @ (Errno::EADDRNOTAVAIL | Errno::EAFNOSUPPORT)) => trouble = Some(error),
                // In use on one of them: half a forward would be a riddle.
                Err(error) => return Err(format!("{host} port {port}: {}", error.desc())),
            }
        }
        match (sockets.is_empty(), trouble) {
            (false, _) => {
                Ok(Self { place: Place::Tcp { host, port: bound }, sockets, _file: None })
            }
            (true, trouble) => {
                let trouble = trouble.unwrap_or(Errno::EADDRNOTAVAIL);
                Err(format!("{host} port {port}: {}", trouble.desc()))
            }
        }
    }

    /// Where it really listens.
    pub fn place(&self) -> &Place {
        &self.place
    }

    pub fn sockets(&self) -> &[OwnedFd] {
        &self.sockets
    }

    /// Who waits, and where from. A connection that is gone again, or descriptors that have run out,
    /// are nobody for now.
    pub fn accept(&self) -> Option<(OwnedFd, String, u16)> {
        self.sockets.iter().find_map(|listening| {
            let socket = sys::accept(listening).ok()?;
            let (host, port) = match &self.place {
                Place::Tcp { .. } => {
                    let _ = setsockopt(&socket, sockopt::TcpNoDelay, &true);
                    peer(&socket)
                        .map_or_else(Default::default, |peer| (peer.ip().to_string(), peer.port()))
                }
                Place::Unix { .. } | Place::Private => Default::default(),
            };
            Some((socket, host, port))
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = |found: Metadata| Some((found.dev(), found.ino())) == self.identity;
        if fs::symlink_metadata(&self.path).is_ok_and(is_ours) {
            let _ = fs::remove_file(&self.path);
        }
        if let Some(folder) = &self.folder {
            let _ = fs::remove_dir(folder);
        }
    }
}

fn bind(address: SocketAddr) -> nix::Result<(OwnedFd, u16)> {
    let family = match address.ip() {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    let socket = new_socket(family)?;
    // A port whose last connection has just closed can be had again.
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        // 0.0.0.0 and [::] side by side.
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    socket::listen(&socket, Backlog::new(BACKLOG)?)?;
    let bound: SockaddrStorage = socket::getsockname(socket.as_raw_fd())?;
    Ok((socket, to_std(&bound).map_or(address.port(), |bound| bound.port())))
}

fn peer(socket: &OwnedFd) -> Option<SocketAddr> {
    to_std(&socket::getpeername::<SockaddrStorage>(socket.as_raw_fd()).ok()?)
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
}

/// A socket that only its user can connect to, as sshd's StreamLocalBindMask has it.
fn unix(path: &Path, folder: Option<PathBuf>) -> Result<(OwnedFd, SocketFile), String> {
    let mut file = SocketFile { path: path.into(), identity: None, folder };
    let open = || -> nix::Result<OwnedFd> {
        let address = UnixAddr::new(path)?;
        let socket = new_socket(AddressFamily::Unix)?;
        let former = umask(Mode::from_bits_truncate(0o177));
        let bound = socket::bind(socket.as_raw_fd(), &address);
        umask(former);
        bound?;
        socket::listen(&socket, Backlog::new(BACKLOG)?)?;
        Ok(socket)
    };
    let socket = open().map_err(|error| format!("{}: {}", path.display(), error.desc()))?;
    file.identity = fs::symlink_metadata(path).ok().map(|made| (made.dev(), made.ino()));
    Ok((socket, file))
}

/// Below the user's own run directory, which nobody else can enter; without one, as OpenSSH does it.
fn private_folder() -> Result<PathBuf, String> {
    let run = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir());
    let template = run.unwrap_or_else(|| "/tmp".into()).join("ssh-XXXXXX");
    nix::unistd::mkdtemp(&template)
        .map_err(|error| format!("{}: {}", template.display(), error.desc()))
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn accepted(listener: &Listener) -> (OwnedFd, String, u16) {
        for _ in 0..1000 {
            if let Some(accepted) = listener.accept() {
                return accepted;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("nobody came");
    }

    #[test]
    fn a_free_port_is_the_same_on_all_addresses() {
        let listener = Listener::open(Place::Tcp { host: "localhost".into(), port: 0 }).unwrap();
        let Place::Tcp { port, .. } = *listener.place() else { panic!() };
        assert_ne!(port, 0);
        for ip in names::LOOPBACK {
            let client = TcpStream::connect((ip, port)).unwrap();
            let (_socket, host, port) = accepted(&listener);
            assert_eq!(host, ip.to_string());
            assert_eq!(port, client.local_addr().unwrap().port());
        }
        let again = Listener::open(Place::Tcp { host: "127.0.0.1".into(), port });
        assert!(again.err().unwrap().contains("in use"));
    }

    #[test]
    fn a_private_socket_is_hers_alone_and_goes_with_its_listener() {
        let listener = Listener::open(Place::Private).unwrap();
        let Place::Unix { path } = listener.place().clone() else { panic!() };
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(Path::new(&path)), 0o600);
        let folder = Path::new(&path).parent().unwrap().to_owned();
        assert_eq!(mode(&folder), 0o700);
        let _client = UnixStream::connect(&path).unwrap();
        accepted(&listener);
        drop(listener);
        assert!(!folder.exists());
    }

    #[test]
    fn a_file_that_took_the_sockets_place_stays() {
        let path =
            format!("{}/hermitage-fwd-{}", std::env::temp_dir().display(), std::process::id());
        let listener = Listener::open(Place::Unix { path: path.clone() }).unwrap();
        let taken = Listener::open(Place::Unix { path: path.clone() });
        assert!(taken.err().unwrap().contains("in use"));
        fs::remove_file(&path).unwrap();
        fs::write(&path, "hers").unwrap();
        drop(listener);
        assert_eq!(fs::read_to_string(&path).unwrap(), "hers");
        fs::remove_file(&path).unwrap();
    }
}
