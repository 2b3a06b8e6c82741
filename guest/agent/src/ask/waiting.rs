//! PID 1's side: who asks, and whose answer is to come.
//!
//! Whoever is there takes a descriptor and no memory; there are few of them, each for a time. A machine that
//! is saved and resumed keeps them: the host then says that it knows nothing of their questions.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hermitage_guest_proto::{ALL_QUESTIONS, Answer, AnswerStatus, Ask, MAX_ANSWER, MAX_ASKED};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};
use nix::unistd::{Gid, Uid, chown};

use super::{QUESTION_MAX, Question, exit_status};
use crate::sys;

/// Connections at once; others wait to be accepted.
const ASKERS_MAX: usize = 16;
const BACKLOG: i32 = 16;

/// How long somebody who has connected may take to ask. The program does it at once.
const SILENCE: Duration = Duration::from_secs(5);

/// How long the host may take to answer: a copy of a large disk is made in that time.
const PATIENCE: Duration = Duration::from_secs(600);

#[derive(Default)]
pub struct Questions {
    listener: Option<OwnedFd>,
    askers: Vec<Asker>,
    last: u64,
    /// The last one before the machine stood still last.
    slept: u64,
}

struct Asker {
    socket: OwnedFd,
    deadline: Instant,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Has not asked yet.
    Silent,
    /// For the answer to this number.
    Waits(u64),
    /// To be closed by [`Questions::sweep`].
    Over,
}

impl Questions {
    /// Listens at `path` for the user `uid`. Nobody else's program runs yet.
    pub fn listen(&mut self, path: &Path, uid: u32) -> Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        let address = UnixAddr::new(path)?;
        socket::bind(listener.as_raw_fd(), &address).context("bind")?;
        let mode = Mode::from_bits_truncate(0o600);
        fchmodat(nix::fcntl::AT_FDCWD, path, mode, FchmodatFlags::FollowSymlink)
            .context("chmod")?;
        chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid))).context("chown")?;
        socket::listen(&listener, Backlog::new(BACKLOG)?).context("listen")?;
        self.listener = Some(listener);
        Ok(())
    }

    /// To be polled for reading, as long as there is room for one more.
    pub fn listener(&self) -> Option<&OwnedFd> {
        self.listener.as_ref().filter(|_| self.askers.len() < ASKERS_MAX)
    }

    /// To be polled for reading, by index: somebody who waits says nothing but that she is gone. Indices stay
    /// valid until [`sweep`](Self::sweep).
    pub fn sockets(&self) -> impl Iterator<Item = (usize, &OwnedFd)> {
        self.askers.iter().map(|asker| &asker.socket).enumerate()
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.askers.iter().map(|asker| asker.deadline).min()
    }

    pub fn accept(&mut self, now: Instant) {
        while let Some(listener) = self.listener() {
            let Ok(socket) = sys::accept(listener) else { return };
            self.askers.push(Asker { socket, deadline: now + SILENCE, state: State::Silent });
        }
    }

    /// Takes what somebody has to say. Some: a question for the host.
    pub fn readable(&mut self, index: usize, now: Instant) -> Option<Ask> {
        let waiting = self.askers.iter().filter(|one| matches!(one.state, State::Waits(_))).count();
        let asker = self.askers.get_mut(index)?;
        // One byte more tells a packet that is too long from the longest.
        let mut packet = [0; QUESTION_MAX + 1];
        let received = socket::recv(asker.socket.as_raw_fd(), &mut packet, MsgFlags::empty());
        let count = match received {
            Err(Errno::EAGAIN | Errno::EINTR) => return None,
            // She is gone, or says more than there is to say.
            Err(_) | Ok(0) => {
                asker.state = State::Over;
                return None;
            }
            Ok(_) if asker.state != State::Silent => {
                asker.state = State::Over;
                return None;
            }
            Ok(count) => count,
        };
        let Some(Question { word, argument }) = Question::parse(&packet[..count]) else {
            asker.end(AnswerStatus::Refused, "that is no question, or it is too long");
            return None;
        };
        if waiting >= MAX_ASKED {
            asker.end(AnswerStatus::Refused, "too many questions wait for their answers already");
            return None;
        }
        self.last += 1;
        let number = self.last;
        (asker.state, asker.deadline) = (State::Waits(number), now + PATIENCE);
        Some(Ask { number, word, argument })
    }

    /// Passes an answer of the host's on. One to nothing that was asked, or to somebody who is gone, is lost.
    pub fn answer(&mut self, answer: &Answer) {
        for asker in &mut self.askers {
            let State::Waits(number) = asker.state else { continue };
            let slept = answer.number == ALL_QUESTIONS && number <= self.slept;
            if answer.number == number || slept {
                asker.end(answer.status, &answer.text);
            }
        }
    }

    /// The machine goes on after a stand-still, in which it may have been saved.
    pub fn resumed(&mut self) {
        self.slept = self.last;
    }

    /// Closes what is over, and what has taken too long.
    pub fn sweep(&mut self, now: Instant) {
        for asker in self.askers.iter_mut().filter(|asker| asker.deadline <= now) {
            match asker.state {
                State::Silent => asker.state = State::Over,
                State::Waits(_) => {
                    let minutes = PATIENCE.as_secs() / 60;
                    let words = format!("the host has not answered within {minutes} minutes");
                    asker.end(AnswerStatus::Unasked, &words);
                }
                State::Over => {}
            }
        }
        self.askers.retain(|asker| asker.state != State::Over);
    }
}

impl Asker {
    /// Leaves the answer in her socket, which is closed next. It fits: it is the first packet.
    fn end(&mut self, status: AnswerStatus, text: &str) {
        let text = &text.as_bytes()[..text.len().min(MAX_ANSWER)];
        let packet = [&[exit_status(status)], text].concat();
        let _ = socket::send(self.socket.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL);
        self.state = State::Over;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::path::PathBuf;

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};

    use super::*;
    use crate::ask::program::{self, Told};

    /// A socket of its own for each test, and what listens there.
    fn listening(name: &str) -> (PathBuf, Questions) {
        let path = std::env::temp_dir().join(format!("ask-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let mut questions = Questions::default();
        questions.listen(&path, nix::unistd::getuid().as_raw()).unwrap();
        (path, questions)
    }

    fn question(word: &str, argument: &str) -> Vec<u8> {
        Question { word: word.into(), argument: argument.into() }.packet().unwrap()
    }

    /// Somebody who has asked, and what the host gets to see of it.
    fn ask(path: &Path, questions: &mut Questions, packet: &[u8]) -> (OwnedFd, Option<Ask>) {
        let socket = program::connect(path).unwrap();
        program::send(&socket, packet).unwrap();
        questions.accept(Instant::now());
        let index = questions.askers.len() - 1;
        let asked = questions.readable(index, Instant::now());
        (socket, asked)
    }

    fn answer(number: u64, text: &str) -> Answer {
        Answer { number, status: AnswerStatus::Done, text: text.into() }
    }

    fn told(socket: &OwnedFd) -> (u8, String) {
        let Told { status, text } = program::told(socket).unwrap();
        (status, String::from_utf8(text).unwrap())
    }

    #[test]
    fn a_question_is_passed_on_and_its_answer_back() {
        let (path, mut questions) = listening("answer");
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        assert_eq!(metadata.uid(), nix::unistd::getuid().as_raw());
        // No program that is started has it.
        let flags = fcntl(questions.listener().unwrap(), FcntlArg::F_GETFD).unwrap();
        assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));

        let (alice, asked) = ask(&path, &mut questions, &question("hold", "2h"));
        assert_eq!(asked, Some(Ask { number: 1, word: "hold".into(), argument: "2h".into() }));
        let (second, asked) = ask(&path, &mut questions, &question("status", ""));
        assert_eq!(asked.unwrap().number, 2);
        questions.answer(&answer(7, "to nobody"));
        questions.answer(&answer(2, "second"));
        let long = "x".repeat(MAX_ANSWER);
        questions.answer(&answer(1, &long));
        questions.answer(&answer(1, "once more"));
        questions.sweep(Instant::now());
        assert!(questions.askers.is_empty());
        // They lie there, whoever has closed what.
        assert_eq!(told(&alice), (0, long));
        assert_eq!(told(&second), (0, "second".into()));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_is_no_question_is_refused_and_never_passed_on() {
        let (path, mut questions) = listening("hostile");
        let long = [b'x'; 4000];
        for bad in [&b"status"[..], b"a\0b\0c", b"\xff\xff\0", &long] {
            let (socket, asked) = ask(&path, &mut questions, bad);
            assert_eq!(asked, None);
            let (status, words) = told(&socket);
            assert!(status == 1 && words.contains("no question"), "{words}");
            questions.sweep(Instant::now());
        }
        // A second one over the same connection.
        let (socket, asked) = ask(&path, &mut questions, &question("status", ""));
        assert!(asked.is_some());
        program::send(&socket, b"status\0").unwrap();
        assert_eq!(questions.readable(0, Instant::now()), None);
        questions.sweep(Instant::now());
        assert!(questions.askers.is_empty());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn few_wait_and_more_are_refused_in_words() {
        let (path, mut questions) = listening("many");
        let mut waiting: Vec<_> =
            (0..MAX_ASKED).map(|_| ask(&path, &mut questions, &question("status", ""))).collect();
        assert!(waiting.iter().all(|(_, asked)| asked.is_some()));
        let (socket, asked) = ask(&path, &mut questions, &question("status", ""));
        assert_eq!(asked, None);
        assert!(told(&socket).1.contains("too many questions"));
        questions.sweep(Instant::now());
        // Who goes away makes room.
        drop(waiting.remove(0));
        questions.readable(0, Instant::now());
        questions.sweep(Instant::now());
        let (_kept, asked) = ask(&path, &mut questions, &question("status", ""));
        assert!(asked.is_some());
        // Connections that say nothing are bounded as well, and end.
        let silent: Vec<_> = (0..ASKERS_MAX).map(|_| program::connect(&path).unwrap()).collect();
        questions.accept(Instant::now());
        assert_eq!(questions.askers.len(), ASKERS_MAX);
        assert!(questions.listener().is_none());
        questions.sweep(Instant::now() + SILENCE);
        assert_eq!(questions.askers.len(), MAX_ASKED);
        drop(silent);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_host_that_does_not_answer_is_told_of_and_so_is_one_that_knows_of_nothing() {
        let (path, mut questions) = listening("late");
        let (late, asked) = ask(&path, &mut questions, &question("status", ""));
        assert!(asked.is_some());
        questions.sweep(Instant::now() + PATIENCE - Duration::from_secs(1));
        assert_eq!(questions.askers.len(), 1);
        questions.sweep(Instant::now() + PATIENCE);
        assert_eq!(told(&late), (255, "the host has not answered within 10 minutes".into()));

        let asked: Vec<_> =
            (0..2).map(|_| ask(&path, &mut questions, &question("keys", "")).0).collect();
        questions.resumed();
        let (new, since) = ask(&path, &mut questions, &question("keys", ""));
        questions.answer(&answer(ALL_QUESTIONS, "ask again"));
        assert!(asked.iter().all(|socket| told(socket).1 == "ask again"));
        questions.answer(&answer(since.unwrap().number, "of this host"));
        assert_eq!(told(&new).1, "of this host");
        std::fs::remove_file(&path).unwrap();
    }
}
