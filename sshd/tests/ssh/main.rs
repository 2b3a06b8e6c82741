//! The service over real SSH, with machines that are none: a fake fork server and fake machines
//! ([`processes`]) speak the real protocols and run programs on this host, so that everything between
//! an SSH client and a machine's sockets is tested without KVM. What needs a guest is tested in the
//! lab.

mod abuse;
mod algorithms;
mod certificates;
mod cgroups;
mod checkpoints;
mod copying;
mod ends;
mod endurance;
mod fake_agent;
mod fake_fork_server;
mod fake_forwarder;
mod fake_machine;
mod fake_security_key;
mod forwarding;
mod harness;
mod history;
mod inside;
mod invitations;
mod keeping;
mod key_options;
mod limits;
mod lobby;
mod login;
mod multiplexed;
mod openmetrics;
mod penalties;
mod process_limits;
mod processes;
mod quota;
mod raw;
mod service;
mod sizes;
mod sleep;
mod streams;
mod takeover;
mod terminals;
mod watching;
mod work;
