//! The page table of pseries, which is no RAM of the guest: QEMU sends it in parts, as it does RAM.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use vmfile::restore::{Destination, Mode, RestoreOptions};
use vmfile::save::{After, Live, Route, SaveOptions};
use vmfile::{Control, Snapshot, Vm};
use vmfile_testing::{Monitor, TestResult, requires};

use super::{installed, run};

/// Where QEMU lets the first CPU begin.
const ENTRY: usize = 0x100;

/// How many entries the guest makes.
const ENTRIES: u16 = 1000;

/// What the guest runs instead of firmware, in the instructions of a POWER: it asks QEMU for page table
/// entries (the hypercall H_ENTER), one in each group of eight, and stands at `DONE` then.
const GUEST: [u32; 12] = [
    0x3900_0001,                      // li    r8, 1
    0x3860_0008,                      // li    r3, H_ENTER
    0x3880_0000,                      // li    r4, 0
    0x7905_1f24,                      // sldi  r5, r8, 3     the group
    0x7906_64e4,                      // sldi  r6, r8, 12    which page the entry is for
    0x60c6_0001,                      // ori   r6, r6, 1     valid
    0x38e0_0010,                      // li    r7, 0x10      the page at address 0
    0x4400_0022,                      // sc    1
    0x3908_0001,                      // addi  r8, r8, 1
    0x2c28_0000 + ENTRIES as u32 + 1, // cmpdi r8, ENTRIES + 1
    0x4180_ffdc,                      // blt   the second instruction
    0x4800_0000,                      // b     here
];

/// The last instruction.
const DONE: usize = ENTRY + 4 * (GUEST.len() - 1);

/// A page table: the entries that are valid, by their places.
type Table = BTreeMap<u64, Vec<u8>>;

/// Makes the firmware in `directory`; returns its path.
fn firmware(directory: &Path) -> TestResult<String> {
    let mut bytes = vec![0; ENTRY];
    bytes.extend(GUEST.iter().flat_map(|word| word.to_be_bytes()));
    let path = directory.join("firmware");
    fs::write(&path, bytes)?;
    Ok(path.display().to_string())
}

/// Waits until the guest has made its entries.
fn wait_until_done(directory: &Path) -> TestResult {
    let mut monitor = Monitor::connect(&directory.join("oracle"), Duration::from_secs(30))?;
    let (done, deadline) = (format!("NIP {DONE:016x}"), Instant::now() + Duration::from_secs(60));
    loop {
        let line = json!({ "command-line": "info registers" });
        let registers = monitor.execute("human-monitor-command", line)?;
        if registers.as_str().is_some_and(|text| text.contains(&done)) {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "{registers}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Reads the page table in a file.
fn table(file: &Path) -> TestResult<Table> {
    let snapshot = Snapshot::open(file, 0)?;
    let mut parts = Vec::new();
    for &(offset, len) in &snapshot.structure().device_state.parts {
        parts.extend(snapshot.read(offset, len)?);
    }
    let mut rest = parts.as_slice();
    let mut take = |len: usize| {
        let (taken, left) = rest.split_at(len);
        rest = left;
        taken
    };
    let number = |bytes: &[u8]| bytes.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    let mut table = Table::new();
    let name = b"\x0aspapr/htab";
    loop {
        let kind = take(1)[0];
        take(4);
        if kind == 1 {
            assert_eq!(take(name.len()), name);
            take(8);
        }
        let head = number(take(4));
        // Any other head means that no group follows.
        if head == 0 {
            loop {
                let (index, valid, invalid) = (number(take(4)), number(take(2)), number(take(2)));
                if (index, valid, invalid) == (0, 0, 0) {
                    break;
                }
                for place in index..index + valid {
                    table.insert(place, take(16).to_vec());
                }
                for place in index + valid..index + valid + invalid {
                    table.remove(&place);
                }
            }
        }
        assert_eq!(take(1), [0x7e]);
        take(4);
        if kind == 3 {
            return Ok(table);
        }
    }
}

/// A pseries was refused: its page table was neither in what QEMU saves of devices nor understood in a stream.
#[test]
fn the_page_table_of_pseries_comes_back() -> TestResult {
    requires!(installed("qemu-system-ppc64"));
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let directory = directory.path();
    let firmware = firmware(directory)?;
    let words = ["qemu-system-ppc64", "-machine", "pseries", "-m", "256M", "-bios", &firmware];
    let (running, line) = run(words.map(str::to_owned).into(), directory)?;
    wait_until_done(directory)?;
    let control = Control::none();
    let stay = SaveOptions::default().after(After::Resume);
    let ways = [
        ("stream", stay.clone().route(Route::Stream)),
        ("native", stay.clone().route(Route::Native)),
        ("live", stay.clone().live(Some(Live::default()))),
    ];
    let file = |name: &str| directory.join(format!("{name}.vmf"));
    let mut vm = Vm::connect(&directory.join("qmp"))?;
    for (name, options) in &ways {
        vmfile::save::save(&mut vm, &file(name), options, &control)?;
        vmfile_testing::verbs::check_is_clean(&file(name))?;
    }
    drop((vm, running));
    let mut expected = Table::new();
    for entry in 1..=u64::from(ENTRIES) {
        let words = [entry << 12 | 1, 0x10];
        let bytes = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        expected.insert(entry * 8, bytes);
    }
    for (name, _) in &ways {
        assert_eq!(table(&file(name))?, expected, "{name}");
        for mode in [Mode::Map, Mode::Load, Mode::Stream] {
            let snapshot = Snapshot::open(&file(name), 0)?;
            let options = RestoreOptions::default().mode(mode).paused(true);
            let destination = Destination::Command(line.clone());
            let restored = vmfile::restore::restore(&snapshot, destination, &options, &control)?;
            let mut vm = Vm::connect(&directory.join("oracle"))?;
            let again = SaveOptions::default().route(Route::Stream).after(After::Quit);
            vmfile::save::save(&mut vm, &file("again"), &again, &control)?;
            assert_eq!(table(&file("again"))?, expected, "{name} by {mode:?}");
            fs::remove_file(file("again"))?;
            drop(restored);
        }
    }
    Ok(())
}
