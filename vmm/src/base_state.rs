//! What a base's `state.bin` holds: everything of the machine but memory and disk, and what is known about
//! the forks to come.

use serde::{Deserialize, Serialize};

use crate::{
    machine::{MachineError, MachineState, decode_whole},
    working_set::WorkingSet,
};

#[derive(Serialize, Deserialize)]
pub struct BaseState {
    pub machine: MachineState,
    pub working_set: WorkingSet,
}

impl BaseState {
    /// Bytes that were checked for being what was written; this checks that they make sense. The working
    /// set has to be checked against the memory ([`WorkingSet::check`]).
    pub fn decode(bytes: &[u8]) -> Result<Self, MachineError> {
        decode_whole(bytes)
    }
}
