//! Options that stand in a file (`-readconfig`), or change another option (`-set`).
//!
//! QEMU reads both while it reads its arguments. A command line that is kept must not depend on a
//! file that may have changed since, so both are written out as ordinary options.

use std::io;
use std::path::Path;

use super::keys::{Keys, write};
use super::{Argument, CommandLine, CommandLineError};

/// Groups of a configuration file whose option has another name (QEMU 7.2 to 11.1).
const RENAMED: [(&str, &str); 3] = [("boot-opts", "boot"), ("memory", "m"), ("smp-opts", "smp")];

/// Groups whose option has their own name (QEMU 7.2 to 11.1).
const GROUPS: [&str; 25] = [
    "accel", "action", "add-fd", "audiodev", "chardev", "device", "drive", "fsdev", "fw_cfg",
    "global", "icount", "iscsi", "machine", "mon", "name", "net", "netdev", "nic", "numa",
    "object", "rtc", "sandbox", "spice", "tpmdev", "vnc",
];

/// Groups that QEMU accepts in a configuration file and does not act on: it acts where it reads the
/// option (QEMU 7.2 to 11.1). As an option they would make another VM, e.g. one with one ROM more.
const IGNORED: [&str; 11] = [
    "acpi",
    "msg",
    "option-rom",
    "overcommit",
    "plugin",
    "realtime",
    "run-with",
    "semihosting-config",
    "smbios",
    "trace",
    "virtfs",
];

/// Options that keep QEMU from adding its default NIC and network. The groups of these names in a
/// configuration file do not (QEMU 7.2 to 11.1).
const NETWORK: [&str; 3] = ["netdev", "nic", "net"];

pub(super) fn expand(
    line: &mut CommandLine,
    has_user_network: bool,
    mut read: impl FnMut(&Path) -> io::Result<String>,
) -> Result<(), CommandLineError> {
    let has = |line: &CommandLine, names: &[&str]| {
        line.arguments.iter().any(|argument| argument.name().is_some_and(|it| names.contains(&it)))
    };
    let adds_network = !has(line, &NETWORK) && !has(line, &["nodefaults"]);
    let mut arguments: Vec<Argument> = Vec::new();
    for argument in std::mem::take(&mut line.arguments) {
        let value = argument.value.as_deref().unwrap_or_default();
        match argument.name() {
            Some("readconfig") => {
                let path = Path::new(value);
                let unread = |source| CommandLineError::ConfigFile { path: path.into(), source };
                let text = read(path).map_err(unread)?;
                let bad = |(line, what): (usize, String)| CommandLineError::ConfigLine {
                    path: path.into(),
                    line,
                    what,
                };
                arguments.extend(options(&text).map_err(bad)?);
            }
            Some("set") if set(&mut arguments, value) => {}
            _ => arguments.push(argument),
        }
    }
    line.arguments = arguments;
    if adds_network && has(line, &NETWORK) {
        line.push("-net", Some("nic"));
        if has_user_network {
            line.push("-net", Some("user"));
        }
    }
    Ok(())
}

/// Reads a configuration file; an error is a line, counted from 1, and what is wrong with it.
fn options(text: &str) -> Result<Vec<Argument>, (usize, String)> {
    let mut options: Vec<Argument> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        let fail = |what: String| Err((index + 1, what));
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(group) = line.strip_prefix('[') {
            let Some((head, _)) = group.split_once(']') else {
                return fail("a group without its closing bracket".to_owned());
            };
            let (group, id) = match head.split_once(' ') {
                Some((group, id)) => (group, Some(id.trim().trim_matches('"'))),
                None => (head, None),
            };
            let Some(option) = option_of(group) else {
                return fail(format!("group {group:?} has no option of that name"));
            };
            let value = id.map_or_else(String::new, |id| write("id", id));
            options.push(Argument { written: format!("-{option}"), value: Some(value) });
            continue;
        }
        let pair = line.split_once('=').map(|(key, value)| (key.trim(), value.trim()));
        let value = pair.and_then(|(_, value)| value.strip_prefix('"')?.split('"').next());
        match (pair, value, options.last_mut()) {
            (Some((key, _)), Some(value), Some(option)) => append(option, key, value),
            (_, _, None) => return fail("a value before the first group".to_owned()),
            _ => return fail("neither a group nor a key with a value in quotes".to_owned()),
        }
    }
    // A group without an id and without keys says nothing.
    options.retain(|option| option.value.as_deref() != Some("") && !is_ignored(option));
    Ok(options)
}

/// Returns the name of the option that a group stands for.
fn option_of(group: &str) -> Option<&'static str> {
    let renamed = RENAMED.iter().find(|(name, _)| *name == group).map(|(_, option)| *option);
    let same = || GROUPS.iter().chain(&IGNORED).find(|name| **name == group).copied();
    renamed.or_else(same)
}

/// Tells whether QEMU ignores the group of this option in a configuration file.
fn is_ignored(option: &Argument) -> bool {
    option.name().is_some_and(|name| IGNORED.contains(&name))
}

/// Applies a `-set GROUP.ID.KEY=VALUE` to the option that it means; returns whether that is there,
/// or whether QEMU ignores such a change.
fn set(arguments: &mut [Argument], value: &str) -> bool {
    let Some((place, value)) = value.split_once('=') else { return false };
    let mut parts = place.splitn(3, '.');
    let (Some(group), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    if IGNORED.contains(&group) {
        return true;
    }
    let is_meant = |argument: &&mut Argument| {
        let value = argument.value.as_deref().unwrap_or_default();
        argument.name() == option_of(group)
            && !value.starts_with('{')
            && Keys::parse(value, "").get("id") == Some(id)
    };
    let found = arguments.iter_mut().rev().find(is_meant);
    found.map(|argument| append(argument, key, value)).is_some()
}

fn append(argument: &mut Argument, key: &str, value: &str) {
    let words = argument.value.get_or_insert_default();
    if !words.is_empty() {
        words.push(',');
    }
    words.push_str(&write(key, value));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(words: &[&str], text: &str) -> Result<Vec<String>, CommandLineError> {
        let mut line = CommandLine::new(words.iter().copied())?;
        line.expand_config(true, |path| {
            assert_eq!(path, Path::new("vm.conf"));
            Ok(text.to_owned())
        })?;
        Ok(line.to_arguments())
    }

    #[test]
    fn groups_become_the_options_that_they_stand_for_at_their_place() {
        let text = concat!(
            "# qemu config file\n\n[drive \"d0\"]\n  file = \"/srv/a,b.qcow2\"\n  if = \"none\"\n",
            "[device]\n driver = \"virtio-blk-pci\"\n drive = \"d0\"\n\n[memory]\n  size = \"64M\"\n",
            "[smp-opts]\n  cpus = \"2\"\n[machine]\n  type = \"pc\"\n[object \"s0\"]\n",
            "  qom-type = \"secret\"\n  data = \"\"\n",
        );
        let words = expanded(&["-S", "-readconfig", "vm.conf", "-nodefaults"], text).unwrap();
        let expected = [
            "-S",
            "-drive",
            "id=d0,file=/srv/a,,b.qcow2,if=none",
            "-device",
            "driver=virtio-blk-pci,drive=d0",
            "-m",
            "size=64M",
            "-smp",
            "cpus=2",
            "-machine",
            "type=pc",
            "-object",
            "id=s0,qom-type=secret,data=",
            "-nodefaults",
        ];
        assert_eq!(words, expected);
    }

    /// As a group it leaves QEMU's default NIC in place, as an option it does not.
    #[test]
    fn the_default_network_stays_where_only_a_group_makes_another() {
        let text = "[netdev \"n0\"]\n  type = \"user\"\n";
        let netdev = ["-netdev", "id=n0,type=user"];
        let default = ["-net", "nic", "-net", "user"];
        let words = expanded(&["-readconfig", "vm.conf"], text).unwrap();
        assert_eq!(words, [&netdev[..], &default[..]].concat());
        for more in [&["-nodefaults"][..], &["-nic", "none"], &["-net", "none"]] {
            let words = [&["-readconfig", "vm.conf"], more].concat();
            assert_eq!(expanded(&words, text).unwrap(), [&netdev[..], more].concat());
        }
        let disk = "[drive]\n  file = \"a\"\n";
        assert_eq!(expanded(&["-readconfig", "vm.conf"], disk).unwrap(), ["-drive", "file=a"]);

        let mut line = CommandLine::new(["-readconfig", "vm.conf"]).unwrap();
        line.expand_config(false, |_| Ok(text.to_owned())).unwrap();
        assert_eq!(line.to_arguments(), [&netdev[..], &["-net", "nic"]].concat());
    }

    #[test]
    fn a_group_that_qemu_ignores_becomes_no_option() {
        let text = "[smbios \"s\"]\n  type = \"1\"\n[option-rom]\n  romfile = \"x\"\n";
        let words = ["-readconfig", "vm.conf", "-set", "smbios.s.serial=1", "-S"];
        assert_eq!(expanded(&words, text).unwrap(), ["-S"]);
    }

    #[test]
    fn set_changes_the_option_of_that_id() {
        let words = ["-drive", "id=d0,file=a", "-set", "drive.d0.file=b,c", "-set", "drive.x.y=z"];
        let expected = ["-drive", "id=d0,file=a,file=b,,c", "-set", "drive.x.y=z"];
        assert_eq!(expanded(&words, "").unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_read_is_named_by_file_and_line_and_not_by_value() {
        for (text, expected) in [
            ("[drive\n", "line 1 of vm.conf: a group without its closing bracket"),
            ("x = \"y\"\n", "line 1 of vm.conf: a value before the first group"),
            (
                "[drive]\nsecret\n",
                "line 2 of vm.conf: neither a group nor a key with a value in quotes",
            ),
            ("\n[frob \"x\"]\n", "line 2 of vm.conf: group \"frob\" has no option of that name"),
        ] {
            let error = expanded(&["-readconfig", "vm.conf"], text).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
        let mut line = CommandLine::new(["-readconfig", "gone.conf"]).unwrap();
        let error = line.expand_config(true, |_| Err(io::ErrorKind::NotFound.into())).unwrap_err();
        assert_eq!(error.to_string(), "read gone.conf, which -readconfig names");
    }
}
