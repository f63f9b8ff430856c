//! Where pages come from.

pub(crate) mod process;
