//! Why a machine that runs was not copied, for an operator and for its user.

/// Displayed, it is for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoCopy {
    #[error("the machine was put to rest or stopped meanwhile; try again")]
    PutToRest,
    #[error("the machine has ended: {0}")]
    Ended(String),
    #[error("nobody wants it any more")]
    Unwanted,
    #[error("{0} others wait for a copy of it already")]
    Queue(usize),
    #[error("the service is being stopped")]
    Stopping,
    #[error("the host's disk is nearly full")]
    Scarce,
    #[error("nothing was copied for {0} s; look at the host's disk, or give --stop")]
    Stalled(u64),
    #[error(
        "its agent has not gone on since the last time it was to stand still; stop the machine, or give --stop"
    )]
    Standing,
    /// Of the guest, or of how long it took.
    #[error("{0}")]
    Guest(String),
    #[error("{what} can't be copied: {reason}")]
    Part {
        what: Part,
        reason: String,
        /// There is less room on the host than copies may take.
        tight: bool,
    },
    /// Before there was anything to be copied.
    #[error("{0}")]
    Host(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Disk,
    Memory,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::Disk => "its disk",
            Part::Memory => "its memory",
        })
    }
}

impl NoCopy {
    /// What concerns her, or what she can do something about; nothing else of the host.
    pub fn for_user(&self) -> String {
        match self {
            NoCopy::PutToRest => "it was put to rest or ended meanwhile; try again".into(),
            NoCopy::Ended(_) => "it has ended meanwhile; try again".into(),
            NoCopy::Queue(_) => "others wait for a copy of it already; try again later".into(),
            NoCopy::Unwanted | NoCopy::Stopping | NoCopy::Guest(_) => self.to_string(),
            NoCopy::Scarce => "the host's disk is nearly full; try again later".into(),
            NoCopy::Part { tight: true, .. } => {
                "the host's disk has no room for a copy; try again later".into()
            }
            NoCopy::Stalled(_) => "the host's disk takes too long; try again later".into(),
            NoCopy::Standing => {
                "it has not gone on since the last time it was to stand still; leave it, and try again".into()
            }
            NoCopy::Part { .. } | NoCopy::Host(_) => {
                "the host could not do it; its operator finds the reason in the log".into()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_learns_what_concerns_her_and_nothing_of_the_host() {
        let secret = || "/var/lib/x: No space left on device".to_owned();
        let part = |what, tight| NoCopy::Part { what, reason: secret(), tight };
        for (why, words) in [
            (NoCopy::PutToRest, "put to rest or ended"),
            (NoCopy::Ended(secret()), "has ended"),
            (NoCopy::Queue(16), "others wait"),
            (NoCopy::Stopping, "being stopped"),
            (NoCopy::Scarce, "nearly full"),
            (NoCopy::Stalled(600), "too long"),
            (NoCopy::Standing, "stand still"),
            (NoCopy::Guest("its disk does not answer".into()), "its disk does not answer"),
            (part(Part::Memory, true), "no room for a copy"),
            (part(Part::Disk, true), "no room for a copy"),
            (part(Part::Disk, false), "its operator"),
            (NoCopy::Host(secret()), "its operator"),
        ] {
            let told = why.for_user();
            assert!(told.contains(words), "{why:?}: {told}");
            assert!(!told.contains("/var") && !told.contains("--stop"), "{why:?}: {told}");
        }
    }

    #[test]
    fn an_operator_learns_which_part_it_was_and_why() {
        let part = |what| NoCopy::Part { what, reason: "i/o error".into(), tight: false };
        assert_eq!(part(Part::Memory).to_string(), "its memory can't be copied: i/o error");
        assert_eq!(part(Part::Disk).to_string(), "its disk can't be copied: i/o error");
    }
}
