//! Small runs of `vmfile bench`: its numbers are plausible, and no files or processes are left.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use vmfile_testing::{Guest, Mount, Qemu, Ram, SlowDisk, TestResult, requires};

use crate::guests::directory;
use crate::run::{Said, command, names_in, pid, processes_in, vmfile, wait_until};
use crate::words;

/// Makes a directory for `PATH` that has only these programs.
fn only(programs: &[&str]) -> TestResult<TempDir> {
    let directory = tempfile::tempdir()?;
    let path = std::env::var_os("PATH").ok_or("no PATH")?;
    for name in programs {
        let found = std::env::split_paths(&path).map(|place| place.join(name));
        let found = found.into_iter().find(|path| path.is_file()).ok_or("no such program")?;
        symlink(found, directory.path().join(name))?;
    }
    Ok(directory)
}

/// Prepares a benchmark without libvirt, whose saves and restores take seconds each. The returned
/// directory holds its programs.
fn bench(qemu: &Qemu, more: &[&str], into: &Path) -> TestResult<(Command, TempDir)> {
    let programs = only(&["sh", "cat", "sync", "touch", "fio", "findmnt"])?;
    let mut command = command();
    command.env("PATH", programs.path()).args(["--json", "bench", "--dir"]).arg(into);
    command.arg("--qemu").arg(qemu_path(qemu)?).args(more);
    Ok((command, programs))
}

/// Returns the whole path of QEMU's program: the benchmark's `PATH` does not have it.
fn qemu_path(qemu: &Qemu) -> TestResult<std::path::PathBuf> {
    let program = qemu.program();
    if program.is_absolute() {
        return Ok(program.to_path_buf());
    }
    let path = std::env::var_os("PATH").ok_or("no PATH")?;
    let mut found = std::env::split_paths(&path).map(|place| place.join(program));
    Ok(found.find(|path| path.is_file()).ok_or("no QEMU in PATH")?)
}

/// Starts a benchmark, sends SIGINT when it says that it does `step`, and waits for its end.
fn interrupted(command: &mut Command, step: &str) -> TestResult<Said> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let stderr = BufReader::new(child.stderr.take().ok_or("piped")?);
    let mut lines = stderr.lines().map_while(Result::ok);
    lines.find(|line| line.contains(step)).ok_or_else(|| format!("it does not say {step:?}"))?;
    kill_process(pid(child.id()), Signal::INT)?;
    drop(lines.last());
    Ok(child.wait_with_output()?.into())
}

fn way<'a>(ways: &'a Value, name: &str) -> TestResult<&'a Value> {
    let ways = ways.as_array().ok_or("no list of ways")?;
    let way = ways.iter().find(|way| way["name"].as_str().is_some_and(|n| n.starts_with(name)));
    way.ok_or_else(|| format!("no way {name}").into())
}

fn number(value: &Value, name: &str) -> TestResult<f64> {
    value[name].as_f64().ok_or_else(|| format!("no number {name} in {value}").into())
}

#[test]
fn all_ways_are_measured_and_the_numbers_are_plausible() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let files = directory()?;
    let page = files.path().join("bench.html");
    let work = files.path().join("work");
    fs::create_dir(&work)?;
    let options = ["--size", "128M", "--ram", "shared", "--runs", "2", "--data", "50"];
    let (mut command, _programs) = bench(&qemu, &options, &work)?;
    let said: Said = command.arg("--html").arg(&page).output()?.into();
    assert_eq!(said.code, Some(0), "{said:?}");
    let report = said.json()?;
    let scene = &report["scenes"][0];

    // Half of the pages are random, a tenth are repeated, and the firmware uses some.
    let (ram, data) = (128 << 20, scene["guest"]["data_bytes"].as_u64().ok_or("data")?);
    assert!((ram * 40 / 100..ram * 65 / 100).contains(&data), "{data} of {ram}");
    for ways in ["saves", "restores"] {
        for way in scene[ways].as_array().ok_or("ways")? {
            let runs = way["runs"].as_array().ok_or("runs")?;
            assert_eq!(runs.len(), 2, "{way}");
            let seconds: Vec<f64> =
                runs.iter().map(|run| number(run, "seconds")).collect::<TestResult<_>>()?;
            assert!(seconds.iter().all(|&time| time > 0.001 && time < 60.0), "{way}");
            let mean = seconds.iter().sum::<f64>() / 2.0;
            assert!((number(&way["seconds"], "mean")? - mean).abs() < 1e-9, "{way}");
            let rate = data as f64 / f64::from(1 << 30) / seconds[0];
            assert!((number(&runs[0], "gib_per_second")? - rate).abs() < 1e-6, "{way}");
        }
    }
    let saves = &scene["saves"];
    for name in ["fio", "vmfile save --route stream", "vmfile save --route native"] {
        way(saves, name)?;
    }
    for name in ["QEMU exec:vmfile receive", "QEMU exec:cat", "vmfile save --live"] {
        way(saves, name)?;
    }
    // A file that was written through the page cache stays in it; one written with direct I/O is
    // not in it.
    let first = |name| TestResult::Ok(way(saves, name)?["runs"][0].clone());
    let cached = number(&first("QEMU file: stream")?, "cached_bytes")?;
    assert!(cached > data as f64 * 0.9, "{cached} of {data}");
    let ours = first("vmfile save")?;
    assert!(number(&ours, "cached_bytes")? < data as f64 * 0.1, "{ours}");
    assert!(number(&ours, "pause_seconds")? < number(&ours, "seconds")?, "{ours}");
    assert!(number(&ours, "peak_memory_bytes")? < f64::from(100 << 20), "{ours}");
    for name in ["vmfile restore --mode map, cold", "vmfile restore --mode load, warm"] {
        way(&scene["restores"], name)?;
    }
    let channels = way(saves, "QEMU file: mapped-ram, multifd")?;
    assert!(number(channels, "ratio_to_vmfile")? > 0.0);

    let missing = report["not_measured"].as_array().ok_or("not_measured")?;
    let libvirt = missing.iter().find(|note| note["what"] == "virsh save").ok_or("no word")?;
    assert!(libvirt["why"].as_str().is_some_and(|why| why.contains("not installed")));
    let page = fs::read_to_string(page)?;
    assert!(page.contains("vmfile save --route native") && page.contains("<svg"));
    assert_eq!(names_in(&work), Vec::<String>::new(), "nothing is left");
    assert_eq!(processes_in(&work), Vec::<i32>::new(), "nobody is left");
    Ok(())
}

#[test]
fn a_slow_disk_shows_up_as_slow() -> TestResult {
    const MIB_PER_SECOND: u64 = 60;
    let qemu = requires!(qemu >= "9.1");
    let disk = requires!(SlowDisk::ext4(700, MIB_PER_SECOND));
    let options = ["--size", "64M", "--runs", "1", "--data", "60", "--repeated", "0"];
    let (inner, _programs) = bench(&qemu, &options, disk.path())?;
    let mut outer = disk.command(Path::new(inner.get_program()));
    for (name, value) in inner.get_envs() {
        if let Some(value) = value {
            outer.env(name, value);
        }
    }
    // The benchmark's `PATH` has the `sh` that starts it in the control group.
    let said: Said = outer.args(inner.get_args()).stdin(Stdio::null()).output()?.into();
    assert_eq!(said.code, Some(0), "{said:?}");
    let report = said.json()?;
    let scene = &report["scenes"][0];
    let data = number(&scene["guest"], "data_bytes")?;
    let least = data / (MIB_PER_SECOND << 20) as f64 * 0.7;
    for name in ["fio", "vmfile save", "QEMU exec:vmfile receive", "vmfile save --route native"] {
        let way = way(&scene["saves"], name)?;
        let median = number(&way["seconds"], "median")?;
        assert!(median >= least, "{name}: {median} s, the disk alone takes {least} s");
    }
    Ok(())
}

#[test]
fn a_vm_that_runs_is_measured_and_runs_on() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let files = directory()?;
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(141).boot_to(&qemu, 1)?;
    let (mut command, _programs) = bench(&qemu, &["--runs", "1", "--vm"], files.path())?;
    let said: Said = command.arg(guest.qmp_path()).output()?.into();
    assert_eq!(said.code, Some(0), "{said:?}");
    let report = said.json()?;
    way(&report["scenes"][0]["saves"], "vmfile save")?;
    assert_eq!(report["scenes"][0]["restores"], serde_json::json!([]));
    guest.runs_on(2)?;
    assert_eq!(names_in(files.path()), Vec::<String>::new());
    Ok(())
}

#[test]
fn a_signal_ends_guests_and_removes_files() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let files = directory()?;
    let (mut command, _programs) = bench(&qemu, &["--size", "256M"], files.path())?;
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    wait_until("a file is written", || {
        let inner = names_in(files.path()).pop();
        inner.is_some_and(|name| !names_in(&files.path().join(name)).is_empty())
    })?;
    kill_process(pid(child.id()), Signal::INT)?;
    assert_eq!(child.wait()?.code(), Some(130));
    assert_eq!(names_in(files.path()), Vec::<String>::new());
    wait_until("nobody is left", || processes_in(files.path()).is_empty())
}

#[test]
fn what_cannot_be_measured_is_said_and_bad_input_refused() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let files = directory()?;
    for (words, what) in [
        (["--size", "1X"], "such as 512M or 4G"),
        (["--size", "8M"], "64M or more"),
        (["--data", "101"], "101"),
        (["--runs", "0"], "0"),
        (["--ram", "paper"], "paper"),
    ] {
        vmfile(["bench", words[0], words[1]]).assert(2, &[what]);
    }
    vmfile(["bench", "--data", "60", "--repeated", "60"]).assert(2, &["100 %"]);
    let nowhere = files.path().join("nowhere");
    vmfile(words!["bench", "--dir", nowhere]).assert(5, &["nowhere"]);
    vmfile(words!["bench", "--dir", files.path(), "--qemu", "/nowhere/qemu"])
        .assert(3, &["/nowhere/qemu", "hint: --qemu"]);
    vmfile(words!["bench", "--dir", files.path(), "--size", "900G"]).assert(5, &["--size"]);
    let small = requires!(Mount::tmpfs(60));
    let (mut command, _programs) = bench(&qemu, &["--size", "64M"], small.path())?;
    let said: Said = command.output()?.into();
    said.assert(5, &["the files need"]);
    assert_eq!(names_in(small.path()), Vec::<String>::new());
    Ok(())
}

/// A Ctrl-C in the last round discarded all rounds before it, ten minutes of work.
#[test]
fn a_signal_in_a_later_round_keeps_the_rounds_before() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let files = directory()?;
    let words =
        ["--size", "64M", "--runs", "50", "--saves-only", "--ram", "private", "--progress", "json"];
    let (mut command, _programs) = bench(&qemu, &words, files.path())?;
    // Without fio, bench skips the search for the best settings of the disk, which takes minutes.
    let programs = only(&["sh", "cat", "sync", "touch", "findmnt"])?;
    command.env("PATH", programs.path());
    let said = interrupted(&mut command, "round 2 of 50")?;
    said.assert(130, &["stopped by a signal"]);
    let report = said.json()?;
    let ours = way(&report["scenes"][0]["saves"], "vmfile")?;
    assert!(ours["runs"].as_array().is_some_and(|runs| !runs.is_empty()), "{ours}");
    assert_eq!(names_in(files.path()), Vec::<String>::new());
    wait_until("nothing is left", || processes_in(files.path()).is_empty())
}

/// One Ctrl-C in a sweep lost ten minutes of rounds.
#[test]
fn a_signal_in_a_sweep_keeps_what_was_measured_before() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let files = directory()?;
    let words = ["--size", "64M", "--runs", "2", "--saves-only", "--ram", "private", "--sweep"];
    let (mut command, _programs) = bench(&qemu, &words, files.path())?;
    command.args(["--ways", "vmfile save,exec", "--progress", "json"]);
    let said = interrupted(&mut command, "sweep of RAM: 256")?;
    said.assert(130, &["the sweeps that were still to be measured", "stopped by a signal"]);
    let report = said.json()?;
    let saves = &report["scenes"][0]["saves"];
    assert_eq!(way(saves, "vmfile save")?["runs"].as_array().map(Vec::len), Some(2));
    let names: Vec<&str> =
        saves.as_array().into_iter().flatten().filter_map(|way| way["name"].as_str()).collect();
    let is_chosen = |name: &&str| name.contains("vmfile save") || name.contains("exec");
    assert!(names.len() > 2 && names.iter().all(is_chosen), "{names:?}");
    assert_eq!(names_in(files.path()), Vec::<String>::new());
    wait_until("nothing is left", || processes_in(files.path()).is_empty())
}

#[test]
fn a_way_that_there_is_not_is_said() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let files = directory()?;
    let words = ["--size", "64M", "--runs", "1", "--ram", "private", "--ways", "carrier pigeon"];
    let (mut command, _programs) = bench(&qemu, &words, files.path())?;
    Said::from(command.output()?).assert(2, &["no way has a name with carrier pigeon"]);
    Ok(())
}
