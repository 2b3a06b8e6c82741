//! Into what sizes measurements are sorted, and by which names.

/// Upper bounds in seconds: from a fork on bare metal to a guest that hardly moves.
pub(super) const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Of stages, some of which take microseconds.
pub(super) const STAGE_SECONDS: [f64; 12] =
    [0.00001, 0.000_025, 0.0001, 0.000_25, 0.001, 0.0025, 0.01, 0.025, 0.1, 0.25, 1.0, 10.0];

/// Of sessions: a command, a look, a working day, a week.
pub(super) const SESSION_SECONDS: [f64; 9] =
    [1.0, 10.0, 60.0, 600.0, 3600.0, 14_400.0, 43_200.0, 86_400.0, 604_800.0];

/// Of snapshots, in bytes.
pub(super) const BYTES: [f64; 9] = [
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    4_294_967_296.0,
    17_179_869_184.0,
];

/// What the stages of a fork, a resume and a save are called; a machine's process, which a guest may have
/// taken over, gives no other names to series.
pub(super) const STAGES: [&str; 21] = [
    "fork process",
    "enter the control group",
    "narrow the jail",
    "create VM",
    "map memory",
    "create vCPUs",
    "set KVM state",
    "restore devices",
    "start vCPUs",
    "check snapshot",
    "decode state",
    "put pages in place",
    "pause vCPUs",
    "drain devices",
    "take KVM state",
    "sync disk",
    "find pages",
    "write pages",
    "sync snapshot",
    "freeze the guest",
    "publish",
];
