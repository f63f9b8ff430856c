//! Installs packages with apt, and finds their sources.

use std::env;
use std::error::Error;
use std::fs;
use std::process::Command;

use crate::command::{output, shown};

/// The keys of Debian's archives.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Returns the codename of the distribution, such as `bookworm`.
pub(crate) fn own_codename() -> Result<String, Box<dyn Error>> {
    let os_release = fs::read_to_string("/etc/os-release")?;
    Ok(codename(&os_release).ok_or("/etc/os-release has no VERSION_CODENAME")?)
}

/// Returns apt's package indexes: each line has a mirror, a codename and a component.
pub(crate) fn index_targets() -> Result<String, Box<dyn Error>> {
    output(
        Command::new("apt-get")
            .args(["indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)"])
            .arg("Created-By: Packages"),
    )
}

/// Finds the mirror that serves component `main` of `codename` among apt's index targets.
pub(crate) fn mirror_of(index_targets: &str, codename: &str) -> Option<String> {
    index_targets.lines().find_map(|line| match *line.split(' ').collect::<Vec<_>>() {
        [uri, name, "main"] if name == codename => Some(uri.to_owned()),
        _ => None,
    })
}

fn codename(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim_matches('"').to_owned())
}

/// Reads the major version of the candidate from what `apt-cache policy` prints.
pub(crate) fn candidate_major(policy: &str) -> Option<u32> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    let upstream = version.split_once(':').map_or(version, |(_epoch, upstream)| upstream);
    upstream.split('.').next()?.parse().ok()
}

/// Finds a program as a shell does, and also in `/usr/sbin` and `/sbin`.
pub(crate) fn find_in_path(program: &str) -> Option<std::path::PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Runs apt-get as root; without sudo, the error says what to run.
pub(crate) fn apt_get(arguments: &[&str]) -> Result<(), Box<dyn Error>> {
    let mut command = as_root("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    run_as_root(&mut command)
}

pub(crate) fn write_as_root(path: &str, text: &str) -> Result<(), Box<dyn Error>> {
    if is_root() {
        return Ok(fs::write(path, text)?);
    }
    let mut command = as_root("sh");
    command.args(["-c", "printf %s \"$1\" > \"$2\"", "sh", text, path]);
    run_as_root(&mut command)
}

fn run_as_root(command: &mut Command) -> Result<(), Box<dyn Error>> {
    if !is_root() && find_in_path("sudo").is_none() {
        return Err(format!("needs root; run this and try again:\n  {}", shown(command)).into());
    }
    crate::command::run(command)
}

fn as_root(program: &str) -> Command {
    if is_root() || find_in_path("sudo").is_none() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

fn is_root() -> bool {
    output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: &str = "\
http://mirror.example/security bookworm-security main
http://mirror.example/debian bookworm main
http://mirror.example/debian bookworm-updates main";

    #[test]
    fn the_mirror_of_backports_is_the_one_of_the_release() {
        assert_eq!(mirror_of(TARGETS, "bookworm").unwrap(), "http://mirror.example/debian");
        assert_eq!(mirror_of(TARGETS, "bookworm-backports"), None);
    }

    #[test]
    fn the_candidate_has_an_epoch_before_its_version() {
        let policy = "qemu-system-x86:\n  Installed: (none)\n  Candidate: 1:7.2+dfsg-7\n";
        assert_eq!(candidate_major(policy), Some(7));
        assert_eq!(candidate_major("  Candidate: (none)\n"), None);
    }

    #[test]
    fn the_codename_may_be_quoted() {
        assert_eq!(codename("ID=debian\nVERSION_CODENAME=\"trixie\"\n").unwrap(), "trixie");
    }
}
