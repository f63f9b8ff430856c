//! Fetches QEMUs of other versions than the installed one, for the tests.
//!
//! Each comes from a suite of Debian, with every package that it depends on down to the C library,
//! and is unpacked into `target/qemu/SUITE`. Nothing is installed: apt uses a state of its own in
//! which no package is installed. To fetch a QEMU anew, remove its directory.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{KEYRING, apt_get, find_in_path, index_targets, mirror_of, own_codename};
use crate::command::{output, run, say};
use crate::workspace::Workspace;

/// A QEMU to fetch: the suite of Debian that has it, and what it is for.
#[derive(Debug)]
struct Fetched {
    suite: &'static str,
    why: &'static str,
}

/// The tests name the suites too: `Release` in `testing/src/qemu.rs`.
const FETCHED: [Fetched; 2] = [
    Fetched { suite: "bookworm", why: "7.2, the oldest that the tests run" },
    Fetched { suite: "sid", why: "the newest that Debian has" },
];

const PACKAGE: &str = "qemu-system-x86";

const ARCHITECTURE: &str = "amd64";

/// Where the libraries are in an unpacked tree. Debian 12 has some in `lib`, later releases have
/// none there.
const LIBRARY_DIRECTORIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// The file name of the loader. The link to it in `lib64` is absolute and leads to the system's
/// loader.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// The one that is installed.
const PACKAGE_PROGRAM: &str = "qemu-system-x86_64";

const PROGRAM: &str = "usr/bin/qemu-system-x86_64";

/// Fetches the QEMUs that are missing or do not run.
pub(crate) fn fetch(workspace: &Workspace) -> Result<(), Box<dyn Error>> {
    let directory = workspace.target().join("qemu");
    let missing: Vec<&Fetched> = FETCHED
        .iter()
        // The loader's path is in the program, so one whose directory was moved does not run.
        .filter(|qemu| qemu_version(&directory.join(qemu.suite).join(PROGRAM)).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !is_debian() {
        say("no QEMUs of other versions, whose tests will be skipped: not on Debian");
        return Ok(());
    }
    let mirror = mirror()?;
    for qemu in missing {
        let suite = qemu.suite;
        say(&format!("fetch QEMU of Debian {suite}, not installed here: {}", qemu.why));
        let version = fetch_one(&directory, suite, &mirror).map_err(|error| {
            format!(
                "QEMU of Debian {suite} from {mirror}: {error}\n  \
                 once the mirror answers, `cargo xtask setup` goes on from here"
            )
        })?;
        say(&format!("unpacked QEMU {version} into {}", directory.join(suite).display()));
    }
    Ok(())
}

fn is_debian() -> bool {
    let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    os_release.lines().any(|line| line == "ID=debian") && find_in_path("apt-get").is_some()
}

/// Returns the mirror that the system itself uses.
fn mirror() -> Result<String, Box<dyn Error>> {
    let codename = own_codename()?;
    if let Some(mirror) = mirror_of(&index_targets()?, &codename) {
        return Ok(mirror);
    }
    // apt knows the codenames of its sources only after it has fetched their lists.
    apt_get(&["update", "-qq"])?;
    let mirror = mirror_of(&index_targets()?, &codename);
    Ok(mirror.ok_or_else(|| format!("apt has no source for {codename} main to find QEMUs by"))?)
}

/// Fetches one QEMU and returns its version.
fn fetch_one(directory: &Path, suite: &str, mirror: &str) -> Result<String, Box<dyn Error>> {
    let tree = directory.join(suite);
    let aside = directory.join(format!("{suite}.part"));
    for old in [&tree, &aside] {
        if old.exists() {
            fs::remove_dir_all(old)?;
        }
    }
    let part = aside.join("tree");
    fs::create_dir_all(&part)?;
    let apt = PrivateApt::new(&aside.join("apt"), suite, mirror)?;
    for archive in apt.download(PACKAGE)? {
        run(Command::new("dpkg-deb").arg("-x").args([&archive, &part]))?;
    }
    use_own_libraries(&part, &tree)?;
    fs::rename(&part, &tree)?;
    fs::remove_dir_all(&aside)?;
    let program = tree.join(PROGRAM);
    let trace = output(Command::new(&program).env("LD_TRACE_LOADED_OBJECTS", "1"))?;
    if let Some(library) = library_from_outside(&trace, &tree) {
        // Otherwise the next run would take the tree for complete.
        fs::remove_dir_all(&tree)?;
        return Err(format!("it would load {library}, which is not in its directory").into());
    }
    let version = qemu_version(&program);
    Ok(version.ok_or_else(|| format!("{} does not run", program.display()))?)
}

/// Makes the program in `part` run with the loader and the libraries that will lie in `tree`.
///
/// With a script that starts the loader, the process would run the loader's program instead of
/// QEMU's, unlike that of an installed QEMU.
fn use_own_libraries(part: &Path, tree: &Path) -> Result<(), Box<dyn Error>> {
    let directory = LIBRARY_DIRECTORIES
        .iter()
        .find(|directory| part.join(directory).join(LOADER).is_file())
        .ok_or("its packages have no loader")?;
    let origins = LIBRARY_DIRECTORIES.map(|directory| format!("$ORIGIN/../../{directory}"));
    run(Command::new("patchelf")
        .arg("--set-interpreter")
        .arg(tree.join(directory).join(LOADER))
        // Not a run path, which does not apply to what the libraries themselves load.
        .args(["--force-rpath", "--set-rpath", &origins.join(":")])
        .arg(part.join(PROGRAM)))
}

/// Finds a library that is missing or not in `tree` among what the loader lists.
fn library_from_outside(trace: &str, tree: &Path) -> Option<String> {
    // The kernel's library is not a file: `linux-vdso.so.1 (0x7fff...)`.
    trace.lines().find_map(|line| {
        let (name, place) = line.trim().split_once(" => ")?;
        let path = place.split(" (").next().unwrap_or(place);
        (!Path::new(path).starts_with(tree)).then(|| format!("{name} from {path}"))
    })
}

/// An apt that knows one suite and believes that nothing is installed.
struct PrivateApt {
    directory: PathBuf,
}

impl PrivateApt {
    fn new(directory: &Path, suite: &str, mirror: &str) -> Result<PrivateApt, Box<dyn Error>> {
        for below in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(directory.join(below))?;
        }
        fs::write(directory.join("status"), "")?;
        let options = format!("arch={ARCHITECTURE} signed-by={KEYRING}");
        let source = format!("deb [{options}] {mirror} {suite} main\n");
        fs::write(directory.join("sources.list"), source)?;
        Ok(PrivateApt { directory: directory.to_path_buf() })
    }

    /// Downloads `package` and all that it depends on, and returns the archives.
    fn download(&self, package: &str) -> Result<Vec<PathBuf>, Box<dyn Error>> {
        // With this option, lists that cannot be fetched are an error and not only a warning.
        run(self.apt_get().args(["-o", "APT::Update::Error-Mode=any", "update"]))?;
        let how = ["install", "--yes", "--download-only", "--no-install-recommends"];
        // Hides the output: apt-get lists what it would install even with `-qq`.
        output(self.apt_get().args(how).arg(package))?;
        let mut archives: Vec<PathBuf> = fs::read_dir(self.directory.join("archives"))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .collect();
        archives.sort();
        Ok(archives)
    }

    /// Returns a command that keeps apt's settings, such as a proxy, but not its sources, its
    /// preferences and its state.
    fn apt_get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").arg("-qq");
        let mut set = |name: &str, value: &str| {
            command.args(["-o", &format!("{name}={value}")]);
        };
        let here = self.directory.display().to_string();
        set("Dir::State", &here);
        set("Dir::State::status", &format!("{here}/status"));
        set("Dir::Cache", &here);
        set("Dir::Etc::sourcelist", &format!("{here}/sources.list"));
        for none in ["sourceparts", "preferences", "preferencesparts"] {
            set(&format!("Dir::Etc::{none}"), "-");
        }
        set("APT::Architecture", ARCHITECTURE);
        // Downloads as root: apt's own user may have no access to the directory.
        set("APT::Sandbox::User", "root");
        command
    }
}

/// Returns the versions of the QEMUs that the tests have, from the oldest to the newest.
pub(crate) fn versions(workspace: &Workspace) -> Vec<String> {
    let fetched =
        FETCHED.map(|qemu| workspace.target().join("qemu").join(qemu.suite).join(PROGRAM));
    let programs = std::iter::once(PathBuf::from(PACKAGE_PROGRAM)).chain(fetched);
    let mut versions: Vec<String> = programs.filter_map(|path| qemu_version(&path)).collect();
    let numbers = |version: &str| -> Vec<u32> {
        version.split('.').map(|number| number.parse().unwrap_or_default()).collect()
    };
    versions.sort_by_key(|version| numbers(version));
    versions
}

/// Returns the version that a QEMU program says it has, such as `10.0.2`, if it runs.
pub(crate) fn qemu_version(program: &Path) -> Option<String> {
    let text = output(Command::new(program).arg("--version")).ok()?;
    let version = text.strip_prefix("QEMU emulator version ")?;
    Some(version.split([' ', '\n']).next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_from_outside_is_found() {
        let tree = Path::new("/tree");
        let own = "\tlinux-vdso.so.1 (0x7f00)\n\tliba.so.1 => /tree/usr/lib/liba.so.1 (0x7f01)\n";
        assert_eq!(library_from_outside(own, tree), None);
        let system = format!("{own}\tlibb.so.2 => /lib/libb.so.2 (0x7f02)\n");
        assert_eq!(library_from_outside(&system, tree).unwrap(), "libb.so.2 from /lib/libb.so.2");
        let missing = format!("{own}\tlibc.so.3 => not found\n");
        assert_eq!(library_from_outside(&missing, tree).unwrap(), "libc.so.3 from not found");
    }
}
