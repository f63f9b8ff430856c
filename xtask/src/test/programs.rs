//! The test programs of the workspace: built once by cargo, then run one after the other.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::workspace::Workspace;

/// The directories of the packages whose integration tests run VMs.
const PACKAGES_WITH_VMS: [&str; 3] = ["cli", "testing", "qemu"];

/// How a test program is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It runs VMs, so its tests run one after the other.
    Vm,
    /// Its tests run at the same time.
    Other,
}

/// All test programs.
#[derive(Debug)]
pub(crate) struct TestPrograms {
    programs: Vec<TestProgram>,
}

/// One test program.
#[derive(Debug)]
pub(crate) struct TestProgram {
    /// The directory of the package and the target, such as `testing guests`.
    pub(crate) name: String,
    kind: Kind,
    executable: PathBuf,
    package_directory: PathBuf,
}

impl TestPrograms {
    /// Has cargo build all test programs and print their paths.
    pub(crate) fn build(workspace: &Workspace) -> Result<TestPrograms, Box<dyn Error>> {
        let output = Command::new(env!("CARGO"))
            .current_dir(workspace.root())
            .args(["test", "--quiet", "--workspace", "--no-run"])
            .args(["--message-format", "json-render-diagnostics"])
            .stderr(Stdio::inherit())
            .output()?;
        if !output.status.success() {
            return Err("the tests do not compile".into());
        }
        let mut programs = Vec::new();
        for line in String::from_utf8(output.stdout)?.lines() {
            programs.extend(TestProgram::from_message(&serde_json::from_str(line)?));
        }
        programs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(TestPrograms { programs })
    }

    /// Returns the names of all, each with whether it is of this kind.
    pub(crate) fn names(&self, kind: Kind) -> impl Iterator<Item = (String, bool)> {
        self.programs.iter().map(move |program| (program.name.clone(), program.kind == kind))
    }

    pub(crate) fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &TestProgram> {
        self.programs.iter().filter(move |program| program.kind == kind)
    }
}

impl TestProgram {
    /// Reads cargo's message about something it built; `None` if that is no test program.
    fn from_message(message: &Value) -> Option<TestProgram> {
        let executable = PathBuf::from(message.get("executable")?.as_str()?);
        if message.pointer("/profile/test")? != &Value::Bool(true) {
            return None;
        }
        let package_directory = Path::new(message.get("manifest_path")?.as_str()?).parent()?;
        let package = package_directory.file_name()?.to_string_lossy();
        let target = message.pointer("/target/name")?.as_str()?;
        let is_integration_test = message.pointer("/target/kind/0")?.as_str()? == "test";
        let is_vm = is_integration_test && PACKAGES_WITH_VMS.contains(&&*package);
        Some(TestProgram {
            name: format!("{package} {target}"),
            kind: if is_vm { Kind::Vm } else { Kind::Other },
            executable,
            package_directory: package_directory.to_path_buf(),
        })
    }

    /// Returns the command that runs the program as cargo does.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.executable);
        command.current_dir(&self.package_directory).arg("--show-output");
        command.env("CARGO_MANIFEST_DIR", &self.package_directory);
        if self.kind == Kind::Vm {
            command.arg("--test-threads=1");
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(directory: &str, kind: &str, target: &str, is_test: bool) -> Value {
        serde_json::json!({
            "reason": "compiler-artifact",
            "manifest_path": format!("/w/{directory}/Cargo.toml"),
            "target": { "name": target, "kind": [kind] },
            "profile": { "test": is_test },
            "executable": "/w/target/x",
        })
    }

    #[test]
    fn tests_with_vms_are_told_from_others() {
        let kind = |directory, kind, target| {
            TestProgram::from_message(&message(directory, kind, target, true)).map(|p| p.kind)
        };
        assert_eq!(kind("testing", "test", "guests"), Some(Kind::Vm));
        assert_eq!(kind("testing", "lib", "vmfile_testing"), Some(Kind::Other));
        assert_eq!(kind("crates/qemu", "test", "vm"), Some(Kind::Vm));
        assert_eq!(kind("crates/engine", "test", "ring"), Some(Kind::Other));
    }

    #[test]
    fn what_is_no_test_program_is_left_out() {
        assert!(TestProgram::from_message(&message("xtask", "bin", "xtask", false)).is_none());
        assert!(TestProgram::from_message(&serde_json::json!({ "reason": "x" })).is_none());
    }
}
