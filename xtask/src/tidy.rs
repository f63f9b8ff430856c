//! stub
use crate::workspace::Workspace;
use std::error::Error;
pub(crate) fn run(_: &Workspace) -> Result<(), Box<dyn Error>> {
    Ok(())
}
