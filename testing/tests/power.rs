//! What a file system holds if the power fails in the middle of a save: the old file or the new one, whole.

use std::fs;
use std::path::Path;
use std::time::Duration;

use vmfile::save::{After, BaseFile, Live, Route, SaveOptions};
use vmfile::{DirectIo, Existing, Snapshot};
use vmfile_format::manifest::SnapshotId;
use vmfile_testing::logged_disk::{Logged, LoggedDisk, around_flushes, cut_power};
use vmfile_testing::verbs::{check_is_clean, save_with};
use vmfile_testing::{
    Case, Guest, Mount, Qemu, Ram, Random, Release, TestResult, cases, given, requires,
};

/// How many power cuts each way to save sees, if the user does not say.
const CUTS: usize = 8;

/// The file of the last save, which each save replaces, and a file that is thin over it.
const WHOLE: &str = "vm.vmf";
const THIN: &str = "thin.vmf";

/// Bytes of the file system: room for the old file, a new one, and a thin one.
const DISK_LEN: u64 = 96 << 20;

/// A way to save, and what a cut may leave of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Direct,
    Stream,
    Native,
    Live,
    /// Makes a new file over the old one, which stays; all others replace the old one. Through the page
    /// cache: with direct I/O, ext4 has everything on the disk when the directory is synced.
    Thin,
}

impl Way {
    const ALL: [Way; 5] = [Way::Direct, Way::Stream, Way::Native, Way::Live, Way::Thin];

    fn options(self, directory: &Path) -> SaveOptions {
        let options = SaveOptions::default().after(After::Resume).existing(Existing::Replace);
        let live = Live::default().pause_max(Duration::from_secs(2));
        match self {
            Way::Direct => options.route(Route::Direct),
            Way::Stream => options.route(Route::Stream),
            Way::Native => options.route(Route::Native),
            Way::Live => options.live(Some(live)),
            Way::Thin => {
                let base = Some(BaseFile::File(directory.join(WHOLE)));
                options.base(base).thin(true).direct_io(DirectIo::Off)
            }
        }
    }

    /// The name of the file that it makes.
    fn name(self) -> &'static str {
        if self == Way::Thin { THIN } else { WHOLE }
    }
}

#[test]
fn a_power_cut_at_any_moment_leaves_a_whole_file() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut random = Random::of_this_run();
    let mut guest = Guest::boot_sector(Ram::private(16)).seed(140).boot_to(&qemu, 1)?;
    for way in Way::ALL {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let (disk, before) = (directory.path().join("disk"), directory.path().join("before"));
        requires!(Mount::make_ext4(&disk, DISK_LEN));
        let mount = requires!(Mount::of_image(&disk));
        let old = mount.path().join(WHOLE);
        save_with(&guest, &old, &SaveOptions::default().after(After::Resume))?;
        let old = id(&old)?;
        drop(mount);
        fs::copy(&disk, &before)?;

        let logged = requires!(LoggedDisk::start(&disk));
        let file = logged.path().join(way.name());
        save_with(&guest, &file, &way.options(logged.path()))?;
        let new = id(&file)?;
        // What the save has written: what follows is the end of the mount.
        let log = logged.log()?;
        drop(logged);

        let mut cuts = 0;
        let mut cut = |moment, chance: Option<&mut Random>| -> TestResult<bool> {
            cuts += 1;
            fs::copy(&before, &disk)?;
            cut_power(&disk, (&log, moment), chance)?;
            let left = left(&disk, way, (old, new));
            Ok(left.map_err(|error| format!("{way:?}, cut {moment} of {}: {error}", log.len()))?)
        };
        let moments = moments(&log, &mut random)?;
        let mut with_new = 0;
        for &moment in &moments {
            with_new += usize::from(cut(moment, Some(&mut random))?);
        }
        // The save has returned: what was not flushed may be lost.
        assert!(cut(log.len(), None)?, "{way:?}: the file was not durable when the save returned");
        println!("{way:?}: the new file had its name in {with_new} of {}", moments.len());
        cases(cuts, Case::PowerCut);
    }
    guest.runs_on(1)
}

/// Chooses moments for cuts: those around flushes first.
fn moments(log: &[Logged], random: &mut Random) -> TestResult<Vec<usize>> {
    let cuts = given("VMFILE_CUTS").map_or(Ok(CUTS), usize::try_from)?;
    let mut moments = around_flushes(log);
    while moments.len() > cuts {
        moments.swap_remove(usize::try_from(random.next_number() % moments.len() as u64)?);
    }
    while moments.len() < cuts {
        moments.push(usize::try_from(random.next_number() % (log.len() as u64 + 1))?);
    }
    Ok(moments)
}

/// Looks at what a cut left: whole files, and no others. Returns whether the new one is there.
fn left(disk: &Path, way: Way, (old, new): (SnapshotId, SnapshotId)) -> TestResult<bool> {
    let mount = Mount::of_image(disk).map_err(|missing| format!("{missing:?}"))?;
    for entry in fs::read_dir(mount.path())? {
        let name = entry?.file_name();
        let is_known = [WHOLE, THIN, "lost+found"].iter().any(|known| name == *known);
        assert!(is_known, "{name:?} was left over");
    }
    let file = mount.path().join(way.name());
    check_is_clean(&mount.path().join(WHOLE))?;
    if way == Way::Thin && !file.exists() {
        return Ok(false);
    }
    check_is_clean(&file)?;
    let found = id(&file)?;
    assert!(found == new || found == old && way != Way::Thin, "{found:?}");
    Ok(found == new)
}

fn id(file: &Path) -> TestResult<SnapshotId> {
    Ok(Snapshot::open(file, 0)?.id().ok_or("a vmfile has an id")?)
}

/// The log and the cuts do what the other test believes.
#[test]
fn a_cut_before_everything_leaves_what_was_there() -> TestResult {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let image = directory.path().join("image");
    requires!(Mount::make_ext4(&image, 32 << 20));
    let before = fs::read(&image)?;
    let logged = requires!(LoggedDisk::start(&image));
    fs::write(logged.path().join("name"), "unflushed")?;
    rustix::fs::sync();
    let log: Vec<Logged> = logged.log()?;
    drop(logged);
    assert!(!around_flushes(&log).is_empty(), "{} entries", log.len());
    for (count, is_there) in [(0, false), (log.len(), true)] {
        fs::write(&image, &before)?;
        cut_power(&image, (&log, count), None)?;
        let mount = requires!(Mount::of_image(&image));
        assert_eq!(mount.path().join("name").exists(), is_there, "{count}");
    }
    Ok(())
}
