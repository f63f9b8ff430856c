//! The directories of this repository.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::output;

/// The root of the repository and its build directory.
#[derive(Debug, Clone)]
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// Finds the repository that this program was built from.
    pub(crate) fn find() -> Workspace {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = here.parent().unwrap_or(here).to_path_buf();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(target) => root.join(target),
            None => root.join("target"),
        };
        Workspace { root, target }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Returns the commit that is here, and in which of these directories something has changed since.
    pub(crate) fn commit(&self, directories: &[&str]) -> Result<String, Box<dyn Error>> {
        let git = |words: &[&str]| output(Command::new("git").current_dir(&self.root).args(words));
        let mut text = git(&["rev-parse", "--short=12", "HEAD"])?.trim().to_owned();
        for directory in directories {
            if !git(&["status", "--porcelain", "--", directory])?.is_empty() {
                text += &format!(", with changes in {directory}/");
            }
        }
        Ok(text)
    }
}
