//! What `/proc` tells about processes and their sockets.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest command line that is read, in bytes: Linux starts a process with at most three
/// quarters of an 8 MiB stack.
const COMMAND_LINE_LEN_MAX: u64 = 6 << 20;

/// How many ticks the kernel counts in a second in `/proc`.
const TICKS_PER_SECOND: u64 = 100;

/// Returns the ids of all processes that this one can see.
pub(crate) fn pids() -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        pids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    pids.sort_unstable();
    Ok(pids)
}

/// Returns the command line of a process, its own name first.
pub(crate) fn arguments(pid: u32) -> io::Result<Vec<OsString>> {
    let mut bytes = Vec::new();
    let file = fs::File::open(format!("/proc/{pid}/cmdline"))?;
    file.take(COMMAND_LINE_LEN_MAX).read_to_end(&mut bytes)?;
    Ok(split_arguments(&bytes))
}

/// Returns the program that a process runs, also after the file was replaced by a newer one.
pub(crate) fn executable(pid: u32) -> io::Result<PathBuf> {
    let path = fs::read_link(format!("/proc/{pid}/exe"))?.into_os_string().into_vec();
    let stripped = path.strip_suffix(b" (deleted)").unwrap_or(&path);
    Ok(PathBuf::from(OsStr::from_bytes(stripped)))
}

/// Returns the user whose rights a process has: the effective one.
pub(crate) fn user(pid: u32) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let effective = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    effective.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Returns the directory to which a process's relative names refer: its current one.
///
/// A QEMU that was started with `-daemonize` has left its directory for `/` (7.2 to 11.1). For such
/// a process this is the directory that its shell named in the environment.
pub(crate) fn working_directory(pid: u32) -> io::Result<PathBuf> {
    let directory = current_directory(pid)?;
    let is_daemon = || {
        let arguments = arguments(pid).unwrap_or_default();
        arguments.iter().any(|word| word == "-daemonize" || word == "--daemonize")
    };
    if directory != Path::new("/") || !is_daemon() {
        return Ok(directory);
    }
    let left = environment_of(pid, "PWD").map(PathBuf::from);
    Ok(left.filter(|left| left.is_absolute() && left.is_dir()).unwrap_or(directory))
}

/// Returns a process's current directory, by its last name if it was removed.
pub(crate) fn current_directory(pid: u32) -> io::Result<PathBuf> {
    let directory = fs::read_link(format!("/proc/{pid}/cwd"))?;
    if !is_removed(pid, "cwd") {
        return Ok(directory);
    }
    let name = directory.into_os_string().into_vec();
    let stripped = name.strip_suffix(b" (deleted)").unwrap_or(&name);
    Ok(PathBuf::from(OsStr::from_bytes(stripped)))
}

/// Tells whether what `/proc/PID` calls `cwd` or `exe` has no name any more.
pub(crate) fn is_removed(pid: u32, what: &str) -> bool {
    fs::metadata(format!("/proc/{pid}/{what}")).is_ok_and(|found| found.nlink() == 0)
}

/// Returns a variable of the environment with which a process was started.
fn environment_of(pid: u32, name: &str) -> Option<OsString> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let value = environment
        .split(|&byte| byte == 0)
        .find_map(|variable| variable.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
    Some(OsStr::from_bytes(value).to_owned())
}

/// Returns when a process was started. The kernel says when it booted in whole seconds only, so
/// that this may be up to a second too early.
pub(crate) fn started(pid: u32) -> Option<SystemTime> {
    let ticks = started_at_ticks(pid).ok()?;
    let since_boot = Duration::from_millis(ticks.checked_mul(1000 / TICKS_PER_SECOND)?);
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let boot = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(boot))?.checked_add(since_boot)
}

/// Tells whether a process that has another name than QEMU's was started like a QEMU that serves
/// its monitor on `socket`.
pub(crate) fn is_started_as_monitor(pid: u32, socket: &Path) -> bool {
    let Ok(arguments) = arguments(pid) else { return false };
    let is_option = |word: &OsString| {
        let name = word.as_bytes().strip_prefix(b"-").unwrap_or_default();
        let name = name.strip_prefix(b"-").unwrap_or(name);
        matches!(name, b"qmp" | b"qmp-pretty" | b"chardev")
    };
    let names = |bound: &PathBuf| {
        let bound = bound.as_os_str().as_bytes();
        let is_in =
            |word: &OsString| word.as_bytes().windows(bound.len().max(1)).any(|part| part == bound);
        arguments.windows(2).any(|pair| is_option(&pair[0]) && is_in(&pair[1]))
    };
    listening_sockets(pid).is_ok_and(|held| {
        held.values().any(|bound| is_same_socket(pid, bound, socket) && names(bound))
    })
}

/// Returns what `/proc/PID/stat` says of a process from field 3 on, its state. The name of the
/// program stands before that in parentheses, and may contain some itself.
fn stat(pid: u32) -> io::Result<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = stat.rsplit_once(") ").map(|(_, rest)| rest.to_owned());
    rest.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Returns the parent of a process; `None` if it has none, or if `/proc` does not tell.
pub(crate) fn parent(pid: u32) -> Option<u32> {
    stat(pid).ok()?.split(' ').nth(1)?.parse().ok().filter(|&parent| parent > 0)
}

/// Returns when a process was started, in the kernel's ticks since the boot.
pub(crate) fn started_at_ticks(pid: u32) -> io::Result<u64> {
    let ticks = stat(pid)?.split(' ').nth(19).and_then(|ticks| ticks.parse().ok());
    ticks.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Names the boot of this host and the process namespace of this process.
pub(crate) fn namespace() -> io::Result<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let namespace = fs::read_link("/proc/self/ns/pid")?;
    Ok(format!("{} of boot {}", namespace.display(), boot.trim()))
}

/// Tells whether a process is stopped, by SIGSTOP or a debugger.
#[must_use]
pub fn is_process_stopped(pid: u32) -> bool {
    let state = stat(pid).ok().and_then(|stat| stat.chars().next());
    matches!(state, Some('T' | 't'))
}

/// Tells whether a process runs QEMU, by the name of its program.
///
/// Another user's process does not show its program, but it does show its command line.
pub(crate) fn is_qemu(pid: u32) -> bool {
    let program = executable(pid).ok().or_else(|| {
        let arguments = arguments(pid).ok()?;
        arguments.first().map(PathBuf::from)
    });
    program.as_deref().and_then(Path::file_name).is_some_and(is_qemu_name)
}

/// Tells whether a program of this name emulates a whole machine.
///
/// Distributions call it `qemu-system-ARCH`, `qemu-kvm` or `kvm`; a wrapped one starts with a dot.
/// `qemu-img`, `qemu-nbd` and `qemu-storage-daemon` are none.
pub(crate) fn is_qemu_name(name: &OsStr) -> bool {
    let name = name.as_bytes();
    let name = name.strip_prefix(b".").unwrap_or(name);
    name.starts_with(b"qemu-system-") || matches!(name, b"qemu-kvm" | b"kvm" | b"qemu")
}

/// Returns the paths of the listening Unix sockets that `pid` holds, by descriptor number.
pub(crate) fn listening_sockets(pid: u32) -> io::Result<HashMap<u32, PathBuf>> {
    let listening = parse_listening(&fs::read_to_string(format!("/proc/{pid}/net/unix"))?);
    let mut sockets = HashMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // A descriptor may be closed meanwhile.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let path = socket_inode(&target).and_then(|inode| listening.get(&inode));
        if let (Some(number), Some(path)) = (number, path) {
            sockets.insert(number, path.clone());
        }
    }
    Ok(sockets)
}

/// Returns the paths of all Unix sockets in this network namespace that a process listens on, as
/// they were bound.
pub(crate) fn listening_paths() -> io::Result<HashSet<PathBuf>> {
    Ok(parse_listening(&fs::read_to_string("/proc/self/net/unix")?).into_values().collect())
}

/// Returns the path by which this process finds what process `pid` calls `path`.
///
/// A process in a container or with another root directory calls other files by the same names:
/// they are found in its own root directory, as far as this process may look there.
pub(crate) fn path_for_us(pid: u32, path: &Path) -> PathBuf {
    let theirs = |base: &str, path: &Path| Path::new(&format!("/proc/{pid}/{base}")).join(path);
    let has_our_files = has_our_mounts(pid) && is_same_directory(&theirs("root", "".as_ref()), "/");
    match (has_our_files, path.strip_prefix("/")) {
        (true, _) => working_directory(pid).unwrap_or_default().join(path),
        (false, Err(_)) => theirs("cwd", path),
        (false, Ok(below)) => {
            let inside = theirs("root", below);
            // A QEMU that has changed its root directory made its sockets before that.
            if has_our_mounts(pid) && !inside.exists() { path.to_owned() } else { inside }
        }
    }
}

/// Tells whether a process is in this process's mount namespace; `true` if `/proc` does not tell.
fn has_our_mounts(pid: u32) -> bool {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt"));
    match (namespace(&pid.to_string()), namespace("self")) {
        (Ok(theirs), Ok(ours)) => theirs == ours,
        _ => true,
    }
}

/// Tells whether both paths are one directory; `true` if one of them cannot be examined.
fn is_same_directory(one: &Path, other: impl AsRef<Path>) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => true,
    }
}

/// Tells whether `bound`, as process `pid` sees it, is the file `path` as this process sees it.
pub(crate) fn is_same_socket(pid: u32, bound: &Path, path: &Path) -> bool {
    let theirs = match bound.strip_prefix("/") {
        Ok(below) => Path::new(&format!("/proc/{pid}/root")).join(below),
        Err(_) => path_for_us(pid, bound),
    };
    match (fs::metadata(theirs), fs::metadata(path)) {
        (Ok(theirs), Ok(ours)) => theirs.dev() == ours.dev() && theirs.ino() == ours.ino(),
        _ => false,
    }
}

fn split_arguments(bytes: &[u8]) -> Vec<OsString> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes.split(|&byte| byte == 0).map(|argument| OsString::from_vec(argument.to_vec())).collect()
}

fn socket_inode(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Reads the table of Unix sockets: number, reference count, protocol, flags, type, state, inode,
/// path. Flag 0x10000 means that a process listens (`__SO_ACCEPTCON`).
fn parse_listening(table: &str) -> HashMap<u64, PathBuf> {
    const FLAG_LISTENS: u32 = 0x1_0000;
    let mut sockets = HashMap::new();
    for line in table.lines().skip(1) {
        // The path is the rest of the line and may hold spaces; before it, columns are padded.
        let mut rest = line;
        let mut next = || {
            let (word, after) =
                rest.trim_start().split_once(' ').unwrap_or((rest.trim_start(), ""));
            rest = after;
            word
        };
        let columns: [&str; 7] = std::array::from_fn(|_| next());
        let [_, _, _, flags, _, _, inode] = columns;
        let listens = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & FLAG_LISTENS != 0);
        // A name that starts with @ is in no file system.
        if let (true, Ok(inode), false) = (listens, inode.parse(), rest.starts_with('@')) {
            if !rest.is_empty() {
                sockets.insert(inode, PathBuf::from(rest));
            }
        }
    }
    sockets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_told_from_connected_ones() {
        let table = "\
Num       RefCount Protocol Flags    Type St Inode Path
ffff8c1d: 00000002 00000000 00010000 0001 01 12345 /run/vm.sock
ffff8c1e: 00000003 00000000 00000000 0001 03   777 /run/vm.sock
ffff8c1f: 00000002 00000000 00010000 0001 01    99 /run/a dir/vm.sock
ffff8c20: 00000002 00000000 00010000 0001 01   100 @abstract
ffff8c21: 00000003 00000000 00000000 0001 03   101
";
        let sockets = parse_listening(table);
        assert_eq!(sockets.len(), 2);
        assert_eq!(sockets.get(&12345), Some(&PathBuf::from("/run/vm.sock")));
        assert_eq!(sockets.get(&99), Some(&PathBuf::from("/run/a dir/vm.sock")));
    }

    #[test]
    fn empty_arguments_are_kept() {
        assert_eq!(split_arguments(b"qemu\0-append\0\0-S\0"), ["qemu", "-append", "", "-S"]);
        assert!(split_arguments(b"").is_empty());
    }

    #[test]
    fn only_system_emulators_are_qemu() {
        for name in ["qemu-system-x86_64", "qemu-kvm", "kvm", ".qemu-system-aarch64-wrapped"] {
            assert!(is_qemu_name(OsStr::new(name)), "{name}");
        }
        for name in ["qemu-img", "qemu-nbd", "qemu-storage-daemon", "qemu-x86_64", "bash"] {
            assert!(!is_qemu_name(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn this_process_shows_its_own_listening_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("own.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let sockets = listening_sockets(std::process::id()).unwrap();
        assert!(sockets.values().any(|bound| is_same_socket(std::process::id(), bound, &path)));
        assert!(listening_paths().unwrap().contains(&path));
        drop(listener);
    }
}
