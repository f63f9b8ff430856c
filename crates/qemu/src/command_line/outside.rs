//! What a QEMU that is started anew does to files and terminals outside of the VM.

use std::path::PathBuf;

use super::CommandLine;
use super::keys::{Keys, append};
use super::sockets::{SHORT_FORM_OPTIONS, without_monitor};

/// A file that QEMU empties when it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmptiedFile {
    /// The option that names it.
    pub option: String,
    /// The file, as written.
    pub path: PathBuf,
}

pub(super) fn keep_logs(line: &mut CommandLine) -> Vec<EmptiedFile> {
    let mut emptied = Vec::new();
    for argument in &mut line.arguments {
        let (Some(name), Some(value)) = (argument.name(), argument.value.as_deref()) else {
            continue;
        };
        let is_emptied = |path: &str| EmptiedFile { option: format!("-{name}"), path: path.into() };
        match name {
            "D" => emptied.push(is_emptied(value)),
            // QEMU takes no JSON there (11.1).
            "chardev" if !value.trim_start().starts_with('{') => {
                let keys = Keys::parse(value, "backend");
                let is_file = keys.get("backend") == Some("file") && keys.get("append").is_none();
                let kept = if is_file { append(value, "append=on") } else { value.to_owned() };
                argument.value = Some(with_kept_log(&kept));
            }
            _ if SHORT_FORM_OPTIONS.contains(&name) => {
                match without_monitor(value).strip_prefix("file:") {
                    // All of the rest is the path.
                    Some(path) => emptied.push(is_emptied(path)),
                    None => argument.value = Some(with_kept_log(value)),
                }
            }
            _ => emptied.extend(written_file(name, value).as_deref().map(is_emptied)),
        }
    }
    emptied
}

/// Returns a character device in which QEMU appends to its log.
fn with_kept_log(value: &str) -> String {
    let keys = Keys::parse(value, "backend");
    let is_emptied = keys.get("logfile").is_some() && keys.get("logappend").is_none();
    if is_emptied { append(value, "logappend=on") } else { value.to_owned() }
}

/// Returns the file that QEMU makes anew for an option.
fn written_file(option: &str, value: &str) -> Option<String> {
    let keys = Keys::parse(value, if option == "object" { "qom-type" } else { "driver" });
    let path = match option {
        "audiodev" if keys.get("driver") == Some("wav") => {
            // The path that QEMU takes if the option has none.
            Some(keys.get("path").unwrap_or("qemu.wav"))
        }
        "object" if keys.get("qom-type") == Some("filter-dump") => keys.get("file"),
        "trace" => keys.get("file"),
        // What passes over USB.
        "device" => keys.get("pcap"),
        _ => None,
    };
    path.map(str::to_owned)
}

pub(super) fn on_terminal(line: &CommandLine) -> Vec<String> {
    let mut options = Vec::new();
    for argument in &line.arguments {
        let value = argument.value.as_deref().unwrap_or_default();
        let is_on_terminal = match argument.name() {
            Some("nographic" | "curses") => true,
            Some("display") => Keys::parse(value, "type").get("type") == Some("curses"),
            Some("chardev") => Keys::parse(value, "backend").get("backend") == Some("stdio"),
            Some(name) if SHORT_FORM_OPTIONS.contains(&name) => without_monitor(value) == "stdio",
            _ => false,
        };
        options.extend(argument.name().filter(|_| is_on_terminal).map(|name| format!("-{name}")));
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A restore emptied the log of the VM that it brought back.
    #[test]
    fn logs_go_on_where_qemu_can_append() {
        let words = [
            "-chardev",
            "file,id=a,path=/var/log/a",
            "-chardev",
            "file,id=b,path=/var/log/b,append=off",
            "-chardev",
            "socket,id=c,path=/run/c,logfile=/var/log/c",
            "-serial",
            "file:/var/log/serial",
            "-serial",
            "mon:stdio",
            "-D",
            "qemu.log",
            "-monitor",
            "unix:/run/m,server=on,wait=off,logfile=/var/log/m",
            "-audiodev",
            "wav,id=a0,path=/tmp/a.wav",
            "-object",
            "filter-dump,id=f0,netdev=n0,file=/tmp/n0",
            "-trace",
            "events=/tmp/e,file=/tmp/t",
            "-device",
            "usb-kbd,pcap=/tmp/usb",
        ];
        let mut line = CommandLine::new(words).unwrap();
        let emptied = |option: &str, path: &str| EmptiedFile {
            option: option.to_owned(),
            path: PathBuf::from(path),
        };
        let expected = [
            emptied("-serial", "/var/log/serial"),
            emptied("-D", "qemu.log"),
            emptied("-audiodev", "/tmp/a.wav"),
            emptied("-object", "/tmp/n0"),
            emptied("-trace", "/tmp/t"),
            emptied("-device", "/tmp/usb"),
        ];
        assert_eq!(line.keep_logs(), expected);
        let mut kept = words.map(str::to_owned);
        kept[1].push_str(",append=on");
        kept[5].push_str(",logappend=on");
        kept[13].push_str(",logappend=on");
        assert_eq!(line.to_arguments(), kept);
    }

    #[test]
    fn what_was_on_a_terminal_is_named() {
        let words = [
            "-nographic",
            "-serial",
            "mon:stdio",
            "-serial",
            "pty",
            "-chardev",
            "stdio,id=c,mux=on",
            "-display",
            "curses,charset=CP437",
            "-qmp",
            "stdio",
        ];
        let line = CommandLine::new(words).unwrap();
        assert_eq!(line.on_terminal(), ["-nographic", "-serial", "-chardev", "-display", "-qmp"]);
        assert!(CommandLine::new(["-display", "none"]).unwrap().on_terminal().is_empty());
    }
}
