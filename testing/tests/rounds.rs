//! One guest that is saved and restored again and again, by every way in turn: its memory and its disk stay
//! right, and nothing is left of any round.
//!
//! `cargo xtask chaos rounds` makes more rounds than a test has time for.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use vmfile::Channels;
use vmfile::restore::Mode;
use vmfile::save::{After, BaseFile, Live, Route, SaveOptions};
use vmfile_testing::{Case, Guest, Qemu, Ram, Release, Saved, TestResult, cases, given, requires};

/// How many rounds a test makes.
const ROUNDS: usize = 8;

/// After so many rounds, each way has been used, and what stays for ever is there.
const FIRST: usize = 7;

/// How much more memory this process may use after all rounds than after the first ones: 1 MiB.
const GROWTH_KIB: u64 = 1 << 10;

/// By itself, the allocator (glibc 2.36) keeps freed blocks of up to 32 MiB, tens of MiB of them after some
/// rounds. With a threshold that is given, it returns each of that many bytes to the kernel.
const RETURN_TO_KERNEL: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "65536");

/// Returns the options of a round, and in which mode its file is restored. `whole` is the last file that
/// is whole.
fn way(round: usize, whole: Option<&Path>) -> (SaveOptions, Mode) {
    let options = SaveOptions::default().after(After::Quit);
    let live = options.clone().live(Some(Live::default().pause_max(Duration::from_secs(2))));
    let live = live.after(After::Resume);
    let base = whole.map(|file| BaseFile::File(file.to_path_buf()));
    match round % 7 {
        0 => (options.route(Route::Direct), Mode::Map),
        1 => (live.base(base), Mode::Map),
        2 => (options.route(Route::Stream), Mode::Load),
        3 => (options.base(base).thin(true), Mode::Stream),
        4 => (options.route(Route::Native), Mode::Map),
        5 => (live.route(Route::Stream), Mode::Load),
        _ => (options.route(Route::Stream).channels(Channels::new(2)), Mode::Stream),
    }
}

/// What this process holds.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
    children: Vec<String>,
}

impl Held {
    fn now() -> TestResult<Held> {
        let count = |directory: &str| -> TestResult<usize> { Ok(fs::read_dir(directory)?.count()) };
        let children = fs::read_to_string("/proc/thread-self/children")?;
        let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Ok(Held {
            descriptors: count("/proc/self/fd")?,
            threads: count("/proc/self/task")?,
            children: children.split_whitespace().map(name).collect(),
        })
    }
}

/// Returns how much memory this process uses that no file backs, in KiB.
fn own_memory() -> TestResult<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[test]
fn a_guest_that_is_saved_and_restored_again_and_again_is_right_and_leaves_nothing() -> TestResult {
    let (name, value) = RETURN_TO_KERNEL;
    if std::env::var_os(name).is_some_and(|given| given == value) {
        // The first line follows the name of the test.
        println!("with {name}={value}");
        let qemu = requires!(Qemu::of(Release::Distribution));
        println!("{}", rounds(&qemu)?);
        return Ok(());
    }
    // The allocator reads its settings when a process starts.
    let mut again = Command::new(std::env::current_exe()?);
    let again = again.args(std::env::args_os().skip(1)).env(name, value);
    let output = again.env("RUST_TEST_NOCAPTURE", "1").output()?;
    let (said, errors) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    // Its other lines would be counted as those of one more test.
    let is_read = |line: &&str| ["cases: ", "skipped: "].iter().any(|head| line.starts_with(head));
    said.lines().filter(is_read).for_each(|line| println!("{line}"));
    if output.status.success() {
        return Ok(());
    }
    Err(format!("the rounds: {}\n{said}{errors}", output.status).into())
}

/// Makes the rounds, and says what this process held and used.
fn rounds(qemu: &Qemu) -> TestResult<String> {
    let rounds = given("VMFILE_ROUNDS").map_or(Ok(ROUNDS), usize::try_from)?;
    let config = Guest::linux(Ram::private(192)).vcpus(2).disk(16);
    let mut guest = config.boot_to(qemu, 2)?;
    let (mut whole, mut last): (Option<Saved>, Option<Saved>) = (None, None);
    let (mut first, mut done) = (None, 0);
    for round in 0..rounds {
        let (options, mode) = way(round, whole.as_ref().map(|saved| saved.file.as_path()));
        let saved = guest.save_and_end(&options).map_err(|error| format!("{round}: {error}"))?;
        drop(guest);
        guest = saved.comes_back_on(qemu, mode).map_err(|error| format!("{round}: {error}"))?;
        // The file that the guest has mapped, and the one below it, must stay.
        if saved.report.base.is_none() {
            whole = Some(saved);
        } else {
            last = Some(saved);
        }
        if round + 1 == FIRST {
            first = Some((Held::now()?, own_memory()?));
        }
        done += 1;
    }
    let (held, memory) = first.ok_or("more rounds than that")?;
    let (held_now, memory_now) = (Held::now()?, own_memory()?);
    let said = format!("{rounds} rounds; {held_now:?}, {memory} KiB, then {memory_now} KiB");
    assert_eq!(held_now, held);
    assert!(memory_now < memory + GROWTH_KIB, "{said}");
    drop((guest, whole, last));
    cases(done, Case::Round);
    Ok(said)
}
