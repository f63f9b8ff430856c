//! `save --base`: only what changed is written, and every verb finds the rest in the base.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::time::Duration;

use vmfile::convert::{ConvertOptions, Format, convert};
use vmfile::error::SaveError;
use vmfile::restore::Mode;
use vmfile::save::{After, BaseFile, BaseUsed, Live, LiveMethod, Route, SaveOptions, SaveReport};
use vmfile::{Control, Existing, Snapshot};
use vmfile_testing::verbs::restore;
use vmfile_testing::{
    Case, Guest, Machine, Mount, Qemu, Ram, Release, Saved, TestResult, cases, given, requires,
};

fn resumed() -> SaveOptions {
    SaveOptions::default().after(After::Resume)
}

fn live() -> SaveOptions {
    let live = Live::default().pause_max(Duration::from_secs(2));
    resumed().live(Some(live))
}

fn on(base: &Path) -> Option<BaseFile> {
    Some(BaseFile::File(base.to_path_buf()))
}

/// Returns whether the file is thin, how many pages are the base's, and how many bytes were read.
fn base_used(report: &SaveReport) -> (bool, u64, u64) {
    match &report.base {
        Some(BaseUsed::Yes { thin, pages, bytes_read, .. }) => (*thin, *pages, *bytes_read),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_chain_of_thin_files_comes_back_in_every_mode() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let config = Guest::boot_sector(Ram::private(128)).seed(301).busy();
    let mut guest = config.boot_to(&qemu, 2)?;
    let first = guest.save(&resumed())?;
    guest.runs_on(1)?;
    let second = guest.save(&resumed().base(on(&first.file)))?;
    let (thin, pages, _) = base_used(&second.report);
    assert!(thin && pages > 0, "{:?}", second.report.base);
    assert!(second.report.bytes_written < first.report.bytes_written, "{:?}", second.report);
    guest.runs_on(1)?;
    let third = guest.save(&live().base(on(&second.file)))?;
    assert_eq!(third.report.live_method, Some(LiveMethod::Userfault));
    assert!(base_used(&third.report).0);
    guest.runs_on(1)?;
    drop(guest);
    third.comes_back(&qemu, [Mode::Map, Mode::Load, Mode::Stream])?;
    let whole = third.directory.path().join("whole.vmf");
    let (from, options) = ((third.file.as_path(), 0), ConvertOptions::default());
    convert(from, &whole, Format::MappedRam, &options, &Control::none())?;
    let converted = restore(&qemu, &config, &whole, Mode::Map)?;
    third.goes_on_in(&converted)?;
    drop(converted);
    // It has what the thin file says of the VM, and needs no other.
    let (one, other) = (Snapshot::open(&whole, 0)?, Snapshot::open(&third.file, 0)?);
    let vm = |snapshot: &Snapshot| snapshot.manifest().map(|manifest| manifest.meta.vm.clone());
    assert!(one.base().is_none() && vm(&one) == vm(&other));
    second.comes_back(&qemu, [Mode::Map])?;
    first.comes_back(&qemu, [Mode::Map])
}

/// The new file needs no other: its base is removed first.
#[test]
fn a_file_system_that_shares_extents_makes_a_whole_file() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let xfs = requires!(Mount::xfs(1024));
    let mut guest = Guest::boot_sector(Ram::memfd(128)).seed(302).busy().boot_to(&qemu, 2)?;
    let first = guest.save_below(xfs.path(), &resumed())?;
    guest.runs_on(1)?;
    let second = guest.save_below(xfs.path(), &resumed().base(on(&first.file)))?;
    let (thin, pages, _) = base_used(&second.report);
    assert!(!thin && pages > 0, "{:?}", second.report.base);
    guest.runs_on(1)?;
    let third = guest.save_below(xfs.path(), &live().base(on(&second.file)))?;
    assert!(!base_used(&third.report).0);
    guest.runs_on(1)?;
    let thin = guest.save_below(xfs.path(), &resumed().base(on(&third.file)).thin(true))?;
    assert!(base_used(&thin.report).0, "it was asked for");
    drop(guest);
    drop((first, second));
    third.comes_back(&qemu, [Mode::Map, Mode::Load])?;
    thin.comes_back(&qemu, [Mode::Map, Mode::Load])
}

/// What a sandbox does: clone, work, checkpoint, again and again. Only what was written is read.
#[test]
fn checkpoints_of_a_mapped_guest_read_what_it_wrote() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let mut guest =
        Guest::boot_sector(Ram::private(128)).seed(303).data_share(4).boot_to(&qemu, 2)?;
    let template = guest.save(&resumed())?;
    drop(guest);
    let mut clone = template.comes_back_on(&qemu, Mode::Map)?;
    let auto = live().base(Some(BaseFile::Auto));
    let mut files: Vec<Saved> = Vec::new();
    for _ in 0..3 {
        clone.runs_on(1)?;
        let saved = clone.save(&auto)?;
        let method = saved.report.live_method.as_ref();
        assert!(matches!(method, Some(LiveMethod::Aside { .. })), "{:?}", saved.report);
        let (thin, pages, bytes_read) = base_used(&saved.report);
        assert!(thin && pages > 0, "{:?}", saved.report.base);
        let all = saved.report.pages_total * 4096;
        assert!(bytes_read < all, "{bytes_read} of {all}");
        let expected = files.last().unwrap_or(&template).report.id.clone();
        let Some(BaseUsed::Yes { id, .. }) = &saved.report.base else { unreachable!() };
        assert_eq!(id.to_string(), expected, "each is on top of the one before");
        files.push(saved);
    }
    drop(clone);
    let last = files.pop().ok_or("three were made")?;
    last.comes_back(&qemu, [Mode::Map, Mode::Load])?;
    // Roll back to the first one, and branch from there.
    let mut branch = files[0].comes_back_on(&qemu, Mode::Map)?;
    let branched = branch.save(&auto)?;
    let Some(BaseUsed::Yes { id, .. }) = &branched.report.base else {
        panic!("{:?}", branched.report.base)
    };
    assert_eq!(id.to_string(), files[0].report.id);
    drop(branch);
    branched.comes_back(&qemu, [Mode::Map])
}

#[test]
fn a_base_that_cannot_be_one_is_refused_and_the_guest_runs_on() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(305).boot_to(&qemu, 1)?;
    let base = guest.save(&resumed())?;
    let refused = |guest: &Guest, base: &Path, word: &str| -> TestResult {
        let error = guest.save_fails(&resumed().base(on(base)))?;
        let words = format!("{error}: {:?}", std::error::Error::source(&error));
        assert!(words.contains(word), "{words}, expected {word:?}");
        cases(1, Case::WrongInput);
        Ok(())
    };
    // Of another machine, and of another size.
    let other = Guest::boot_sector(Ram::private(64)).seed(305).machine(Machine::Q35);
    let other = other.boot_to(&qemu, 1)?.save_and_end(&SaveOptions::default())?;
    refused(&guest, &other.file, "machine type")?;
    let larger = Guest::boot_sector(Ram::private(96)).seed(305);
    let larger = larger.boot_to(&qemu, 1)?.save_and_end(&SaveOptions::default())?;
    refused(&guest, &larger.file, "no RAM block")?;
    // Cut, and gone.
    let cut = base.directory.path().join("cut.vmf");
    fs::copy(&base.file, &cut)?;
    fs::File::options().write(true).open(&cut)?.set_len(fs::metadata(&cut)?.len() - 1)?;
    refused(&guest, &cut, "LostEnd")?;
    refused(&guest, &base.directory.path().join("none.vmf"), "NotFound")?;
    // Thin, and its own base is gone.
    let thin = guest.save(&resumed().base(on(&base.file)))?;
    let moved = base.file.with_extension("moved");
    fs::rename(&base.file, &moved)?;
    refused(&guest, &thin.file, "BaseMissing")?;
    fs::rename(&moved, &base.file)?;
    // The file that needs the base would replace it.
    let options = resumed().base(on(&base.file)).existing(Existing::Replace);
    let error = vmfile_testing::verbs::save_with(&guest, &base.file, &options);
    let error = error.expect_err("it would be replaced").to_string();
    assert!(error.contains("would be replaced"), "{error}");
    // QEMU's stream has all pages.
    let error = guest.save_fails(&resumed().base(on(&base.file)).route(Route::Stream))?;
    assert!(matches!(error, SaveError::BaseNeedsMemory { .. }), "{error}");
    guest.runs_on(2)?;
    thin.comes_back(&qemu, [Mode::Load])
}

/// On another file system than the base nothing can be shared.
#[test]
fn a_base_on_another_file_system_makes_a_thin_file() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let xfs = requires!(Mount::xfs(512));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(306).boot_to(&qemu, 1)?;
    let base = guest.save(&resumed())?;
    let saved = guest.save_below(xfs.path(), &resumed().base(on(&base.file)))?;
    let Some(BaseUsed::Yes { thin_reason: Some(reason), .. }) = &saved.report.base else {
        panic!("{:?}", saved.report.base)
    };
    assert!(reason.contains("ross-device"), "{reason}");
    drop(guest);
    saved.comes_back(&qemu, [Mode::Map])
}

/// `auto` does not trust the path: another file under the name is not taken.
#[test]
fn auto_without_a_file_saves_all_and_says_why() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(307).boot_to(&qemu, 1)?;
    let auto = resumed().base(Some(BaseFile::Auto));
    let unused = |report: &SaveReport| match &report.base {
        Some(BaseUsed::No { reason }) => reason.clone(),
        other => panic!("{other:?}"),
    };
    let first = guest.save(&auto)?;
    assert!(unused(&first.report).contains("neither saved nor restored"));
    let second = guest.save(&auto)?;
    assert!(base_used(&second.report).1 > 0);
    // A page of another file where the last one was.
    fs::copy(&first.file, &second.file)?;
    let third = guest.save(&auto)?;
    assert!(unused(&third.report).contains("has the id"), "{:?}", third.report.base);
    let bytes = fs::File::open(&third.file)?;
    bytes.read_exact_at(&mut [0; 8], 0)?;
    assert!(Snapshot::open(&third.file, 0)?.base().is_none());
    guest.runs_on(1)
}

/// How many checkpoints a test run makes; `VMFILE_CHECKPOINTS` says another number.
const CHECKPOINTS: u64 = 12;

/// Each is on top of the one before, whole on a file system that shares extents; none takes more room than
/// those before, and every tenth is restored.
#[test]
fn many_checkpoints_in_a_row_do_not_grow() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let xfs = requires!(Mount::xfs(8 << 10));
    let checkpoints = given("VMFILE_CHECKPOINTS").unwrap_or(CHECKPOINTS);
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(308).busy().boot_to(&qemu, 2)?;
    let mut last = guest.save_below(xfs.path(), &live())?;
    let room = fs::metadata(&last.file)?.blocks();
    for checkpoint in 1..=checkpoints {
        let saved = guest.save_below(xfs.path(), &live().base(Some(BaseFile::Auto)))?;
        let (thin, _, _) = base_used(&saved.report);
        assert!(!thin, "{checkpoint}: {:?}", saved.report.base);
        let now = fs::metadata(&saved.file)?.blocks();
        // XFS (6.18) would reserve 128 KiB for each page that is written, and free the rest minutes later.
        assert!(now < room * 5 / 4, "{checkpoint}: {now} blocks, {room} at first");
        // The one before is removed only now: the base of the next is this one.
        last = saved;
        if checkpoint % 10 == 0 {
            last.comes_back(&qemu, [Mode::Map])?;
        }
    }
    guest.runs_on(1)?;
    drop(guest);
    last.comes_back(&qemu, [Mode::Map, Mode::Load])
}
