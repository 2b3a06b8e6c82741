//! How long the steps of making or saving a machine took, for whoever asks why it was slow.

use std::time::Instant;

use hermitage_vmm_proto::Stage;

pub struct Stages {
    last: Instant,
    pub list: Vec<Stage>,
}

impl Stages {
    pub fn since(start: Instant) -> Self {
        Self { last: start, list: Vec::with_capacity(16) }
    }

    pub fn done(&mut self, name: &str) {
        self.done_at(name, Instant::now());
    }

    pub fn done_at(&mut self, name: &str, at: Instant) {
        let nanoseconds = u64::try_from((at - self.last).as_nanos()).unwrap_or(u64::MAX);
        self.list.push(Stage { name: name.to_owned(), nanoseconds });
        self.last = at;
    }
}
