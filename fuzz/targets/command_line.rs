//! `CommandLine`: reads a command line of QEMU, and changes it for a restore.
//!
//! Each line of the input is an argument; what follows a line with a NUL is the text of every
//! configuration file.
//!
//! Contract: no panic; every answer ends; what is written is read back as the same line, and a line for a
//! QEMU that waits stays the same if it is made into one again.

#![no_main]

use std::path::{Path, PathBuf};

use libfuzzer_sys::fuzz_target;
use vmfile_qemu::{CommandLine, MappedBlock};

fn block(name: &str) -> MappedBlock {
    let path = PathBuf::from("/proc/self/fd/1000");
    MappedBlock { block_name: name.to_owned(), size: 64 << 20, path, offset: 1 << 20 }
}

fuzz_target!(|input: &str| {
    let (words, config) = input.split_once('\0').unwrap_or((input, ""));
    let Ok(mut line) = CommandLine::new(words.lines()) else { return };
    let read_back = |line: &CommandLine| CommandLine::new(line.to_arguments()).expect("it was one");
    assert!(read_back(&line) == line);
    let _ = (line.name(), line.memory_size(), line.to_shell());
    let _ = (line.qmp_sockets(), line.qmp_descriptors(), line.has_libvirt_monitor());
    let _ = (line.drives(), line.devices(), line.config_files(), line.input_files());
    let _ = (line.what_cannot_be_recreated(), line.on_terminal(), line.needs_shared_ram());
    let mut redacted = line.clone();
    let places = redacted.redact();
    assert_eq!(places.len(), line.secrets().len());
    assert!(redacted.redact().is_empty(), "no secret is left");
    assert!(redacted.redacted().len() >= places.len(), "each is missed");
    let _ = line.expand_config(true, |_: &Path| Ok(config.to_owned()));
    assert!(line.stop_waiting().len() <= line.to_arguments().len());
    assert!(line.stop_waiting().is_empty(), "nothing waits any more");
    let _ = line.keep_logs();
    for name in ["pc.ram", "m0", "/objects/m0"] {
        let ram = [block(name)];
        let _ = line.lost_by_mapping(&ram);
        let Ok(incoming) = line.for_incoming(&ram) else { continue };
        assert!(read_back(&incoming) == incoming);
        assert!(incoming.lost_by_mapping(&ram).is_empty(), "it is mapped already");
        let again = incoming.for_incoming(&ram).expect("it was possible before");
        assert!(again == incoming);
    }
});
