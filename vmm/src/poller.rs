//! One epoll for everything of a machine that waits on a descriptor: control socket, serial console,
//! terminals, streams.
//!
//! Level-triggered, because a source that is not served to its end must come again without anybody
//! remembering it: that is what lets a device do a bounded amount per event and be fair to the others.
//! The price is that a source nobody wants to serve right now must be taken out (see
//! [`Source::set`]), or it would wake the thread for ever: epoll reports a hang-up whether asked for
//! or not.
//!
//! Registration works from any thread. One thread calls [`Poller::wait`].

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

/// Says what an event is for: who registered the source, and which of theirs it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub owner: u8,
    pub token: u32,
}

impl Key {
    fn pack(self) -> u64 {
        u64::from(self.owner) << 32 | u64::from(self.token)
    }

    fn unpack(data: u64) -> Self {
        // Both casts keep exactly the bits that `pack` put there.
        Self { owner: (data >> 32) as u8, token: data as u32 }
    }
}

/// What a source is watched for. A hang-up is always reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    pub read: bool,
    pub write: bool,
}

impl Interest {
    pub const NONE: Self = Self { read: false, write: false };
    pub const READ: Self = Self { read: true, write: false };
    pub const WRITE: Self = Self { read: false, write: true };

    fn events(self) -> EventSet {
        let mut events = EventSet::empty();
        events.set(EventSet::IN, self.read);
        events.set(EventSet::OUT, self.write);
        events
    }
}

/// What happened to a source. All false for an event that came by [`Poller::post`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    pub key: Key,
    pub readable: bool,
    pub writable: bool,
    /// Both directions are closed, or the descriptor is in error.
    pub hangup: bool,
}

impl Event {
    fn posted(key: Key) -> Self {
        Self { key, readable: false, writable: false, hangup: false }
    }
}

/// Keys of this owner are the poller's own.
const OWN: u8 = u8::MAX;
const WAKE: u32 = 0;
const TIMER: u32 = 1;

/// Most events one [`Poller::wait`] brings from descriptors.
const BATCH: usize = 64;

pub struct Poller {
    epoll: Epoll,
    wake: EventFd,
    posted: Mutex<Vec<Key>>,
    timer: OwnedFd,
    /// Posted when the timer fires, which runs while there are any.
    late: Mutex<Vec<Key>>,
}

impl Poller {
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let wake = EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        for (fd, token) in [(wake.as_raw_fd(), WAKE), (timer.as_raw_fd(), TIMER)] {
            let event = EpollEvent::new(EventSet::IN, Key { owner: OWN, token }.pack());
            epoll.ctl(ControlOperation::Add, fd, event)?;
        }
        let (posted, late) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
        Ok(Self { epoll, wake, posted, timer, late })
    }

    /// Starts watching a descriptor. Owner 255 is the poller's own.
    pub fn add(&self, fd: &impl AsRawFd, key: Key, interest: Interest) -> io::Result<()> {
        let event = EpollEvent::new(interest.events(), key.pack());
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    }

    pub fn modify(&self, fd: &impl AsRawFd, key: Key, interest: Interest) -> io::Result<()> {
        let event = EpollEvent::new(interest.events(), key.pack());
        self.epoll.ctl(ControlOperation::Modify, fd.as_raw_fd(), event)
    }

    /// Stops watching. Events already fetched by `wait` may still be on their way: owners must take
    /// an event for an unknown token as nothing.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default())
    }

    /// Makes `wait` return an event for this key without a descriptor being ready: how another thread
    /// hands on work. Posting a key that is already waiting to be fetched does nothing.
    pub fn post(&self, key: Key) -> io::Result<()> {
        let mut posted = lock(&self.posted);
        if !posted.contains(&key) {
            posted.push(key);
        }
        match self.wake.write(1) {
            // The counter is full, so the poller is awake anyway.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    /// The same in a while: after `delay`, or earlier if another key is waiting so already.
    pub fn post_after(&self, delay: Duration, key: Key) -> io::Result<()> {
        let mut late = lock(&self.late);
        if late.is_empty() {
            let it_value = Timespec::try_from(delay).map_err(io::Error::other)?;
            let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
            let once = Itimerspec { it_interval, it_value };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        }
        if !late.contains(&key) {
            late.push(key);
        }
        Ok(())
    }

    /// Waits for events and puts them into `events`, which is cleared first. An empty `events` means
    /// that the time was over or a signal came.
    pub fn wait(&self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<()> {
        events.clear();
        let mut buffer = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(milliseconds(timeout), &mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result?,
        };
        for event in &buffer[..count] {
            let key = Key::unpack(event.data());
            match key {
                Key { owner: OWN, token: TIMER } => {
                    self.fetch_late(events);
                    continue;
                }
                Key { owner: OWN, .. } => {
                    self.fetch_posted(events);
                    continue;
                }
                _ => {}
            }
            let set = event.event_set();
            events.push(Event {
                key,
                readable: set.contains(EventSet::IN),
                writable: set.contains(EventSet::OUT),
                hangup: set.intersects(EventSet::HANG_UP | EventSet::ERROR),
            });
        }
        Ok(())
    }

    fn fetch_posted(&self, events: &mut Vec<Event>) {
        // Emptied before the list is: a post in between wakes once too often, never too seldom.
        let _ = self.wake.read();
        let posted = std::mem::take(&mut *lock(&self.posted));
        events.extend(posted.into_iter().map(Event::posted));
    }

    fn fetch_late(&self, events: &mut Vec<Event>) {
        // Emptied under the lock, as the timer is set under it: who comes next sets it again.
        let mut late = lock(&self.late);
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        events.extend(late.drain(..).map(Event::posted));
    }
}

fn lock<T>(keys: &Mutex<T>) -> MutexGuard<'_, T> {
    keys.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rounded up, so that a wait for less than a millisecond does not become a busy loop.
fn milliseconds(timeout: Option<Duration>) -> i32 {
    match timeout {
        None => -1,
        Some(time) => i32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX),
    }
}

/// A descriptor and its registration, which ends with it.
pub struct Source {
    fd: OwnedFd,
    key: Key,
    /// None while it is not registered.
    registered: Option<Interest>,
    poller: Arc<Poller>,
}

impl Source {
    /// Takes a descriptor without watching it yet.
    pub fn new(poller: Arc<Poller>, fd: OwnedFd, key: Key) -> Self {
        Self { fd, key, registered: None, poller }
    }

    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub fn key(&self) -> Key {
        self.key
    }

    /// Watches for `interest` (with [`Interest::NONE`]: for a hang-up only), or, with `None`, for
    /// nothing at all.
    pub fn set(&mut self, interest: Option<Interest>) -> io::Result<()> {
        if interest == self.registered {
            return Ok(());
        }
        match (self.registered, interest) {
            (None, Some(new)) => self.poller.add(&self.fd, self.key, new)?,
            (Some(_), Some(new)) => self.poller.modify(&self.fd, self.key, new)?,
            (Some(_), None) => self.poller.remove(&self.fd)?,
            (None, None) => {}
        }
        self.registered = interest;
        Ok(())
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // A descriptor leaves epoll by itself only when its last duplicate is closed, and the sender
        // of a descriptor may still hold one.
        let _ = self.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hermitage_vmm_proto::stream_pair;
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
    };

    const NOW: Option<Duration> = Some(Duration::ZERO);
    const KEY: Key = Key { owner: 3, token: 0xfedc_ba98 };

    fn wait(poller: &Poller) -> Vec<Event> {
        let mut events = Vec::new();
        poller.wait(&mut events, NOW).unwrap();
        events
    }

    #[test]
    fn events_come_again_until_served_and_only_as_asked() {
        let poller = Arc::new(Poller::new().unwrap());
        let (a, b) = stream_pair(true).unwrap();
        let mut peer = UnixStream::from(b);
        let mut source = Source::new(poller.clone(), a, KEY);
        peer.write_all(b"x").unwrap();
        assert_eq!(wait(&poller), []);
        source.set(Some(Interest::READ)).unwrap();
        let readable = Event { key: KEY, readable: true, writable: false, hangup: false };
        assert_eq!(wait(&poller), [readable]);
        assert_eq!(wait(&poller), [readable]);
        source.set(Some(Interest::NONE)).unwrap();
        assert_eq!(wait(&poller), []);
        source.set(Some(Interest { read: true, write: true })).unwrap();
        assert_eq!(wait(&poller), [Event { writable: true, ..readable }]);
        source.set(Some(Interest::NONE)).unwrap();
        drop(peer);
        assert!(wait(&poller)[0].hangup);
        source.set(None).unwrap();
        assert_eq!(wait(&poller), []);
    }

    #[test]
    fn what_is_posted_for_later_comes_once_and_later() {
        let poller = Poller::new().unwrap();
        let other = Key { token: 1, ..KEY };
        for _ in 0..3 {
            for key in [KEY, other, KEY] {
                poller.post_after(Duration::from_millis(20), key).unwrap();
            }
            assert_eq!(wait(&poller), []);
            let mut events = Vec::new();
            poller.wait(&mut events, Some(Duration::from_secs(10))).unwrap();
            assert_eq!(events, [Event::posted(KEY), Event::posted(other)]);
            assert_eq!(wait(&poller), []);
        }
    }

    #[test]
    fn a_source_that_is_dropped_is_gone_although_its_descriptor_has_a_duplicate() {
        let poller = Arc::new(Poller::new().unwrap());
        let (a, b) = stream_pair(true).unwrap();
        let mut duplicate = UnixStream::from(a.try_clone().unwrap());
        let mut source = Source::new(poller.clone(), a, KEY);
        source.set(Some(Interest::READ)).unwrap();
        UnixStream::from(b).write_all(b"x").unwrap();
        assert_eq!(wait(&poller).len(), 1);
        drop(source);
        assert_eq!(wait(&poller), []);
        duplicate.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn posted_keys_arrive_once_also_from_another_thread() {
        let poller = Arc::new(Poller::new().unwrap());
        let other = poller.clone();
        let thread = std::thread::spawn(move || {
            for _ in 0..3 {
                other.post(KEY).unwrap();
            }
        });
        thread.join().unwrap();
        let mut events = Vec::new();
        poller.wait(&mut events, None).unwrap();
        assert_eq!(events, [Event { key: KEY, readable: false, writable: false, hangup: false }]);
        assert_eq!(wait(&poller), []);
    }
}
