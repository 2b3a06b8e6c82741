//! KVM on a host that has just booted: its module is loaded beside the services that start then, so there may be no
//! `/dev/kvm` yet, or one that says that nothing is behind it.

use std::{fs, thread::sleep, time::Duration};

use kvm_ioctls::Kvm;

use super::{KvmError, open};

/// Since the host's boot. Later what is not there is not there.
const BOOT: Duration = Duration::from_secs(120);

const PAUSE: Duration = Duration::from_millis(200);

/// As [`open`], but waits for KVM while the host boots.
pub fn open_on_boot() -> Result<Kvm, KvmError> {
    patiently(open, || {
        let boots = uptime().is_some_and(|time| time < BOOT);
        if boots {
            sleep(PAUSE);
        }
        boots
    })
}

/// `wait` says whether it is worth trying again, a moment later.
fn patiently<T>(
    mut open: impl FnMut() -> Result<T, KvmError>,
    mut wait: impl FnMut() -> bool,
) -> Result<T, KvmError> {
    loop {
        match open() {
            Err(KvmError::Ioctl { source, .. }) if is_absent(source.errno()) && wait() => {}
            outcome => return outcome,
        }
    }
}

fn is_absent(errno: i32) -> bool {
    matches!(errno, libc::ENOENT | libc::ENODEV | libc::ENXIO)
}

/// proc_uptime(5).
fn uptime() -> Option<Duration> {
    let text = fs::read_to_string("/proc/uptime").ok()?;
    let seconds = text.split_ascii_whitespace().next()?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(errno: i32) -> KvmError {
        KvmError::Ioctl { call: "open /dev/kvm", source: kvm_ioctls::Error::new(errno) }
    }

    #[test]
    fn what_is_not_there_yet_is_waited_for() {
        let mut errors = vec![libc::ENODEV, libc::ENXIO, libc::ENOENT];
        let opened = patiently(|| errors.pop().map_or(Ok(7), |errno| Err(fails(errno))), || true);
        assert!(matches!(opened, Ok(7)) && errors.is_empty());
    }

    #[test]
    fn what_is_refused_or_never_comes_is_not() {
        let refused = patiently(|| Err::<(), _>(fails(libc::EACCES)), || panic!("it waits"));
        assert!(matches!(refused, Err(KvmError::Ioctl { .. })));
        let mut times = 3;
        let never = patiently(
            || Err::<(), _>(fails(libc::ENOENT)),
            || {
                times -= 1;
                times > 0
            },
        );
        assert!(never.is_err());
        assert!(uptime().unwrap() > Duration::ZERO);
    }
}
