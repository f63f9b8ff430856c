//! The Unix sockets of a command line.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::keys::{Keys, append, is_on};
use super::{CommandLine, CommandLineError};
use crate::{proc, unix_socket};

/// Options whose value is a character device in the short form, e.g. `unix:PATH,server=on`.
pub(super) const SHORT_FORM_OPTIONS: [&str; 8] =
    ["qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "gdb", "virtioconsole"];

/// The monitor by which libvirt speaks to a QEMU of its own.
const LIBVIRT_ID: &str = "charmonitor";

pub(super) fn qmp_sockets(line: &CommandLine) -> Vec<PathBuf> {
    control_monitors(line)
        .iter()
        .filter(|keys| is_server(keys) && keys.get("id") != Some(LIBVIRT_ID))
        .filter_map(|keys| keys.get("path").map(PathBuf::from))
        .collect()
}

pub(super) fn has_libvirt(line: &CommandLine) -> bool {
    control_monitors(line).iter().any(|keys| keys.get("id") == Some(LIBVIRT_ID))
}

pub(super) fn qmp_descriptors(line: &CommandLine) -> Vec<u32> {
    control_monitors(line)
        .iter()
        .filter(|keys| is_server(keys) && keys.get("id") != Some(LIBVIRT_ID))
        .filter_map(|keys| keys.get("fd")?.parse().ok())
        .collect()
}

pub(super) fn in_use(
    line: &CommandLine,
    directory: &Path,
) -> Result<Vec<PathBuf>, CommandLineError> {
    let listening =
        proc::listening_paths().map_err(|source| CommandLineError::Sockets { source })?;
    let mut paths: Vec<PathBuf> = server_paths(line)
        .into_iter()
        .map(|path| directory.join(path))
        .filter(|path| is_in_use(path, &listening))
        .collect();
    paths.sort();
    paths.dedup();
    Ok(paths)
}

pub(super) fn stop_waiting(line: &mut CommandLine) -> Vec<String> {
    let mut waiting = Vec::new();
    for argument in &mut line.arguments {
        let (Some(name), Some(value)) = (argument.name(), argument.value.as_deref()) else {
            continue;
        };
        // QEMU takes no JSON there (11.1).
        if value.trim_start().starts_with('{') {
            continue;
        }
        let keys = match name {
            "chardev" => Keys::parse(value, "backend"),
            _ if SHORT_FORM_OPTIONS.contains(&name) && has_address(value) => {
                Keys::parse(value, "address")
            }
            _ => continue,
        };
        // QEMU waits unless it is told not to, up to 11.1.
        if keys.is_on("server") && keys.get("wait").is_none_or(is_on) {
            waiting.push(format!("-{name}"));
            // The last of several values counts.
            argument.value = Some(append(value, "wait=off"));
        }
    }
    waiting
}

/// Tells whether the short form of a character device has the address of a socket.
fn has_address(value: &str) -> bool {
    let value = without_monitor(value);
    ["unix:", "tcp:", "telnet:", "tn3270:", "websocket:"].iter().any(|kind| value.starts_with(kind))
}

/// Tells whether a process listens at `path`.
///
/// The kernel's table tells this without disturbing the listener, which may be a serial console. It
/// shows paths as they were bound, and only this network namespace: any other path is tried by
/// connecting, which a socket file without a listener refuses.
fn is_in_use(path: &Path, listening: &HashSet<PathBuf>) -> bool {
    listening.contains(path) || unix_socket::is_served(path)
}

/// Returns the keys of the character devices that serve QMP.
fn control_monitors(line: &CommandLine) -> Vec<Keys> {
    let mut monitors: Vec<Keys> = line
        .values_of(&["qmp", "qmp-pretty"])
        .filter_map(|value| short_form(line, value))
        .collect();
    let options = line.values_of(&["mon"]).map(|value| Keys::parse(value, "chardev"));
    let options = options.filter(|keys| keys.get("mode") == Some("control"));
    // Since QEMU 11.1.
    let objects = line.values_of(&["object"]).map(|value| Keys::parse(value, "qom-type"));
    let objects = objects.filter(|keys| keys.get("qom-type") == Some("monitor-qmp"));
    let device = |keys: Keys| character_device(line, keys.get("chardev")?);
    monitors.extend(options.chain(objects).filter_map(device));
    monitors
}

/// Returns the paths of all sockets that QEMU listens on, monitors or not.
fn server_paths(line: &CommandLine) -> Vec<PathBuf> {
    let short = line.values_of(&SHORT_FORM_OPTIONS).filter_map(|value| short_form(line, value));
    let long = line.values_of(&["chardev"]).map(|value| Keys::parse(value, "backend"));
    let vnc = line.values_of(&["vnc"]).filter_map(|value| {
        let display = Keys::parse(value, "vnc").get("vnc")?.to_owned();
        display.strip_prefix("unix:").map(PathBuf::from)
    });
    long.chain(short)
        .filter(is_server)
        .filter_map(|keys| keys.get("path").map(PathBuf::from))
        .chain(vnc)
        .collect()
}

/// Returns a character device in the short form without the word that lets a monitor share it.
pub(super) fn without_monitor(value: &str) -> &str {
    value.strip_prefix("mon:").unwrap_or(value)
}

/// Reads the short form of a character device: `unix:PATH,server=on,wait=off` or `chardev:ID`.
fn short_form(line: &CommandLine, value: &str) -> Option<Keys> {
    if let Some(id) = value.strip_prefix("chardev:") {
        return character_device(line, id);
    }
    let value = without_monitor(value);
    let keys = Keys::parse(value.strip_prefix("unix:")?, "path");
    Some(keys)
}

fn character_device(line: &CommandLine, id: &str) -> Option<Keys> {
    line.values_of(&["chardev"])
        .map(|value| Keys::parse(value, "backend"))
        .find(|keys| keys.get("id") == Some(id))
}

fn is_server(keys: &Keys) -> bool {
    // An abstract socket has a name and no file.
    keys.is_on("server") && !keys.is_on("abstract")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn qmp(words: &[&str]) -> Vec<PathBuf> {
        CommandLine::new(words.iter().copied()).unwrap().qmp_sockets()
    }

    #[test]
    fn every_way_to_write_a_qmp_socket_is_found() {
        for words in [
            &["-qmp", "unix:/run/a,,b,server=on,wait=off"][..],
            &["--qmp", "unix:/run/a,,b,server,nowait"],
            &["-qmp-pretty", "unix:path=/run/a,,b,server=on"],
            &["-chardev", "socket,id=c,path=/run/a,,b,server=on", "-mon", "c,mode=control"],
            &["-mon", "chardev=c,mode=control", "-chardev", "socket,path=/run/a,,b,id=c,server"],
            &["-chardev", "socket,id=c,path=/run/a,,b,server=on", "-qmp", "chardev:c"],
            &[
                "-chardev",
                "socket,id=c,path=/run/a,,b,server=on",
                "-object",
                "monitor-qmp,id=m,chardev=c",
            ],
            &[
                "-chardev",
                "socket,id=c,path=/run/a,,b,server=on",
                "-object",
                r#"{"qom-type":"monitor-qmp","id":"m","chardev":"c"}"#,
            ],
        ] {
            assert_eq!(qmp(words), [PathBuf::from("/run/a,b")], "{words:?}");
        }
    }

    #[test]
    fn what_is_no_qmp_server_on_a_path_is_not_found() {
        for words in [
            &["-monitor", "unix:/run/hmp,server=on"][..],
            &["-qmp", "unix:/run/client"],
            &["-qmp", "tcp:localhost:4444,server=on"],
            &["-qmp", "stdio"],
            &["-chardev", "socket,id=c,path=/run/x,server=on", "-mon", "c,mode=readline"],
            &["-chardev", "socket,id=c,path=/run/x,server=on", "-mon", "c"],
            &["-chardev", "socket,id=c,path=x,server=on,abstract=on", "-mon", "c,mode=control"],
        ] {
            assert!(qmp(words).is_empty(), "{words:?}");
        }
    }

    #[test]
    fn a_monitor_on_an_inherited_socket_is_found_by_its_number() {
        let words = ["-chardev", "socket,id=m,fd=24,server=on,wait=off", "-mon", "m,mode=control"];
        let line = CommandLine::new(words).unwrap();
        assert_eq!(line.qmp_descriptors(), [24]);
        assert!(line.qmp_sockets().is_empty());
    }

    #[test]
    fn the_monitor_of_libvirt_is_told_from_the_others() {
        // As libvirt 11.3 writes it, and one that the user has added.
        let words = [
            "-chardev",
            "socket,id=charmonitor,fd=24,server=on,wait=off",
            "-mon",
            "chardev=charmonitor,id=monitor,mode=control",
            "-qmp",
            "unix:/run/mine,server=on,wait=off",
        ];
        let line = CommandLine::new(words).unwrap();
        assert!(line.has_libvirt_monitor());
        assert!(line.qmp_descriptors().is_empty());
        assert_eq!(line.qmp_sockets(), [PathBuf::from("/run/mine")]);
    }

    /// QEMU waits for a client by default; a restore waited for its first answer until its timeout.
    #[test]
    fn no_socket_waits_for_a_client() {
        let words = [
            "-qmp",
            "unix:/run/q,server",
            "-serial",
            "mon:telnet:localhost:4444,server=on,wait=on",
            "-chardev",
            "socket,id=c,path=/run/c,server=on",
            "-chardev",
            "socket,id=d,path=/run/d,server=on,wait=off",
            "-monitor",
            "unix:/run/m,server,nowait",
            "-serial",
            "unix:/run/client",
            "-serial",
            "file:/run/log,server",
        ];
        let mut line = CommandLine::new(words).unwrap();
        assert_eq!(line.stop_waiting(), ["-qmp", "-serial", "-chardev"]);
        let mut expected = words.map(str::to_owned);
        for value in [1, 3, 5] {
            expected[value].push_str(",wait=off");
        }
        assert_eq!(line.to_arguments(), expected);
        assert!(line.stop_waiting().is_empty());
    }

    #[test]
    fn a_socket_is_in_use_only_while_somebody_listens() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("used.sock")).unwrap();
        drop(UnixListener::bind(directory.path().join("stale.sock")).unwrap());
        let line = CommandLine::new([
            "-qmp",
            "unix:used.sock,server=on,wait=off",
            "-monitor",
            "unix:stale.sock,server=on,wait=off",
            "-serial",
            "unix:absent.sock,server=on,wait=off",
        ])
        .unwrap();
        let expected = [directory.path().join("used.sock")];
        assert_eq!(line.sockets_in_use(directory.path()).unwrap(), expected);
        drop(listener);
        assert!(line.sockets_in_use(directory.path()).unwrap().is_empty());
    }
}
