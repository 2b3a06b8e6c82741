//! An editor that works in the machine from afar, the way VS Code's Remote-SSH does: a script on the input of
//! a shell starts a server in the background and says where it listens, the editor's streams go there
//! through `ssh -D`, and all of it is done again when the link was lost, with the server still there.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
};

use anyhow::{Context as _, Result, ensure};

use super::forwarding::{by_proxy, connect, free_port};
use crate::{
    harness::{
        Story,
        account::Account,
        process::{self, Input, Running},
        same,
    },
    runner::{Test, test},
};

pub const TESTS: [Test; 1] = [test("an_editor_works_from_afar", 240, editor)];

/// Neither setsid nor nohup: the editors' own scripts have none either.
const SCRIPT: &str = r#"
mkdir -p ~/.editor/bin && cd ~/.editor || exit 1
cat > bin/server.py <<'END'
import os, socket, threading
def serve(one):
    for line in one.makefile("rb"):
        word = line.split()
        if word[0] == b"bulk":
            one.sendall(b"x" * int(word[1]) + b"\n")
        else:
            one.sendall(b"%d %s\n" % (os.getpid(), line.strip()))
server = socket.create_server(("127.0.0.1", 0), backlog=50)
print("listening on", server.getsockname()[1], flush=True)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
END
if [ -e pid ] && kill -0 "$(cat pid)"; then how=found; else
    how=started
    python3 bin/server.py > log 2>&1 < /dev/null &
    echo $! > pid
    until grep -q listening log; do sleep 0.1; done
fi
echo "$how==$(cat pid)==$(sed 's/.* //' log)=="
"#;

/// What the script has said.
#[derive(Debug)]
struct Server {
    how: String,
    pid: String,
    port: u16,
}

/// The connection: the script's shell, which stays, and the local port of `-D`.
fn begin(story: &Story, alice: &Account) -> Result<(Running, u16, Server)> {
    let proxy = free_port()?;
    let mut command = alice.login().client("ssh")?;
    command.args(["-T", "-D", &proxy.to_string()]).arg(alice.login().destination()).arg("bash");
    let mut client = process::start("ssh -T -D", command, Input::Pipe)?;
    client.write(SCRIPT.as_bytes())?;
    let server = story.wait_for("the script's answer", 60, || {
        let told = String::from_utf8_lossy(&client.out_so_far()?).into_owned();
        let mut words = told.split("==").map(str::to_owned);
        let (Some(how), Some(pid), Some(port), Some(_)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            ensure!(!client.has_ended()?, "ended with {:?}", client.errors_so_far()?);
            return Ok(None);
        };
        Ok(Some(Server { how, pid, port: port.parse().context(told)? }))
    })?;
    Ok((client, proxy, server))
}

fn open(story: &Story, proxy: u16, server: &Server) -> Result<BufReader<TcpStream>> {
    let mut stream = connect(story, proxy)?;
    by_proxy(&mut stream, "127.0.0.1", server.port)?;
    stream.set_nodelay(true)?;
    Ok(BufReader::new(stream))
}

fn ask(stream: &mut BufReader<TcpStream>, word: &str) -> Result<String> {
    writeln!(stream.get_mut(), "{word}")?;
    let mut line = String::new();
    stream.read_line(&mut line).with_context(|| format!("the answer to {word}"))?;
    Ok(line.trim_end().to_owned())
}

fn editor(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let (mut client, proxy, server) = begin(story, &alice)?;
    same("how the server came to be", server.how.as_str(), "started")?;
    let mut streams = (0..6).map(|_| open(story, proxy, &server)).collect::<Result<Vec<_>>>()?;
    // One of them brings much, and nobody reads it yet; the others answer meanwhile.
    writeln!(streams[0].get_mut(), "bulk 5000000")?;
    for round in 0..5 {
        for (n, stream) in streams.iter_mut().enumerate().skip(1) {
            let word = format!("{n}.{round}");
            same("an answer", ask(stream, &word)?, format!("{} {word}", server.pid))?;
        }
    }
    let mut much = vec![0; 5_000_001];
    streams[0].read_exact(&mut much).context("the long answer")?;
    ensure!(much.ends_with(b"x\n"), "the long answer's end is {:?}", much.last_chunk::<4>());
    // The shell reads further lines; an editor asks it now and then.
    client.write(b"echo still here\n")?;
    story.wait_for("the shell", 30, || {
        Ok(client.out_so_far()?.ends_with(b"still here\n").then_some(()))
    })?;

    // The link is lost; the server stays, and the next connection finds it.
    client.kill();
    story.wait_for("the shell to be gone", 60, || {
        Ok((!alice.exec("pgrep -fx bash")?.status.success()).then_some(()))
    })?;
    let (mut client, proxy, again) = begin(story, &alice)?;
    same("how the server was met again", again.how.as_str(), "found")?;
    same("its process", &again.pid, &server.pid)?;
    let mut stream = open(story, proxy, &again)?;
    same("its answer", ask(&mut stream, "again")?, format!("{} again", server.pid))?;
    drop(stream);
    // The end of its input is the shell's end, not the server's.
    client.close_input();
    same("the shell's status", client.wait(story.within(60))?.code(), Some(0))?;
    alice.output(&format!("kill -0 {}", server.pid)).context("the server after its shell").map(drop)
}
