//! What a QEMU that is started anew cannot have: what belonged to the process of the old one, and what a
//! mapping of a file takes the place of.

use super::incoming::{MACHINE_RAM_OPTIONS, find_backend, is_kept, is_kept_property, is_mapped};
use super::keys::{Keys, is_on};
use super::{Argument, CommandLine, MappedBlock};

/// Properties of a memory backend that say where its bytes are; a mapping has its own.
const PLACE_PROPERTIES: [&str; 9] =
    ["qom-type", "id", "size", "mem-path", "offset", "readonly", "rom", "reserve", "share"];

/// Returns what depends on the old QEMU's process, by option and key: values may be secret.
pub(super) fn what_cannot_be_recreated(line: &CommandLine) -> Vec<String> {
    line.arguments.iter().filter(|argument| is_kept(argument)).filter_map(lost_thing).collect()
}

fn lost_thing(argument: &Argument) -> Option<String> {
    let name = argument.name()?;
    let value = argument.value.as_deref().unwrap_or_default();
    let keys = Keys::parse(value, "");
    let id = keys.get("id").map_or(String::new(), |id| format!(" {id}"));
    let lost = |what: &str| Some(format!("-{name}{id}: {what}"));
    if matches!(name, "snapshot") || name == "drive" && keys.is_on("snapshot") {
        return lost("the guest's disk changes were in a temporary file");
    }
    if name == "preconfig" {
        return lost("what was configured through the monitor before the machine was made");
    }
    if name == "tpmdev" && keys.iter().any(|(_, value)| value == "emulator") {
        return lost("the TPM's state is in a process of its own");
    }
    let inherited = |(key, value): (&str, &str)| match key.rsplit('.').next().unwrap_or(key) {
        "fd" | "fds" | "vhostfd" | "vhostfds" | "sockfd" => Some(key.to_owned()),
        // The address of a socket: `addr.type=fd,addr.str=N`.
        "type" if value == "fd" => Some(format!("{key}=fd")),
        _ => None,
    };
    if let Some(key) = keys.iter().find_map(inherited) {
        return lost(&format!("{key} is a descriptor that QEMU was started with"));
    }
    // A backend that an earlier restore mapped gets memory of its own or is mapped again.
    if name == "object" && is_mapped(&keys) {
        return None;
    }
    let opened = ["/dev/fdset/", "/proc/self/fd/", "/dev/fd/"];
    if opened.iter().any(|prefix| value.contains(prefix)) {
        return lost("it names a descriptor that QEMU was started with");
    }
    None
}

pub(super) fn lost_by_mapping(line: &CommandLine, ram: &[MappedBlock]) -> Vec<String> {
    let mut lost = Vec::new();
    for block in ram {
        match find_backend(&line.arguments, &block.block_name) {
            Ok(Some((index, id))) => {
                let value = line.arguments[index].value.as_deref().unwrap_or_default();
                lost.extend(lost_properties(&id, value));
            }
            Ok(None) => lost.extend(
                line.arguments
                    .iter()
                    .filter_map(Argument::name)
                    .filter(|name| MACHINE_RAM_OPTIONS.contains(name))
                    .map(|name| format!("-{name}")),
            ),
            // The line is refused for it elsewhere.
            Err(_) => {}
        }
    }
    lost
}

/// Returns what a backend says of its memory that a mapping does not have.
fn lost_properties(id: &str, value: &str) -> Vec<String> {
    let keys = Keys::parse(value, "qom-type");
    if is_mapped(&keys) {
        return Vec::new();
    }
    let is_lost = |key: &str, value: &str| match key {
        "mem-path" => true,
        // A file's and an anonymous backend's memory is private unless they say otherwise.
        "share" => is_on(value),
        _ => !PLACE_PROPERTIES.contains(&key) && !is_kept_property(key),
    };
    let lost = keys.iter().filter(|(key, value)| is_lost(key, value));
    lost.map(|(key, _)| format!("-object {id}: {key}")).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn block(name: &str) -> MappedBlock {
        let path = PathBuf::from("/proc/self/fd/7");
        MappedBlock { block_name: name.to_owned(), size: 64 << 20, path, offset: 0x10_0000 }
    }

    fn lost(words: &[&str]) -> Vec<String> {
        CommandLine::new(words.iter().copied()).unwrap().what_cannot_be_recreated()
    }

    #[test]
    fn what_a_mapping_does_not_have_is_named() {
        let lost = |words: &[&str], name: &str| {
            CommandLine::new(words.iter().copied()).unwrap().lost_by_mapping(&[block(name)])
        };
        let words = [
            "-object",
            "memory-backend-memfd,id=m1,size=64M,hugetlb=on,prealloc=on,share=on,host-nodes=0",
        ];
        let named = ["-object m1: hugetlb", "-object m1: prealloc", "-object m1: share"];
        assert_eq!(lost(&words, "m1"), named);
        assert!(
            lost(&["-object", "memory-backend-ram,id=m1,size=64M,policy=bind"], "m1").is_empty()
        );
        let words = ["-m", "64M", "-mem-path", "/dev/hugepages", "-mem-prealloc"];
        assert_eq!(lost(&words, "pc.ram"), ["-mem-path", "-mem-prealloc"]);
        let once = CommandLine::new(["-m", "64M"]).unwrap();
        let once = once.for_incoming(&[block("pc.ram")]).unwrap();
        assert!(once.lost_by_mapping(&[block("pc.ram")]).is_empty());
    }

    #[test]
    fn inherited_descriptors_are_named_without_values() {
        let words = [
            "-netdev",
            "tap,id=net0,fd=27,vhost=on,vhostfd=28",
            "-add-fd",
            "set=2,fd=30",
            "-blockdev",
            r#"{"driver":"file","node-name":"f0","filename":"/dev/fdset/2"}"#,
            "-chardev",
            "socket,id=charmonitor,fd=24,server=on",
            "-netdev",
            "stream,id=net2,addr.type=fd,addr.str=31",
            "-object",
            "iommufd,id=i0,fd=32",
            "-object",
            "memory-backend-file,id=m0,size=64M,mem-path=/dev/fdset/3",
            "-snapshot",
            "-drive",
            "file=a,snapshot=on,id=d0",
            "-incoming",
            "fd:5",
            "-chardev",
            "socket,id=vmfile-control,fd=9",
            "-netdev",
            "user,id=net1",
        ];
        assert_eq!(
            lost(&words),
            [
                "-netdev net0: fd is a descriptor that QEMU was started with",
                "-add-fd: fd is a descriptor that QEMU was started with",
                "-blockdev: it names a descriptor that QEMU was started with",
                "-chardev charmonitor: fd is a descriptor that QEMU was started with",
                "-netdev net2: addr.type=fd is a descriptor that QEMU was started with",
                "-object i0: fd is a descriptor that QEMU was started with",
                "-object m0: it names a descriptor that QEMU was started with",
                "-snapshot: the guest's disk changes were in a temporary file",
                "-drive d0: the guest's disk changes were in a temporary file",
            ]
        );
    }
}
