//! What is broken, by accident or on purpose, is refused with its name; the rest goes on.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{Story, same, says},
    runner::{Test, test},
};

pub const TESTS: [Test; 3] = [
    test("altered_base_files_are_refused", 1200, altered_base),
    test("garbage_on_the_ssh_port", 300, garbage),
    test("silent_connections_do_not_shut_others_out", 300, silent_connections),
];

/// A copy of the base in a state directory of its own, one file of it broken at a time.
fn altered_base(story: &Story) -> Result<()> {
    let state = story.world.options.state_dir.display().to_string();
    let aside = format!("{state}/e2e-malformed");
    let list = story.host().hermitage_json("base list")?;
    let id = list["current"].as_str().context("there is no current base")?.to_owned();
    story.afterwards(format!("rm -rf {aside}"));
    let copy = format!("{aside}/bases/{id}");
    // Links, but for the file that is broken: nothing here may touch the original.
    let fresh = |file: &str| {
        format!(
            "rm -rf {aside} && mkdir -p {aside}/bases {aside}/accounts {aside}/removed && \
             ln -s {state}/images {aside}/images && cp -al {state}/bases/{id} {copy} && \
             rm {copy}/{file} && cp --sparse=always {state}/bases/{id}/{file} {copy}/{file} && \
             chmod u+w {copy}/{file}"
        )
    };
    let choose = format!("hermitage --state-dir {aside} base use {id} 2>&1");
    let intact = story.host().try_run(&format!("{} && {choose}", fresh("base.json")))?;
    ensure!(intact.code() == Some(0), "the intact copy is refused: {}", intact.out());

    for file in ["memory.img", "state.bin", "root.erofs", "base.json"] {
        for (how, breaking) in [
            ("altered", flip(&format!("{copy}/{file}"))),
            ("truncated", format!("truncate -s -1 {copy}/{file}")),
            ("emptied", format!("truncate -s 0 {copy}/{file}")),
            ("missing", format!("rm {copy}/{file}")),
        ] {
            let what = format!("a base whose {file} is {how}");
            let broken = format!("{{ {} && {breaking}; }} || exit 99", fresh(file));
            let ended = story.host().try_run(&format!("{broken}\n{choose}"))?;
            ensure!(
                !matches!(ended.code(), Some(0 | 99)),
                "{what}: exit status {:?}, {}",
                ended.code(),
                ended.out()
            );
            // A folder without a manifest is no base; all else is the fault of a file.
            if (file, how) != ("base.json", "missing") {
                says(&what, &ended.out(), file)?;
            }
        }
    }
    // The program that runs machines does not take the word of the one that chooses bases.
    for file in ["memory.img", "state.bin"] {
        let script = format!("{} && {}", fresh(file), flip(&format!("{copy}/{file}")));
        story.host().run(&script)?;
        let ended = story.host().try_run(&fork_server(&copy))?;
        says(&format!("the fork server of a base with altered {file}"), &ended.out(), file)?;
        ensure!(!ended.out().contains("Ready"), "it was taken: {}", ended.out());
    }
    Ok(())
}

/// Turns one bit in the middle of what the file holds (its first data beyond the first page).
fn flip(path: &str) -> String {
    format!(
        r#"perl -e '
            open(my $f, "+<:raw", $ARGV[0]) or die "open: $!";
            my $size = -s $f; my $at = int($size / 2);
            if ($size > 1 << 20) {{
                # Not into a hole, where a zero page may be of no consequence.
                for ($at = 1 << 20; $at < $size; $at += 4096) {{
                    sysseek($f, $at, 0); sysread($f, my $page, 4096); last if $page =~ /[^\0]/;
                }}
            }}
            sysseek($f, $at, 0); sysread($f, my $byte, 1); sysseek($f, $at, 0);
            syswrite($f, chr(ord($byte) ^ 4)) == 1 or die "write: $!";' {path}"#
    )
}

/// Starts a fork server on the base with a socket pair, and prints what it says on either way.
fn fork_server(base: &str) -> String {
    format!(
        r#"perl -MSocket -MPOSIX -e '
            $^F = 10;
            socketpair(my $mine, my $its, AF_UNIX, SOCK_SEQPACKET, 0) or die "socketpair: $!";
            my $pid = fork();
            if (!$pid) {{ dup2(fileno($its), 3); exec "hermitage-vmm", "fork-server", "--base", $ARGV[0]; }}
            close($its);
            alarm 120;
            recv($mine, my $packet, 65536, 0);
            print "$packet\n"; close($mine); waitpid($pid, 0); print "status ", $? >> 8, "\n";' {base} 2>&1"#
    )
}

fn garbage(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut shell = alice.shell()?;
    let service = story.host().run("pgrep -xo hermitage")?;
    let mut noise = vec![0u8; 1 << 16];
    for byte in &mut noise {
        *byte = story.world.random() as u8;
    }
    let mut after_hello = b"SSH-2.0-garbage\r\n".to_vec();
    after_hello.extend_from_slice(&noise);
    let mut huge_packet = b"SSH-2.0-garbage\r\n".to_vec();
    huge_packet.extend_from_slice(&[0xff; 4096]);
    for (what, bytes) in [
        ("random bytes", noise.clone()),
        ("a line without end", vec![b'A'; 1 << 20]),
        ("lines without end", b"hello\r\n".repeat(1 << 15)),
        ("an http request", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("random bytes after the version", after_hello),
        ("a packet of 4 GiB", huge_packet),
        ("nothing at all", Vec::new()),
    ] {
        let mut stream = connect(story)?;
        // The service may close before all is sent.
        let _ = stream.write_all(&bytes);
        if bytes.is_empty() {
            let _ = stream.shutdown(Shutdown::Write);
        }
        closed(story, &mut stream, 60).with_context(|| what.to_owned())?;
    }
    shell.run("true").context("a session that was open all the time")?;
    alice.output("true").context("a login afterwards")?;
    same("the service's process", story.host().run("pgrep -xo hermitage")?, service)
}

/// More connections that say nothing than one source may have: they are shut, in time, and whoever
/// was in stays in.
fn silent_connections(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut shell = alice.shell()?;
    let mut silent = Vec::new();
    for _ in 0..150 {
        // Beyond the limit they may be shut at once.
        if let Ok(stream) = connect(story) {
            silent.push(stream);
        }
    }
    shell.run("true").context("a session that was open before")?;
    let begun = Instant::now();
    for stream in &mut silent {
        closed(story, stream, 90)?;
    }
    let seconds = begun.elapsed().as_secs();
    ensure!(seconds < 90, "silent connections stay for {seconds} s");
    alice.output("true").context("a login afterwards").map(drop)
}

fn connect(story: &Story) -> Result<TcpStream> {
    let options = &story.world.options;
    let stream = TcpStream::connect((options.ssh_host.as_str(), options.ssh_port))
        .with_context(|| format!("can't reach port {}", options.ssh_port))?;
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    Ok(stream)
}

/// Waits until the service has closed the connection.
fn closed(story: &Story, stream: &mut TcpStream, seconds: u64) -> Result<()> {
    let mut read = 0;
    story.wait_for("the service to close the connection", seconds, || {
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer) {
            Ok(0) => Ok(Some(())),
            Ok(n) => {
                read += n;
                ensure!(read < 1 << 20, "the service answers garbage without end");
                Ok(None)
            }
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) =>
            {
                Ok(None)
            }
            Err(_) => Ok(Some(())),
        }
    })
}
