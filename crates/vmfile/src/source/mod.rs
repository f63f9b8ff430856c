//! Where pages come from.

pub(crate) mod process;
pub(crate) mod stream;
