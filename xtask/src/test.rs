//! stub
use crate::workspace::Workspace;
use std::error::Error;
pub(crate) fn step_names() -> String {
    String::new()
}
pub(crate) fn run(_: &Workspace, _: &[String]) -> Result<(), Box<dyn Error>> {
    Ok(())
}
