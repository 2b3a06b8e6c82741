//! What a base's `state.bin` holds: everything of the machine but memory and disk, and what is known about
//! the forks to come.

use serde::{Deserialize, Serialize};

use crate::{
    machine::{MachineError, MachineState},
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
        let (state, rest) =
            postcard::take_from_bytes::<Self>(bytes).map_err(MachineError::Decode)?;
        if !rest.is_empty() {
            return Err(MachineError::Leftover(rest.len()));
        }
        Ok(state)
    }
}
