//! The tests, each a user's or an operator's story.

mod crash;
mod identity;
mod login;
mod pressure;
mod session;

use crate::runner::Test;

pub fn all() -> Vec<Test> {
    let mut all = Vec::new();
    all.extend(login::TESTS);
    all.extend(session::TESTS);
    all.extend(identity::TESTS);
    all.extend(pressure::TESTS);
    all.extend(crash::TESTS);
    all
}
