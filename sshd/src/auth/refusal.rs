use std::{io, net::IpAddr, path::PathBuf};

/// Why a key or a certificate is refused; for the log, never for the client.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("it is no key of an open account of that name")]
    Unknown,
    #[error("there is no open account of that name")]
    NoAccount,
    #[error("it may not be used from {0}")]
    Source(IpAddr),
    #[error("its time is over")]
    Expired,
    #[error("its time has not come")]
    Early,
    #[error("{0} is revoked")]
    Revoked(String),
    #[error("certificates are not accepted: ssh.user_ca_keys names no file")]
    NoAuthorities,
    #[error("it is signed by {0}, which is no authority here")]
    Authority(String),
    #[error("it is a host's certificate")]
    Host,
    #[error("it is signed with SHA-1")]
    Sha1,
    #[error("it is for {0}")]
    Principals(String),
    #[error("it has the critical option {0}, which is not known here")]
    Critical(String),
    #[error("its {0} can't be kept: {1}")]
    Value(&'static str, String),
    #[error("the key does not encode")]
    Encode,
    #[error("{path} could not be read: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {reason}", path = path.display())]
    Parse { path: PathBuf, reason: String },
    #[error("it could not be looked up: {0}")]
    LookUp(String),
}
