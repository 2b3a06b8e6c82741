//! The tests, each a user's or an operator's story.

mod login;

use crate::runner::Test;

pub fn all() -> Vec<Test> {
    let mut all = Vec::new();
    all.extend(login::TESTS);
    all
}
