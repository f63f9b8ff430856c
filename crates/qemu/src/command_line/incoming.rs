//! Turns the command line of a VM that ran into one for a QEMU that waits for its stream.

use serde_json::{Map, Value, json};

use super::keys::{Keys, write};
use super::{Argument, CONTROL_ID, CommandLine, CommandLineError, MappedBlock, parse_json};
use crate::size::parse_size;

/// Options that say how the old QEMU was started, and not what the VM is.
const STARTING_OPTIONS: [&str; 4] = ["incoming", "S", "daemonize", "loadvm"];

/// Options that give memory to the machine's own RAM; QEMU refuses them beside `memory-backend`.
pub(super) const MACHINE_RAM_OPTIONS: [&str; 2] = ["mem-path", "mem-prealloc"];

/// Properties of a memory backend that stay true when its bytes come from a file.
const KEPT_PROPERTIES: [&str; 5] = ["merge", "dump", "policy", "host-nodes", WHOLE_PATH];

/// Property of a memory backend that decides about its block's name: the backend's QOM path
/// (`/objects/m1`), or its id (`m1`).
///
/// Machine types before 4.0 switch it on for files and memfds, and for no other backend.
const WHOLE_PATH: &str = "x-use-canonical-path-for-ramblock-id";

/// The smallest page of a host that QEMU runs on.
const HOST_PAGE_LEN: u64 = 4096;

/// Devices whose memory is more than the bytes in it: it persists, is shared, or is partly absent.
const DEVICES_NOT_MAPPED: [&str; 4] = ["nvdimm", "virtio-pmem", "virtio-mem", "ivshmem"];

pub(super) fn for_incoming(
    line: &CommandLine,
    ram: &[MappedBlock],
) -> Result<CommandLine, CommandLineError> {
    let mut arguments: Vec<Argument> =
        line.arguments.iter().filter(|a| is_kept(a)).cloned().collect();
    for argument in arguments.iter_mut().filter(|argument| argument.name() == Some("object")) {
        replace_lost_file(argument)?;
    }
    for block in ram {
        check_mappable(line, &block.block_name)?;
        map_block(&mut arguments, block)?;
    }
    let mut line = CommandLine { arguments };
    line.push("-incoming", Some("defer"));
    line.push("-S", None);
    Ok(line)
}

pub(super) fn check_mappable(line: &CommandLine, block_name: &str) -> Result<(), CommandLineError> {
    let block = || block_name.to_owned();
    let Some((_, id)) = find_backend(&line.arguments, block_name)? else {
        let own = is_machine_ram(block_name) && machine_backend(&line.arguments).is_none();
        return if own { Ok(()) } else { Err(CommandLineError::NotDefined { block: block() }) };
    };
    for value in line.values_of(&["device"]) {
        let keys = Keys::parse(value, "driver");
        let device = keys.get("driver").unwrap_or_default();
        let uses = keys.get("memdev").is_some_and(|memdev| object_id(memdev) == id);
        if uses && DEVICES_NOT_MAPPED.iter().any(|prefix| device.starts_with(prefix)) {
            let device = device.to_owned();
            return Err(CommandLineError::NotMappable { block: block(), device });
        }
    }
    Ok(())
}

/// Tells whether an argument belongs to the VM rather than to how its QEMU was started.
pub(super) fn is_kept(argument: &Argument) -> bool {
    let Some(name) = argument.name() else { return true };
    let value = argument.value.as_deref().unwrap_or_default();
    match name {
        // The monitor that an earlier restore of vmfile added.
        "chardev" => Keys::parse(value, "backend").get("id") != Some(CONTROL_ID),
        "mon" => Keys::parse(value, "chardev").get("chardev") != Some(CONTROL_ID),
        "object" => Keys::parse(value, "qom-type").get("id") != Some(CONTROL_ID),
        _ => !STARTING_OPTIONS.contains(&name),
    }
}

fn map_block(arguments: &mut Vec<Argument>, block: &MappedBlock) -> Result<(), CommandLineError> {
    if let Some((index, id)) = find_backend(arguments, &block.block_name)? {
        let argument = arguments.get_mut(index);
        let argument = argument.expect("the index was found in these arguments");
        let written = argument.value.clone().unwrap_or_default();
        let block = MappedBlock { size: check_size(&written, block)?, ..block.clone() };
        argument.value = Some(file_backend(&argument.written, &written, &id, &block)?);
        return Ok(());
    }
    // The machine's own RAM, made by QEMU for a plain -m.
    let id = block.block_name.as_str();
    let replaced = |argument: &Argument| {
        argument.name().is_some_and(|name| MACHINE_RAM_OPTIONS.contains(&name))
    };
    arguments.retain(|argument| !replaced(argument));
    let object = file_backend("-object", "", id, block)?;
    let argument =
        |option: &str, value| Argument { written: option.to_owned(), value: Some(value) };
    arguments.push(argument("-object", object));
    // QEMU merges the options of several -machine (and -M); only an explicit type= replaces
    // anything (10.0.2).
    arguments.push(argument("-machine", write("memory-backend", id)));
    Ok(())
}

/// Finds the memory backend behind a RAM block: its argument's index and its id.
///
/// QEMU names the block after the backend's id, or its QOM path with machine types before 4.0, or
/// puts the path of the device before it that uses the backend (`0000:00:03.0/m1`).
pub(super) fn find_backend(
    arguments: &[Argument],
    block_name: &str,
) -> Result<Option<(usize, String)>, CommandLineError> {
    let wanted = object_id(block_name);
    for (index, argument) in arguments.iter().enumerate() {
        if argument.name() != Some("object") {
            continue;
        }
        let value = argument.value.as_deref().unwrap_or_default();
        parse_json(&argument.written, value)?;
        let keys = Keys::parse(value, "qom-type");
        let is_memory =
            keys.get("qom-type").is_some_and(|kind| kind.starts_with("memory-backend-"));
        if is_memory && keys.get("id") == Some(wanted) {
            return Ok(Some((index, wanted.to_owned())));
        }
    }
    Ok(None)
}

/// Returns the last part of a QOM path or block name: an id holds no slash.
fn object_id(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Tells whether a block has a name that machines give to RAM of their own: `pc.ram`,
/// `mach-virt.ram`, `ppc_spapr.ram` and so on. Device memory has a slash in its name.
fn is_machine_ram(block_name: &str) -> bool {
    block_name.ends_with(".ram") && !block_name.contains('/')
}

fn machine_backend(arguments: &[Argument]) -> Option<String> {
    arguments
        .iter()
        .filter(|argument| matches!(argument.name(), Some("machine" | "M")))
        .filter_map(|argument| argument.value.as_deref())
        .filter_map(|value| Keys::parse(value, "type").get("memory-backend").map(str::to_owned))
        .next_back()
}

/// Compares the size that is `written` with the block's, and returns it. QEMU rounds a block's up to
/// whole pages of the host.
fn check_size(written: &str, block: &MappedBlock) -> Result<u64, CommandLineError> {
    let keys = Keys::parse(written, "qom-type");
    let Some(expected) = keys.get("size").and_then(parse_size) else { return Ok(block.size) };
    if expected.checked_next_multiple_of(HOST_PAGE_LEN) == Some(block.size) {
        return Ok(expected);
    }
    Err(CommandLineError::SizeDiffers {
        block: block.block_name.clone(),
        found: block.size,
        expected,
    })
}

/// Returns the value of an `-object` that maps the block's file, in the form of the one `written`.
///
/// The mapping is private and read-only: the guest's writes stay in memory, and no balloon punches
/// holes into the file. `rom=off` lets the guest write although the file is open for reading only.
/// With `reserve=off`, memory is allocated as the guest writes: many clones, or a guest that is
/// larger than the host and mostly untouched, then start where the kernel's heuristic would refuse
/// the whole mapping.
/// [`WHOLE_PATH`] keeps the block's name, which may come from a backend of another type.
fn file_backend(
    option: &str,
    written: &str,
    id: &str,
    block: &MappedBlock,
) -> Result<String, CommandLineError> {
    let path = block.path.to_str();
    let path = path
        .ok_or_else(|| CommandLineError::PathNotText { block: block.block_name.clone() })?
        .to_owned();
    let has_whole_path = block.block_name.contains("/objects/");
    if let Some(json) = parse_json(option, written)? {
        let mut properties = kept_json(&json, "memory-backend-file", id);
        properties.insert(WHOLE_PATH.to_owned(), json!(has_whole_path));
        properties.insert("size".to_owned(), json!(block.size));
        properties.insert("mem-path".to_owned(), json!(path));
        properties.insert("offset".to_owned(), json!(block.offset));
        properties.insert("share".to_owned(), json!(false));
        properties.insert("readonly".to_owned(), json!(true));
        properties.insert("rom".to_owned(), json!("off"));
        properties.insert("reserve".to_owned(), json!(false));
        return Ok(Value::Object(properties).to_string());
    }
    let mut words = vec!["memory-backend-file".to_owned(), write("id", id)];
    words.push(write("size", &block.size.to_string()));
    words.push(write("mem-path", &path));
    words.push(write("offset", &block.offset.to_string()));
    words.extend(["share=off", "readonly=on", "rom=off", "reserve=off"].map(str::to_owned));
    words.push(write(WHOLE_PATH, if has_whole_path { "on" } else { "off" }));
    words.extend(kept_words(written).into_iter().filter(|word| !word.starts_with(WHOLE_PATH)));
    Ok(words.join(","))
}

/// Tells whether an earlier restore mapped this memory backend from an inherited descriptor.
pub(super) fn is_mapped(keys: &Keys) -> bool {
    keys.get("mem-path").is_some_and(|path| path.starts_with("/proc/self/fd/"))
}

/// Gives a memory backend that an earlier restore mapped from an inherited descriptor memory of its
/// own: that descriptor is gone. Blocks that this restore maps are mapped after this.
fn replace_lost_file(argument: &mut Argument) -> Result<(), CommandLineError> {
    let value = argument.value.clone().unwrap_or_default();
    let keys = Keys::parse(&value, "qom-type");
    if !is_mapped(&keys) {
        return Ok(());
    }
    let id = keys.get("id").unwrap_or_default();
    let size = keys.get("size").unwrap_or_default();
    argument.value = Some(match parse_json(&argument.written, &value)? {
        Some(json) => {
            let mut properties = kept_json(&json, "memory-backend-ram", id);
            properties.extend(json.get("size").map(|size| ("size".to_owned(), size.clone())));
            Value::Object(properties).to_string()
        }
        None => {
            let mut words =
                vec!["memory-backend-ram".to_owned(), write("id", id), write("size", size)];
            words.extend(kept_words(&value));
            words.join(",")
        }
    });
    Ok(())
}

fn kept_json(json: &Value, kind: &str, id: &str) -> Map<String, Value> {
    let mut properties = Map::new();
    properties.insert("qom-type".to_owned(), json!(kind));
    properties.insert("id".to_owned(), json!(id));
    let old = json.as_object().into_iter().flatten();
    properties.extend(
        old.filter(|(key, _)| is_kept_property(key))
            .map(|(key, value)| (key.clone(), value.clone())),
    );
    properties
}

fn kept_words(written: &str) -> Vec<String> {
    let keys = Keys::parse(written, "qom-type");
    let kept = keys.iter().filter(|(key, _)| is_kept_property(key));
    kept.map(|(key, value)| write(key, value)).collect()
}

/// A list may be written as `host-nodes=0` or `host-nodes.0=0`.
pub(super) fn is_kept_property(key: &str) -> bool {
    let name = key.split_once('.').map_or(key, |(name, _)| name);
    KEPT_PROPERTIES.contains(&name)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn block(name: &str) -> MappedBlock {
        MappedBlock {
            block_name: name.to_owned(),
            size: 64 << 20,
            path: PathBuf::from("/proc/self/fd/7"),
            offset: 0x10_0000,
        }
    }

    fn incoming(words: &[&str], ram: &[MappedBlock]) -> Result<Vec<String>, CommandLineError> {
        let line = CommandLine::new(words.iter().copied())?;
        line.for_incoming(ram).map(|line| line.to_arguments())
    }

    const PC_RAM_FILE: &str = "memory-backend-file,id=pc.ram,size=67108864,\
        mem-path=/proc/self/fd/7,offset=1048576,share=off,readonly=on,rom=off,reserve=off,\
        x-use-canonical-path-for-ramblock-id=off";

    #[test]
    fn how_the_old_qemu_was_started_is_dropped() {
        let words = [
            "-m",
            "64M",
            "-incoming",
            "defer",
            "-S",
            "--daemonize",
            "-loadvm",
            "x",
            "-pidfile",
            "p",
            "-chardev",
            "socket,id=vmfile-control,fd=9",
            "-mon",
            "chardev=vmfile-control,mode=control",
            "-object",
            "monitor-qmp,id=vmfile-control,chardev=vmfile-control",
        ];
        let expected = ["-m", "64M", "-pidfile", "p", "-incoming", "defer", "-S"];
        assert_eq!(incoming(&words, &[]).unwrap(), expected);
    }

    #[test]
    fn the_machine_s_own_ram_gets_a_backend() {
        let words = ["-machine", "pc", "-m", "64M", "-mem-path", "/dev/hugepages", "-mem-prealloc"];
        let expected = [
            "-machine",
            "pc",
            "-m",
            "64M",
            "-object",
            PC_RAM_FILE,
            "-machine",
            "memory-backend=pc.ram",
            "-incoming",
            "defer",
            "-S",
        ];
        assert_eq!(incoming(&words, &[block("pc.ram")]).unwrap(), expected);
    }

    #[test]
    fn a_backend_is_replaced_in_its_place_and_keeps_its_policy() {
        let words = [
            "-object",
            "memory-backend-memfd,id=ram0,size=64M,share=on,prealloc=on,host-nodes=0,policy=bind",
            "-machine",
            "q35,memory-backend=ram0",
        ];
        let arguments = incoming(&words, &[block("ram0")]).unwrap();
        assert_eq!(
            arguments.get(1).unwrap(),
            "memory-backend-file,id=ram0,size=67108864,mem-path=/proc/self/fd/7,offset=1048576,\
             share=off,readonly=on,rom=off,reserve=off,\
             x-use-canonical-path-for-ramblock-id=off,host-nodes=0,policy=bind"
        );
        assert_eq!(arguments.get(3).unwrap(), "q35,memory-backend=ram0");
    }

    #[test]
    fn a_backend_in_json_stays_json() {
        let words = [
            "-object",
            r#"{"qom-type":"memory-backend-ram","id":"ram0","size":67108864,"host-nodes":[0,1]}"#,
        ];
        let arguments = incoming(&words, &[block("ram0")]).unwrap();
        let object: Value = serde_json::from_str(arguments.get(1).unwrap()).unwrap();
        let expected = json!({
            "qom-type": "memory-backend-file", "id": "ram0", "size": 67_108_864,
            "mem-path": "/proc/self/fd/7", "offset": 1_048_576, "share": false, "readonly": true,
            "rom": "off", "reserve": false, "host-nodes": [0, 1],
            "x-use-canonical-path-for-ramblock-id": false,
        });
        assert_eq!(object, expected);
    }

    #[test]
    fn a_block_is_found_by_every_name_that_qemu_gives_it() {
        let words = ["-object", "memory-backend-ram,id=m1,size=64M"];
        for (name, whole_path) in [("m1", "off"), ("/objects/m1", "on"), ("0000:00:03.0/m1", "off")]
        {
            let arguments = incoming(&words, &[block(name)]).unwrap();
            let ending = format!(",{WHOLE_PATH}={whole_path}");
            assert!(arguments.get(1).unwrap().ends_with(&ending), "{name}: {arguments:?}");
        }
    }

    #[test]
    fn commas_in_a_path_are_doubled() {
        let file = MappedBlock { path: PathBuf::from("/srv/a,b.vmf"), ..block("pc.ram") };
        let arguments = incoming(&[], &[file]).unwrap();
        assert!(arguments.get(1).unwrap().contains("mem-path=/srv/a,,b.vmf,offset="));
    }

    #[test]
    fn a_block_that_nothing_defines_is_refused_by_name() {
        for (words, name) in [
            (&["-m", "64M"][..], "dimm1"),
            (&["-machine", "q35,memory-backend=gone"], "pc.ram"),
            (&["-object", "memory-backend-ram,id=other,size=64M"], "0000:00:02.0/vga.vram"),
            (&["-object", "secret,id=m1"], "m1"),
        ] {
            let error = incoming(words, &[block(name)]).unwrap_err();
            assert!(matches!(error, CommandLineError::NotDefined { .. }), "{error}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn memory_that_is_more_than_its_bytes_is_not_mapped() {
        for device in [
            "nvdimm,memdev=m1",
            "virtio-mem-pci,memdev=/objects/m1",
            r#"{"driver":"ivshmem-plain","memdev":"m1"}"#,
        ] {
            let words = ["-object", "memory-backend-ram,id=m1,size=64M", "-device", device];
            let error = incoming(&words, &[block("m1")]).unwrap_err();
            assert!(matches!(error, CommandLineError::NotMappable { .. }), "{error}");
        }
        let words =
            ["-object", "memory-backend-ram,id=m1,size=64M", "-device", "pc-dimm,memdev=m1"];
        assert!(incoming(&words, &[block("m1")]).is_ok());
    }

    #[test]
    fn another_size_is_refused_with_both_numbers() {
        let words = ["-object", "memory-backend-ram,id=m1,size=128M"];
        let error = incoming(&words, &[block("m1")]).unwrap_err().to_string();
        assert!(error.contains("67108864 bytes in the file"), "{error}");
        assert!(error.contains("134217728 on the command line"), "{error}");
    }

    #[test]
    fn a_size_that_qemu_rounds_up_stays_as_it_is_written() {
        let words = ["-object", "memory-backend-ram,id=m1,size=65534K"];
        let rounded = MappedBlock { size: 64 << 20, ..block("m1") };
        let arguments = incoming(&words, &[rounded]).unwrap();
        assert!(arguments.get(1).unwrap().contains(",size=67106816,"), "{arguments:?}");
        assert!(
            incoming(&["-object", "memory-backend-ram,id=m1,size=65532K"], &[block("m1")]).is_err()
        );
    }

    #[test]
    fn a_restored_vm_can_be_restored_again_mapped_or_not() {
        let once = incoming(&["-m", "64M"], &[block("pc.ram")]).unwrap();
        let once: Vec<&str> = once.iter().map(String::as_str).collect();
        // Mapped again: the same line, nothing twice.
        assert_eq!(incoming(&once, &[block("pc.ram")]).unwrap(), once);
        // Not mapped: memory of its own, for the descriptor is gone.
        let loaded = incoming(&once, &[]).unwrap();
        let own = format!("memory-backend-ram,id=pc.ram,size=67108864,{WHOLE_PATH}=off");
        assert!(loaded.contains(&own), "{loaded:?}");
        let again = CommandLine::new(once).unwrap();
        assert!(again.what_cannot_be_recreated().is_empty());
    }

    #[test]
    fn a_backend_on_a_file_of_the_user_s_stays() {
        let words = ["-object", "memory-backend-file,id=m1,size=64M,mem-path=/srv/ram,share=on"];
        assert_eq!(incoming(&words, &[]).unwrap().get(1).unwrap(), words[1]);
    }

    #[test]
    fn broken_json_is_refused_without_its_text() {
        let error = incoming(&["-object", r#"{"data":"hunter2""#], &[block("m1")]).unwrap_err();
        assert_eq!(error.to_string(), "the value of -object is not JSON");
    }
}
