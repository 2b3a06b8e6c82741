//! The commands as an operator gives them: the real program, a state directory of its own, no KVM.

mod accounts;
mod bases;
mod database;
mod host;
mod hostkey;
mod idle;
mod machines;
mod provisioning;
mod service;
mod shapes;
