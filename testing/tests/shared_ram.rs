//! Guest RAM in files that another process writes to, or truncates, during a save.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use vmfile::save::{After, SaveOptions};
use vmfile::{Backend, Control, Jobs, Progress, Vm};
use vmfile_testing::verbs::check_is_clean;
use vmfile_testing::{Guest, Ram, TestResult, requires};

const RAM_MIB: u64 = 128;

fn options(io: Backend) -> SaveOptions {
    SaveOptions::default().io(io).after(After::Pause)
}

/// A vhost-user back end, for example, writes to guest memory while the guest is paused. A page was
/// read once for its hash and again for the write, so `check` refused the file after the VM had
/// ended.
#[test]
fn a_file_is_whole_although_another_process_writes_to_the_ram_meanwhile() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::tmpfs(RAM_MIB)).seed(71).boot_to(&qemu, 1)?;
    let ram = File::options().write(true).open(guest.ram_file("pc.ram").ok_or("a file")?)?;
    let stop = AtomicBool::new(false);
    let writes = AtomicU32::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1_u64.. {
                for page in 0..RAM_MIB * 256 {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    // Words at both ends of the page, so that a page may be read half old and half
                    // new.
                    for at in [0, 4088] {
                        let written = ram.write_all_at(&round.to_ne_bytes(), page * 4096 + at);
                        written.expect("the file that is RAM");
                    }
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let saved = (0..4).try_for_each(|number| {
            let io = if number % 2 == 0 { Backend::Auto } else { Backend::Threads };
            check_is_clean(&guest.save(&options(io))?.file)
        });
        stop.store(true, Ordering::Relaxed);
        saved
    })?;
    assert!(writes.into_inner() > 1000, "somebody wrote meanwhile");
    Ok(())
}

/// The RAM file was mapped, and access beyond its new end raised SIGBUS: vmfile died and left the
/// VM paused.
#[test]
fn a_ram_file_that_is_cut_in_the_middle_of_a_save_is_an_error() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    for io in [Backend::Auto, Backend::Threads] {
        let mut guest = Guest::boot_sector(Ram::tmpfs(RAM_MIB)).seed(72).boot_to(&qemu, 1)?;
        // A running guest would access the memory that is cut off.
        guest.stop()?;
        let ram = File::options().write(true).open(guest.ram_file("pc.ram").ok_or("a file")?)?;
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("vm.vmf");
        let calls = AtomicU32::new(0);
        let cut = |_: Progress| {
            if calls.fetch_add(1, Ordering::Relaxed) == 0 {
                ram.set_len(80 << 20).expect("the file that is RAM");
            }
        };
        let mut vm = Vm::connect(&guest.qmp_path())?;
        let stop = Arc::new(AtomicBool::new(false));
        let options = options(io).jobs(Jobs::new(1).ok_or("one")?);
        let result = vmfile::save::save(&mut vm, &file, &options, &Control::new(&stop, &cut));
        let error = result.expect_err("the RAM is not there any more");
        let source = std::error::Error::source(&error).ok_or("a cause")?;
        let expected =
            "the file that backs it has been cut: it has 83886080 bytes, expected 134217728";
        assert_eq!(source.to_string(), expected);
        assert!(error.to_string().contains("RAM block \"pc.ram\""), "{error}");
        assert_eq!(guest.status()?, "paused");
        assert_eq!(fs::read_dir(directory.path())?.count(), 0, "no file is left");
    }
    Ok(())
}
