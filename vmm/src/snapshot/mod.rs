//! Diff snapshots (`docs/formats/diff.md`): a paused machine's difference to its base, saved and put
//! back exactly.
//!
//! Nothing is recorded while a machine runs: its memory is a private mapping of the base's, so the pages
//! that are its own are those that differ ([`pagemap`]). Of these, pages that are equal to the base's all
//! the same are left out, and zero pages have no data ([`save`]). A resumed machine maps what it is told from
//! the file over the base ([`resume`]); those pages are the file's until they are written, so the next
//! save adds them to what the kernel names ([`plan`]).

pub(crate) mod pagemap;
mod plan;
mod resume;
mod save;

pub use resume::{From, Resume, ResumeError, load};
pub use save::{Origin, SaveError, SaveRequest, Saved, save};
