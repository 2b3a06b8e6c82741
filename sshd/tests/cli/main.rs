//! The commands as an operator gives them: the real program, a state directory of its own, no KVM.

mod accounts;
mod archives;
mod backups;
mod bases;
mod checkpoints;
mod database;
mod doctor;
mod host;
mod hostkey;
mod idle;
mod killed;
mod machines;
mod manual;
mod processes;
mod provisioning;
mod quota;
mod service;
mod shapes;
mod sizes;
mod top;
mod watching;
