//! Stands in for the forwarder: addresses of this host instead of a machine's. A port below 1024 says
//! how it misbehaves.

use std::{
    collections::HashMap,
    io::{Read, Write, copy},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use hermitage_guest_proto::{
    Decoder, encode,
    forward::{ACCEPTED, ForwardEvent, ForwardId, ForwardRequest, Place},
};

use crate::fake_machine::Machine;

/// Says things about nothing, then no frame at all.
pub const HOSTILE: u16 = 7;
/// Never answers.
pub const SILENT: u16 = 9;

struct Forwarder {
    machine: Arc<Machine>,
    socket: Mutex<UnixStream>,
    waiting: Mutex<HashMap<ForwardId, TcpStream>>,
    last: AtomicU64,
}

/// Until the host closes its end.
pub fn run(machine: &Arc<Machine>, mut from: UnixStream) {
    let forwarder = Arc::new(Forwarder {
        machine: machine.clone(),
        socket: Mutex::new(from.try_clone().unwrap()),
        waiting: Mutex::default(),
        last: AtomicU64::new(ACCEPTED),
    });
    forwarder.say(&ForwardEvent::Ready { port: 4321 });
    let mut decoder = Decoder::default();
    let mut chunk = [0; 4096];
    loop {
        while let Some(request) = decoder.message::<ForwardRequest>().unwrap() {
            eprintln!("forwarder told: {request:?}");
            forwarder.request(request);
        }
        match from.read(&mut chunk) {
            Ok(count) if count > 0 => decoder.feed(&chunk[..count]),
            _ => return,
        }
    }
}

impl Forwarder {
    fn say(&self, event: &ForwardEvent) {
        let _ = self.socket.lock().unwrap().write_all(&encode(event).unwrap());
    }

    fn request(self: &Arc<Self>, request: ForwardRequest) {
        match request {
            ForwardRequest::Dial { to: Place::Tcp { port: SILENT, .. }, .. } => {}
            ForwardRequest::Dial { id, to: Place::Tcp { port: HOSTILE, .. } } => {
                self.say(&ForwardEvent::Dialed { id: id + 1000 });
                let at = Place::Private;
                self.say(&ForwardEvent::Listening { id: id + 1, at });
                let (host, port) = ("\x1b[2J".into(), 1);
                self.say(&ForwardEvent::Accepted { listener: 77, id: ACCEPTED, host, port });
                let _ = self.socket.lock().unwrap().write_all(&[0xff; 64]);
            }
            ForwardRequest::Dial { id, to: Place::Tcp { host, port } } => {
                match TcpStream::connect((host.as_str(), port)) {
                    Ok(socket) => {
                        self.say(&ForwardEvent::Dialed { id });
                        self.join(id, socket);
                    }
                    Err(error) => {
                        let reason = format!("{error} \x1b[31m");
                        self.say(&ForwardEvent::Failed { id, reason });
                    }
                }
            }
            ForwardRequest::Listen { id, at: Place::Tcp { host, port } } => {
                match TcpListener::bind((host.as_str(), port)) {
                    Ok(listener) => {
                        let port = listener.local_addr().unwrap().port();
                        let at = Place::Tcp { host, port };
                        self.say(&ForwardEvent::Listening { id, at });
                        let forwarder = self.clone();
                        thread::spawn(move || forwarder.accept(id, &listener));
                    }
                    Err(error) => {
                        self.say(&ForwardEvent::Failed { id, reason: error.to_string() });
                    }
                }
            }
            ForwardRequest::Listen { id, at: Place::Private } => {
                let path = format!("/tmp/hermitage-fake-{}-{id}", std::process::id());
                drop(UnixListener::bind(&path).unwrap());
                std::fs::remove_file(&path).unwrap();
                self.say(&ForwardEvent::Listening { id, at: Place::Unix { path } });
            }
            ForwardRequest::Dial { id, .. } | ForwardRequest::Listen { id, .. } => {
                let reason = "not in this stand-in".into();
                self.say(&ForwardEvent::Failed { id, reason });
            }
            ForwardRequest::Close { id } => drop(self.waiting.lock().unwrap().remove(&id)),
        }
    }

    fn accept(self: &Arc<Self>, listener: ForwardId, listening: &TcpListener) {
        while let Ok((socket, peer)) = listening.accept() {
            let id = self.last.fetch_add(1, Ordering::Relaxed);
            let (host, port) = (peer.ip().to_string(), peer.port());
            self.say(&ForwardEvent::Accepted { listener, id, host, port });
            self.join(id, socket);
        }
    }

    /// Copies both ways once the stream is there.
    fn join(self: &Arc<Self>, id: ForwardId, socket: TcpStream) {
        let machine = self.machine.clone();
        thread::spawn(move || {
            let stream = machine.stream(id);
            let (mut from, mut to) = (stream.try_clone().unwrap(), socket.try_clone().unwrap());
            let inward = thread::spawn(move || {
                let _ = copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
            let (mut from, mut to) = (socket, stream);
            let _ = copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
            inward.join().unwrap();
        });
    }
}
