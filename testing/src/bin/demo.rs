//! `cargo xtask demo`: a guest that counts is saved, ended, restored, and counts on.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program, not a library")]

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmfile_testing::{Guest, Monitor, Qemu, Ram, TestResult};

const RAM_MIB: u64 = 1024;
const FILL_MIB: u32 = 700;

/// How long the restored guest may take for its next counts.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> TestResult {
    let qemu = Qemu::at_least("9.0").map_err(|missing| format!("{missing:?}"))?;
    let here = env::current_exe()?;
    let build = here.parent().ok_or("this program has no directory")?;
    let program = build.join("vmfile");
    let directory = tempfile::Builder::new().prefix("demo-").tempdir_in(build)?;
    let file = directory.path().join("vm.vmf");

    println!(
        "1. QEMU {} boots Linux with {RAM_MIB} MiB of RAM. Its only program fills",
        qemu.version()
    );
    println!("   {FILL_MIB} MiB, then checks every word and counts.\n");
    let guest = Guest::linux(Ram::memfd(RAM_MIB)).fill_mib(FILL_MIB).boot(&qemu)?;
    guest.wait_for_count(3)?;
    print_counts(&guest);

    println!("\n2. vmfile saves it, and QEMU ends.\n");
    let socket = guest.qmp_path();
    let started = Instant::now();
    show(&program, &[OsStr::new("save"), socket.as_os_str(), file.as_os_str()])?;
    let save_seconds = started.elapsed().as_secs_f64();
    guest.judge_counts()?;
    let last = guest.counts().last().ok_or("a guest that counts")?.number;
    // The restored VM goes on with its log.
    guest.forget_lines()?;

    println!(
        "\n3. vmfile starts a QEMU from the file: the file's pages are its RAM, and it counts on.\n"
    );
    let started = Instant::now();
    let said = show(&program, &[OsStr::new("restore"), file.as_os_str()])?;
    let restore_seconds = started.elapsed().as_secs_f64();
    let vm = Restored { monitor: guest.directory().join("oracle") };
    println!();
    let outcome = wait_for_counts(&guest, 3);
    print_counts(&guest);
    drop(vm);
    outcome?;
    guest.judge_counts()?;
    let first = guest.counts().first().ok_or("a guest that counts")?.number;
    // The line that the guest was printing when it was saved may be split between the two logs.
    if first != last + 1 && first != last + 2 {
        return Err(format!("count {first} follows count {last}").into());
    }

    println!("\n4. It counted on, and every word of its memory was right.\n");
    let info = Command::new(&program).args(["--json", "info"]).arg(&file).output()?;
    let written_mib = data_mib(&serde_json::from_slice(&info.stdout)?);
    println!("   save     {save_seconds:.2} s, the file durable");
    println!("            {written_mib:.0} MiB written, {:.0} MiB/s", written_mib / save_seconds);
    println!("   restore  {restore_seconds:.3} s in all");
    let took = said.lines().find_map(|line| line.strip_prefix("took"));
    println!("            {}", took.unwrap_or_default().trim());
    Ok(())
}

/// A VM that vmfile restored; dropping it ends it.
#[derive(Debug)]
struct Restored {
    monitor: PathBuf,
}

impl Drop for Restored {
    fn drop(&mut self) {
        let monitor = Monitor::connect(&self.monitor, Duration::from_secs(10));
        let ended = monitor.and_then(|mut monitor| monitor.execute("quit", json!({})));
        if let Err(error) = ended {
            eprintln!("demo: the restored QEMU may still run: {error}");
        }
    }
}

/// Runs vmfile as a user would, shows the command and its output, and returns the output.
fn show(program: &Path, arguments: &[&OsStr]) -> TestResult<String> {
    let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
    println!("   $ vmfile {}", words.join(" "));
    let output = Command::new(program).args(arguments).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    let said = String::from_utf8(output.stdout)?;
    for line in said.lines() {
        println!("   {line}");
    }
    Ok(said)
}

/// Waits until the guest has reported `count` passes in its new QEMU, whose log began empty.
fn wait_for_counts(guest: &Guest, count: usize) -> TestResult {
    let deadline = Instant::now() + PATIENCE;
    while guest.counts().len() < count {
        if Instant::now() > deadline {
            return Err(format!("the guest was silent for {} s", PATIENCE.as_secs()).into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn print_counts(guest: &Guest) {
    for count in guest.counts() {
        println!("   guest: {}", count.line);
    }
}

fn data_mib(info: &Value) -> f64 {
    let blocks = info["blocks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let pages: f64 = blocks.iter().filter_map(|block| block["pages_data"].as_f64()).sum();
    pages * 4096.0 / f64::from(1 << 20)
}
