//! The tests, each a user's or an operator's story.

mod clients;
mod crash;
mod editor;
mod faults;
mod fidelity;
mod files;
mod fork;
mod forwarding;
mod free_memory;
mod guide;
mod identity;
mod inside;
mod jail;
mod keeping;
mod keys;
mod limits;
mod login;
mod machine;
mod malformed;
mod operator;
mod other_clients;
mod pressure;
mod processes;
mod resume;
mod session;
mod sharing;
mod sizes;
mod sleep;
mod space;
mod terminals;
mod work;

use crate::runner::Test;

pub fn all() -> Vec<Test> {
    let mut all = Vec::new();
    all.extend(login::TESTS);
    all.extend(session::TESTS);
    all.extend(identity::TESTS);
    all.extend(jail::TESTS);
    all.extend(machine::TESTS);
    all.extend(files::TESTS);
    all.extend(operator::TESTS);
    all.extend(guide::TESTS);
    all.extend(pressure::TESTS);
    all.extend(crash::TESTS);
    all.extend(fork::TESTS);
    all.extend(resume::TESTS);
    all.extend(malformed::TESTS);
    all.extend(space::TESTS);
    all.extend(terminals::TESTS);
    all.extend(sleep::TESTS);
    all.extend(forwarding::TESTS);
    all.extend(work::TESTS);
    all.extend(fidelity::TESTS);
    all.extend(faults::TESTS);
    all.extend(free_memory::TESTS);
    all.extend(clients::TESTS);
    all.extend(other_clients::TESTS);
    all.extend(editor::TESTS);
    all.extend(keys::TESTS);
    all.extend(keeping::TESTS);
    all.extend(inside::TESTS);
    all.extend(limits::TESTS);
    all.extend(sharing::TESTS);
    all.extend(sizes::TESTS);
    all.extend(processes::TESTS);
    all
}
