//! Calls that are allowed, but not with every argument.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp, SeccompCondition, SeccompRule,
};

// asm-generic/fcntl.h and ioctls of sockets; libc does not name them for this target.
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;
const FIOSETOWN: i32 = 0x8901;
const SIOCSPGRP: i32 = 0x8902;

pub fn filter() -> Result<BpfProgram, String> {
    let is = |argument, value: i32| rule(&[(argument, SeccompCmpOp::Eq, value)]);
    let exec = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    let exec = || rule(&[(2, exec.clone(), libc::PROT_EXEC)]);
    let rules: BTreeMap<libc::c_long, Vec<SeccompRule>> = [
        // The owner of a descriptor gets signals from the kernel.
        (libc::SYS_fcntl, vec![is(1, libc::F_SETOWN)?, is(1, F_SETOWN_EX)?, is(1, F_SETSIG)?]),
        (libc::SYS_ioctl, vec![is(1, FIOSETOWN)?, is(1, SIOCSPGRP)?]),
        // No new code.
        (libc::SYS_mmap, vec![exec()?]),
        (libc::SYS_mprotect, vec![exec()?]),
        // Names of threads, and what goes before a filter.
        (
            libc::SYS_prctl,
            vec![rule(&[
                (0, SeccompCmpOp::Ne, libc::PR_SET_NAME),
                (0, SeccompCmpOp::Ne, libc::PR_SET_NO_NEW_PRIVS),
            ])?],
        ),
    ]
    .into();
    super::build(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

/// All of these.
fn rule(conditions: &[(u8, SeccompCmpOp, i32)]) -> Result<SeccompRule, String> {
    let condition = |(argument, operator, value): &(u8, SeccompCmpOp, i32)| {
        SeccompCondition::new(*argument, Dword, operator.clone(), *value as u64)
    };
    let conditions = conditions.iter().map(condition).collect::<Result<_, _>>();
    conditions.and_then(SeccompRule::new).map_err(|e| e.to_string())
}
