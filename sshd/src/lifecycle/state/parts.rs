//! What the lifecycle's function speaks of: states, what happens, what is to be done.

/// Where the account's machine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Stopped,
    Starting,
    /// Its memory is on the disk.
    Saved,
    /// A machine is being made of what was saved.
    Resuming,
    Running,
    Lingering,
    Saving(Saving),
    Stopping(Stopping),
    Failed(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saving {
    pub cause: StopCause,
    /// The sessions are gone and the save has begun.
    pub under_way: bool,
    pub called_off: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopping {
    pub cause: StopCause,
    /// The fork is still under way: it has to come to an end before it can be stopped.
    pub starting: bool,
    /// The guest was given its time; now it is killed.
    pub killed: bool,
    /// A save is still under way, which has to come to its own end.
    pub saving: bool,
    /// Its process is gone.
    pub gone: bool,
    /// Its memory is on the disk.
    pub saved: bool,
    /// What was saved of its memory is dropped.
    pub dropped: bool,
}

impl Stopping {
    pub(super) fn for_cause(cause: StopCause) -> Self {
        let dropped = cause == StopCause::Reset;
        Self {
            cause,
            starting: false,
            killed: false,
            saving: false,
            gone: false,
            saved: false,
            dropped,
        }
    }
}

/// Why a machine is stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// Nobody is logged in and the linger is over.
    Idle,
    /// An operator asked for it.
    Admin,
    /// Its memory is to be dropped.
    Reset,
    /// The account was disabled or removed, or its time is over: in words for its user.
    Closed(String),
    /// The service stops.
    Shutdown,
    /// The service stops and can't wait for a save any longer: files are what counts now.
    OutOfTime,
    /// The machine ends by itself; its process is not gone yet.
    Died(String),
}

impl std::fmt::Display for StopCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            StopCause::Idle => "nobody is logged in",
            StopCause::Admin => "an operator stopped this machine",
            StopCause::Reset => "this machine is started anew from its disk",
            StopCause::Closed(words) => words,
            StopCause::Shutdown => "the service is stopping",
            StopCause::OutOfTime => "the service is stopping and has no time left",
            StopCause::Died(reason) => reason,
        })
    }
}

/// Whether the disk is being copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Copying {
    #[default]
    No,
    UnderWay,
    /// And nobody is logged in any more: when it is over the machine may rest.
    RestWaits,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody has authenticated and will probably want the machine in a moment.
    Expected,
    /// Somebody wants the machine.
    Login,
    /// Somebody who had been admitted is gone.
    Leave,
    /// The machine runs and has its account.
    Forked,
    StartFailed(String),
    /// The save has come to its end.
    SaveOver(SaveOutcome),
    /// The machine has ended, but its process still has the disk.
    Dying(String),
    /// The machine's process is gone.
    Ended(String),
    /// The timer that the last [`Effect::SetTimer`] started has run out.
    TimerOver,
    Stop(StopCause),
    /// What works in the machine, that [`Effect::Look`] asked for.
    Looked(Option<Work>),
    /// What an operator wants of an idle machine has changed.
    Reconsider,
    /// Somebody wants a copy of the disk.
    Copy,
    /// The copy that [`Effect::Copy`] asked for is there, or will not be.
    CopyOver,
}

/// What is being worked on in a machine, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// `make (pid 812)`
    pub who: String,
    /// `97 % CPU`
    pub how: String,
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {}", self.who, self.how)
    }
}

/// What keeps a machine awake that nobody is logged in to, after its linger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Awake {
    Work(Work),
    /// An operator's hold, until then (seconds since 1970).
    Held(i64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SaveOutcome {
    /// The snapshot is published; the machine is paused for good.
    Done,
    /// The machine runs on.
    CalledOff,
    /// The machine runs on, if it did not end.
    Failed(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write this to the database before going on.
    Record(Intent),
    /// Make a machine, of what was saved if there is something; `Forked` or `StartFailed` follows.
    Start,
    /// Save the machine; `SaveOver` follows.
    Save,
    /// The save is not wanted any more; `SaveOver` tells whether that came in time.
    CallOff,
    /// End the machine that was saved.
    Release,
    /// Drop what was saved of the machine's memory.
    Drop,
    /// Let in everybody who waits.
    Admit,
    /// Turn away everybody who waits.
    Refuse(String),
    /// Tell the sessions why the machine goes away under them.
    EndSessions(String),
    /// Ask the guest to power off.
    PowerOff,
    /// End the machine without the guest's help.
    Kill,
    SetTimer(Timer),
    CancelTimer,
    /// Whoever waits for the machine's end is answered.
    Gone,
    /// Find out what works in the machine; `Looked` follows. A look that is under way is given up.
    Look,
    /// The next shell is told what kept the machine awake.
    Greet(Awake),
    /// Copy the disk while the machine runs; `CopyOver` follows.
    Copy,
    /// The machine is about to go: give the copy up.
    CallOffCopy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    Linger,
    /// How long who has authenticated may take to come.
    Expected,
    /// How long sessions may take to leave, or a guest to power off.
    Grace,
    /// How long a killed machine may take to be gone.
    Kill,
    /// How long until it is looked again whether the machine has to stay awake.
    Recheck,
}

/// What the database says about the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    Stopped,
    Starting,
    Running,
    Saving,
    Saved,
    Resuming,
    Stopping,
}
