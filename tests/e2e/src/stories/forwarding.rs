//! What is forwarded into a machine and out of it: ports, sockets, and the client's key agent.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{
        Story,
        account::Account,
        process::{self, Input, Running},
        same, says,
    },
    runner::{Test, test},
};

pub const TESTS: [Test; 4] = [
    test("forwards_into_the_machine", 240, inward),
    test("listens_in_the_machine", 240, outward),
    test("agent_forwarding", 180, agent),
    test("a_forward_wakes_the_machine", 240, wakes),
];

/// A server in the machine: what a client has sent comes back when it has said that this is all, after
/// its length. On a port and on a socket.
const SERVER: &str = r#"
import os, socket, sys, threading
def serve(server):
    while True:
        one, _ = server.accept()
        threading.Thread(target=answer, args=(one,), daemon=True).start()
def answer(one):
    got = b""
    while part := one.recv(65536):
        got += part
    one.sendall(b"%d\n" % len(got) + got)
    one.close()
path = os.environ["HOME"] + "/server"
if os.path.exists(path):
    os.unlink(path)
sockets = [socket.create_server(("127.0.0.1", 7000), backlog=100), socket.socket(socket.AF_UNIX)]
sockets[1].bind(path)
sockets[1].listen(100)
for one in sockets:
    threading.Thread(target=serve, args=(one,), daemon=True).start()
print("serving", flush=True)
sys.stdin.read()
"#;

/// The server, as long as it is kept.
fn serve(story: &Story, alice: &Account) -> Result<Running> {
    let put = alice.login().exec_with("cat > server.py", Input::Bytes(SERVER.into()))?;
    put.success()?;
    let mut server = alice.login().start("python3 server.py", Input::Pipe)?;
    story.wait_for("the server in the machine", 60, || {
        Ok(String::from_utf8_lossy(&server.out_so_far()?).contains("serving").then_some(()))
    })?;
    Ok(server)
}

/// `ssh -N` with something forwarded, in the background.
pub fn forward(alice: &Account, arguments: &[&str]) -> Result<Running> {
    let mut command = alice.login().option("-oLogLevel=INFO").client("ssh")?;
    command.args(["-N", "-oExitOnForwardFailure=yes"]);
    command.args(arguments).arg(alice.login().destination());
    process::start(&format!("ssh -N {}", arguments.join(" ")), command, Input::Nothing)
}

pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

pub fn connect(story: &Story, port: u16) -> Result<TcpStream> {
    let stream = story
        .wait_for("the local port", 60, || Ok(TcpStream::connect(("127.0.0.1", port)).ok()))?;
    stream.set_read_timeout(Some(story.world.patient(Duration::from_secs(60))))?;
    Ok(stream)
}

fn answer_to(sent: &[u8]) -> Vec<u8> {
    [format!("{}\n", sent.len()).as_bytes(), sent].concat()
}

fn noise(story: &Story, length: usize) -> Vec<u8> {
    let words = (0..length.div_ceil(8)).flat_map(|_| story.world.random().to_le_bytes());
    words.take(length).collect()
}

fn inward(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let _server = serve(story, &alice)?;
    let (port, refused, dynamic) = (free_port()?, free_port()?, free_port()?);
    let (near, far) = (story.path("near"), format!("/home/{}/server", alice.name));
    let mut client = forward(
        &alice,
        &[
            "-L",
            &format!("{port}:localhost:7000"),
            "-L",
            &format!("{refused}:localhost:7001"),
            "-L",
            &format!("{}:{far}", near.display()),
            "-D",
            &dynamic.to_string(),
        ],
    )?;

    // All that is sent arrives, then its end, then all of the answer.
    let sent = noise(story, 600_000);
    let mut stream = connect(story, port)?;
    let mut writing = stream.try_clone()?;
    let feeding = std::thread::spawn({
        let sent = sent.clone();
        move || writing.write_all(&sent).and_then(|()| writing.shutdown(Shutdown::Write))
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).context("the answer through -L")?;
    feeding.join().ok().context("the writer panicked")??;
    ensure!(got == answer_to(&sent), "{} bytes came back of {}", got.len(), sent.len());

    let mut stream = UnixStream::connect(&near).context("the local socket")?;
    stream.write_all(b"to a socket")?;
    stream.shutdown(Shutdown::Write)?;
    let mut got = String::new();
    stream.read_to_string(&mut got)?;
    same("the answer of the socket", got.as_str(), "11\nto a socket")?;

    // Many at once, each waiting for all others.
    let mut streams = Vec::new();
    for n in 0..40 {
        let mut stream = connect(story, port)?;
        write!(stream, "I am {n}")?;
        streams.push(stream);
    }
    for (n, stream) in streams.iter_mut().enumerate() {
        stream.shutdown(Shutdown::Write)?;
        let mut got = Vec::new();
        stream.read_to_end(&mut got)?;
        ensure!(got == answer_to(format!("I am {n}").as_bytes()), "stream {n}: {got:?}");
    }

    // Names and ports are the machine's, wherever else there may be something of that number.
    let mut nobody = connect(story, refused)?;
    let mut got = Vec::new();
    let _ = nobody.read_to_end(&mut got);
    same("what a port without a server says", got.len(), 0)?;
    let log = client.errors_so_far()?;
    says("the client", &log, "Connection refused")?;
    for (to, why) in [("127.0.0.1:22", "refused"), ("example.org:80", "no name of this machine")] {
        let mut command = alice.login().option("-oLogLevel=INFO").client("ssh")?;
        command.args(["-W", to]).arg(alice.login().destination());
        let ended = process::run("ssh -W", command, Input::Nothing, story.within(60))?;
        ensure!(!ended.status.success(), "ssh -W {to} succeeded");
        says("the client", &ended.err(), why)?;
    }
    let mut command = alice.login().client("ssh")?;
    command.args(["-W", "localhost:7000"]).arg(alice.login().destination());
    let ended = process::run("ssh -W", command, Input::Bytes(b"jump".to_vec()), story.within(60))?;
    same("through -W", ended.success()?.as_str(), "4\njump")?;

    let mut stream = connect(story, dynamic)?;
    by_proxy(&mut stream, "localhost", 7000).context("asking the proxy of -D")?;
    stream.write_all(b"by proxy")?;
    stream.shutdown(Shutdown::Write)?;
    let mut got = String::new();
    stream.read_to_string(&mut got)?;
    same("through -D", got.as_str(), "8\nby proxy")?;
    client.kill();
    Ok(())
}

/// Asks a proxy for a connection by name (RFC 1928).
pub fn by_proxy(stream: &mut TcpStream, host: &str, port: u16) -> Result<()> {
    stream.write_all(&[5, 1, 0])?;
    let mut method = [0; 2];
    stream.read_exact(&mut method)?;
    same("the proxy's method", method, [5, 0])?;
    let length = u8::try_from(host.len())?;
    let request = [&[5, 1, 0, 3, length], host.as_bytes(), &port.to_be_bytes()].concat();
    stream.write_all(&request)?;
    let mut answer = [0; 10];
    stream.read_exact(&mut answer)?;
    same("the proxy's answer", answer[1], 0)
}

/// A server here that answers like the one in the machine, once for each connection.
fn listen_here() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = stream;
                let mut got = Vec::new();
                let _ = stream.read_to_end(&mut got);
                let _ = stream.write_all(&answer_to(&got));
            });
        }
    });
    Ok(port)
}

fn outward(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let port = listen_here()?;
    let path = format!("/home/{}/far", alice.name);
    let mut client = forward(
        &alice,
        &["-R", &format!("0:127.0.0.1:{port}"), "-R", &format!("{path}:127.0.0.1:{port}")],
    )?;
    let far = story.wait_for("the port in the machine", 60, || {
        let log = client.errors_so_far()?;
        ensure!(!client.has_ended()?, "the client ended: {log}");
        let port = log.split("Allocated port ").nth(1).and_then(|rest| rest.split(' ').next());
        Ok(port.and_then(|port| port.parse::<u16>().ok()))
    })?;
    // Answered in the order in which they were asked for.
    story.wait_for("the socket in the machine", 60, || {
        Ok(alice.exec(&format!("test -S {path}"))?.status.success().then_some(()))
    })?;
    let script = format!(
        "stat -c %a:%U {path}; echo one | nc -N 127.0.0.1 {far}; echo two | nc -N ::1 {far}; \
         echo three | nc -N -U {path}; head -c 1000000 /dev/zero | nc -N localhost {far} | wc -c"
    );
    let wanted = format!("600:{}\n4\none\n4\ntwo\n6\nthree\n1000008", alice.name);
    same("answers in the machine", alice.output(&script)?, wanted)?;
    // Many at once.
    let script = format!(
        "for n in $(seq 10); do (echo $n | nc -N 127.0.0.1 {far} | tail -1) & done | sort -n | \
         tr '\\n' ' '; wait"
    );
    let wanted: Vec<String> = (1..=10).map(|n| n.to_string()).collect();
    same("many answers", alice.output(&script)?.trim(), wanted.join(" ").as_str())?;

    let taken = forward(&alice, &["-R", &format!("{far}:127.0.0.1:{port}")])?;
    let ended = taken.wait(story.within(60))?;
    same("status for a port that is taken", ended.code(), Some(255))?;
    says("the client", &ended.err(), "remote port forwarding failed")?;
    client.kill();
    story.wait_for("its sockets to go with the client", 60, || {
        let script = format!("nc -N 127.0.0.1 {far} </dev/null && echo there; ls {path}");
        Ok(alice.exec(&script)?.out().is_empty().then_some(()))
    })
}

/// A key agent with that account's key, as long as it is kept, and its socket.
pub fn key_agent(story: &Story, account: &Account) -> Result<(Running, PathBuf)> {
    let socket = story.path("agent");
    let mut command = Command::new("ssh-agent");
    command.args(["-D", "-a"]).arg(&socket);
    let agent = process::start("ssh-agent", command, Input::Nothing)?;
    story.wait_for("the agent", 30, || Ok(socket.exists().then_some(())))?;
    let mut add = Command::new("ssh-add");
    add.arg("-q").arg(&account.key).env("SSH_AUTH_SOCK", &socket);
    process::run("ssh-add", add, Input::Nothing, story.within(30))?.success()?;
    Ok((agent, socket))
}

fn agent(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let (_agent, socket) = key_agent(story, &alice)?;

    let with_agent = |script: &str| {
        let mut command = alice.login().ssh(&["-A", "-T"])?;
        command.arg(script).env("SSH_AUTH_SOCK", &socket);
        process::run("ssh -A", command, Input::Nothing, story.within(120))?.success()
    };
    let script = "ssh-add -l; stat -c %a:%U $SSH_AUTH_SOCK; \
                  stat -c %a $(dirname $SSH_AUTH_SOCK); echo $SSH_AUTH_SOCK";
    let told = with_agent(script)?;
    let mut lines = told.lines();
    says("ssh-add in the machine", lines.next().unwrap_or_default(), "ED25519")?;
    same("the socket", lines.next(), Some(format!("600:{}", alice.name).as_str()))?;
    same("its folder", lines.next(), Some("700"))?;
    let path = lines.next().context("no path of the socket")?;
    // A session without -A has none, and that of one that has ended is gone.
    let script = format!("echo \"${{SSH_AUTH_SOCK:-none}}\"; ls -d {path} 2>&1");
    story.wait_for("the socket to go with its session", 30, || {
        let told = alice.exec(&script)?.out();
        ensure!(told.starts_with("none\n"), "without -A: {told}");
        Ok(told.contains("No such file").then_some(()))
    })?;
    // It does what it is for: another login from here, with a key that is not here.
    let script = "ssh-add -L | cut -d' ' -f2";
    let public = fs::read_to_string(alice.key.with_extension("pub"))?;
    same("the key it offers", Some(with_agent(script)?.trim()), public.split(' ').nth(1))
}

fn wakes(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--linger", "1"])?;
    let port = free_port()?;
    let mut client = forward(&alice, &["-L", &format!("{port}:localhost:7000")])?;
    drop(connect(story, port)?);
    let gone =
        |what: &str| story.wait_for(what, 90, || Ok(alice.machine()?.is_none().then_some(())));
    gone("the machine to be put away beside an idle -L")?;
    // Nobody listens there, but the machine that says so had to be woken for it.
    let mut stream = connect(story, port)?;
    let mut got = Vec::new();
    let _ = stream.read_to_end(&mut got);
    says("the client", &client.errors_so_far()?, "Connection refused")?;
    client.kill();

    // Whoever listens holds it, until the client goes, or the machine.
    let mut client = forward(&alice, &["-R", "9000:127.0.0.1:9"])?;
    story.wait_for("the listener", 60, || {
        Ok(alice.output("ss -ltn")?.contains(":9000").then_some(()))
    })?;
    story.sleep(Duration::from_secs(3));
    alice.running_machine().context("beside a -R")?;
    story.host().run(&format!("hermitage account stop {}", alice.name))?;
    story.wait_for("the client to be told", 60, || Ok(client.has_ended()?.then_some(())))?;
    says("the client", &client.errors_so_far()?, "nothing listens any more")?;
    gone("the machine to stop")
}
