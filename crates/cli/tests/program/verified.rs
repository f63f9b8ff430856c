//! A file with one wrong bit is refused by every verb that reads it, in every mode.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde_json::json;
use vmfile::Snapshot;
use vmfile_testing::migration::{qemu_writes, set_capability, set_parameter};
use vmfile_testing::{Case, Guest, GuestConfig, Qemu, Ram, Release, TestResult, cases, requires};

use crate::guests::{Saved, prepare, saved};
use crate::run::{EndAllIn, Said, command, processes_in, restore, vmfile, wait_until};
use crate::words;

/// A byte of a file, and the words that the error must have.
#[derive(Debug)]
struct Place {
    what: &'static str,
    offset: u64,
    words: Vec<String>,
}

impl Place {
    /// Whether only reading the pages can find the wrong bit.
    fn is_page(&self) -> bool {
        self.what == "page" || self.what == "page hash"
    }
}

/// Returns one byte of each kind of part that a file has.
fn places(file: &Path) -> TestResult<Vec<Place>> {
    let snapshot = Snapshot::open(file, 0)?;
    let manifest = snapshot.manifest().ok_or("a file of ours")?;
    let mut places = Vec::new();
    for what in ["head", "mark", "record", "bitmap", "device_state", "vm_description"] {
        let mut extents = manifest.meta.extents.iter().filter(|extent| extent.what == what);
        let extent = extents.next_back().ok_or(what)?;
        let offset = extent.offset + extent.bytes / 2;
        places.push(Place { what, offset, words: Vec::new() });
    }
    for what in ["bitmap", "device_state"] {
        let place = places.iter_mut().find(|place| place.what == what).ok_or(what)?;
        place.words = vec![format!("its {what} at file offset 0x")];
    }
    let (number, placed) = (snapshot.structure().blocks.iter().enumerate())
        .find(|(_, placed)| placed.block.name() == "pc.ram")
        .ok_or("pc.ram")?;
    let page = snapshot.bitmap(placed)?.data_runs().last().ok_or("a page")?.start;
    let offset = placed.page_offset(page).ok_or("an offset")?;
    let words = vec![format!("page {page} of RAM block \"pc.ram\", at file offset {offset:#x}")];
    let hash = manifest.meta.blocks[number].hashes_offset + 16 * page.0;
    places.push(Place { what: "page", offset: offset + 4095, words: words.clone() });
    places.push(Place { what: "page hash", offset: hash + 3, words });
    let metadata = manifest.footer.metadata_offset + manifest.footer.metadata_len / 2;
    places.push(Place { what: "metadata", offset: metadata, words: Vec::new() });
    let footer = snapshot.file_len() - 8;
    places.push(Place { what: "footer", offset: footer, words: Vec::new() });
    Ok(places)
}

/// Flips one bit of the file while `act` runs.
fn with_a_wrong_bit<T>(file: &Path, offset: u64, act: impl FnOnce() -> T) -> TestResult<T> {
    let file = File::options().read(true).write(true).open(file)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 0x10], offset)?;
    let result = act();
    file.write_all_at(&byte, offset)?;
    Ok(result)
}

/// Asserts that the verb refused the file and named what is wrong with it: a case for each verb and each byte.
fn assert_refused(said: &Said, file: &Path, place: &Place) {
    let name = file.display().to_string();
    let words: Vec<&str> = [&name].into_iter().chain(&place.words).map(String::as_str).collect();
    said.assert(4, &words);
    cases(1, Case::Flip);
}

/// Restores in every mode; expects that QEMU is gone after a restore that failed.
fn restore_in_all_modes(
    qemu: &Qemu,
    config: &GuestConfig,
    file: &Path,
    mut judge: impl FnMut(&str, &Said) -> TestResult,
) -> TestResult {
    for mode in ["map", "map --verify", "load", "stream"] {
        let (prepared, EndAllIn(directory)) = &prepare(config, qemu)?;
        let mut arguments = words![file, "--mode"].to_vec();
        arguments.extend(mode.split(' ').map(OsString::from));
        let said = restore(&arguments, &prepared.command_line());
        judge(mode, &said)?;
        if said.code != Some(0) {
            wait_until("QEMU is gone", || processes_in(directory).is_empty())?;
        }
    }
    Ok(())
}

/// Only `check` verified checksums. With one wrong bit in a page, the device state or a bitmap,
/// `restore` by map, load and stream exited with 0, and so did `send`. `convert` to a stream and
/// back made a file that `check` accepted, with a new hash of the wrong page.
#[test]
fn one_wrong_bit_anywhere_is_refused_by_every_verb_in_every_mode() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::private(16)).seed(24);
    let Saved { file, directory, .. } = &saved(&qemu, &config)?;
    let new = directory.path().join("new");
    for place in places(file)? {
        with_a_wrong_bit(file, place.offset, || {
            restore_in_all_modes(&qemu, &config, file, |mode, said| {
                // A mapped restore does not read the pages, unless `--verify` is given.
                if !(mode == "map" && place.is_page()) {
                    println!("{} by {mode}", place.what);
                    assert_refused(said, file, &place);
                }
                Ok(())
            })?;
            println!("{} by send and convert", place.what);
            assert_refused(&send(file, &new)?, file, &place);
            assert_no_whole_stream(&new, &directory.path().join("received"))?;
            let said = vmfile(words!["convert", file, new, "--to", "stream"]);
            assert_refused(&said, file, &place);
            assert!(!new.exists(), "{place:?}");
            TestResult::Ok(())
        })??;
    }
    restore_in_all_modes(&qemu, &config, file, |mode, said| {
        let verified = if mode == "map" { "all but the pages" } else { "yes" };
        said.assert(0, &["restored  running", &format!("verified  {verified}")]);
        Ok(())
    })
}

/// Sends `file` to a new file, as a shell does with `>`.
fn send(file: &Path, stream: &Path) -> TestResult<Said> {
    let mut command = command();
    command.args(words!["send", file]);
    command.stdout(File::options().create_new(true).write(true).open(stream)?);
    Ok(command.output()?.into())
}

/// Asserts that `receive` refuses `stream`, and removes `stream`.
fn assert_no_whole_stream(stream: &Path, file: &Path) -> TestResult {
    let mut receive = command();
    receive.args(words!["receive", file]).stdin(File::open(stream)?);
    let said = Said::from(receive.output()?);
    assert_eq!(said.code, Some(4), "{said:?}");
    assert!(!file.exists());
    Ok(fs::remove_file(stream)?)
}

/// Pages go over channels, and the device state and the end over the stream. If a channel finds a
/// wrong page, QEMU must not receive all the rest and run.
#[test]
fn a_wrong_page_that_is_sent_by_a_channel_ends_in_a_qemu_that_refuses() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let (source, qemu) =
            (requires!(Qemu::of(Release::Distribution)), requires!(Qemu::of(release)));
        let config = Guest::boot_sector(Ram::private(64)).seed(25).machine_version("7.2");
        let Saved { file, directory, .. } = &saved(&source, &config)?;
        let places = places(file)?;
        let place = places.iter().find(|place| place.what == "page").ok_or("a page")?;
        let mut waiting = config.incoming(&qemu, "defer")?;
        set_capability(&mut waiting, "multifd")?;
        set_parameter(&mut waiting, "multifd-channels", json!(2))?;
        let socket = directory.path().join("incoming");
        let address = format!("unix:{}", socket.display());
        waiting.qmp("migrate-incoming", json!({ "uri": address }))?;
        let said = with_a_wrong_bit(file, place.offset, || {
            vmfile(words!["send", file, "--connect", address, "--channels", "2"])
        })?;
        assert_refused(&said, file, place);
        wait_until("QEMU has refused", || {
            // QEMU before 9.1 ends when it refuses a stream.
            let answer = waiting.qmp("query-migrate", json!({}));
            answer.map_or(true, |answer| answer["status"] == "failed")
        })?;
    }
    Ok(())
}

/// QEMU's files have no hashes. With `--verify`, vmfile refuses to restore such a file; without it,
/// the report says that the pages were not verified.
#[test]
fn a_file_without_hashes_is_not_called_verified() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::private(16)).seed(26);
    let mut guest = config.boot_to(&qemu, 1)?;
    let directory = crate::guests::directory()?;
    let path = |name: &str| directory.path().join(name);
    qemu_writes(&mut guest, &format!("file:{}", path("by-qemu").display()))?;
    drop(guest);
    let prepared = config.prepare(&qemu)?;
    let said = restore(&words![path("by-qemu"), "--verify"], &prepared.command_line());
    said.assert(2, &["its pages have no hashes", "hint: "]);
    let said = vmfile(words!["convert", path("by-qemu"), path("stream"), "--to", "stream"]);
    said.assert(0, &["verified  no: QEMU wrote the file, and its pages have no hashes"]);
    let said = send(&path("by-qemu"), &path("sent"))?;
    said.assert(0, &["no: QEMU wrote the file"]);
    Ok(())
}
