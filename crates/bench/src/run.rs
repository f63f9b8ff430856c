//! A run of the benchmark, from the options to the report.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use vmfile_engine::available_memory;
use vmfile_qemu::{QemuVersion, Vm, program_version};

use crate::bench::Bench;
use crate::changing;
use crate::compare::compare;
use crate::error::{BenchError, in_words};
use crate::guest::{Machine, Subject};
use crate::host::describe;
use crate::one_guest;
use crate::options::{Backing, BenchOptions};
use crate::progress::Progress;
use crate::report::{BenchReport, GuestResults, GuestShape};
use crate::saving::gib;
use crate::sweep;

/// Measures what `options` say. Calls `progress` with a line for each step. `command` is the
/// command line of the program, for the report.
///
/// # Errors
///
/// Returns [`BenchError`] if nothing could be measured. If `stop` is set, the report has the
/// finished rounds. A way that cannot be measured is no error: the report says why. In every case
/// guests are ended, files are removed, and the user's VM runs on if it ran.
pub fn run(
    options: &BenchOptions,
    command: Vec<String>,
    stop: &AtomicBool,
    progress: &dyn Fn(&str),
) -> Result<BenchReport, BenchError> {
    let started = Instant::now();
    let progress = Progress(progress);
    let mut host = describe(options, command);
    if let Some(base) = &options.against {
        let comparisons = compare(options, base, stop, &progress)?;
        let total_seconds = started.elapsed().as_secs_f64();
        return Ok(BenchReport { comparisons, total_seconds, ..BenchReport::of_host(host) });
    }
    let mut bench = Bench::new(options, stop)?;
    let mut guests = Vec::new();
    let mut refused = None;
    if let Some(socket) = &options.vm {
        let version = {
            let mut vm = Vm::connect(socket)?;
            host.qemu = vm.version()?.to_string();
            host.kvm = is_kvm(&mut vm);
            vm.version()?
        };
        let subject = Subject::take(socket)?;
        let shape = shape_of(&subject, socket)?;
        guests.push(one_guest::measure(&mut bench, &subject, shape, version, &progress)?);
    } else {
        let version = version_of(&options.qemu)?;
        'sizes: for &ram_bytes in &options.sizes {
            for &backing in &options.backings {
                let machine = Machine { backing, ..Machine::new(&options.qemu, ram_bytes) };
                let shape = shape(&machine, options);
                match guest(&mut bench, &machine, shape.clone(), version, &progress) {
                    Ok(results) => guests.push(results),
                    Err(BenchError::Stopped) => break 'sizes,
                    // The other guests may still be measured.
                    Err(error @ (BenchError::NoMemory { .. } | BenchError::NoRoom { .. })) => {
                        bench.note(&shape.name, error.in_words());
                        refused = Some(error);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
    if let (true, Some(error)) = (guests.is_empty(), refused) {
        return Err(error);
    }
    let is_stopped = stop.load(Ordering::Relaxed);
    if is_stopped {
        // Reports what was measured until the stop.
        guests.retain(|results| !results.saves.is_empty());
        if guests.is_empty() {
            return Err(BenchError::Stopped);
        }
        bench.note("what was still to be measured", "stopped by a signal");
    }
    let is_empty = |guest: &GuestResults| guest.saves.is_empty() && guest.reads.is_empty();
    if !options.ways.is_empty() && guests.iter().all(is_empty) {
        return Err(BenchError::NoWay { ways: options.ways.clone() });
    }
    let mut sweeps = Vec::new();
    if options.sweep && !is_stopped {
        let measured = sweep::measure(&mut bench, &progress, &mut sweeps);
        match measured.and_then(|()| changing::measure(&bench, &progress, &mut sweeps)) {
            Err(BenchError::Stopped) => {
                bench.note("the sweeps that were still to be measured", "stopped by a signal");
            }
            measured => measured?,
        }
    }
    let total_seconds = started.elapsed().as_secs_f64();
    let not_measured = bench.not_measured;
    Ok(BenchReport { guests, sweeps, not_measured, total_seconds, ..BenchReport::of_host(host) })
}

fn guest(
    bench: &mut Bench<'_>,
    machine: &Machine,
    shape: GuestShape,
    version: QemuVersion,
    progress: &Progress<'_>,
) -> Result<GuestResults, BenchError> {
    // For the guest, and for the one that is restored beside it.
    let (needed_bytes, available_bytes) = (machine.ram_bytes * 2, available_memory());
    if needed_bytes > available_bytes {
        return Err(BenchError::NoMemory { needed_bytes, available_bytes });
    }
    let subject = Subject::start(machine, bench.options.contents, bench.stop)?;
    one_guest::measure(bench, &subject, shape, version, progress)
}

fn version_of(program: &Path) -> Result<QemuVersion, BenchError> {
    program_version(program).map_err(|error| BenchError::NoQemu {
        program: program.to_path_buf(),
        said: in_words(&error),
    })
}

fn shape(machine: &Machine, options: &BenchOptions) -> GuestShape {
    let contents = options.contents;
    let backing = machine.backing.name();
    let size = gib(machine.ram_bytes);
    let (data, repeated) = (contents.data_percent, contents.repeated_percent);
    GuestShape {
        name: format!("{size} GiB, {backing} RAM, {data} % data, {repeated} % repeated"),
        ram_bytes: machine.ram_bytes,
        backing,
        data_bytes: 0,
        repeated_bytes: machine.ram_bytes / 100 * u64::from(repeated),
    }
}

/// Describes the user's VM.
fn shape_of(subject: &Subject, socket: &Path) -> Result<GuestShape, BenchError> {
    let mut vm = subject.connect()?;
    let ram_bytes = vm.ram_blocks()?.iter().map(|block| block.used_length).sum();
    let shared = vm.memory_backends()?.iter().any(|backend| backend.share);
    let backing = if shared { Backing::Shared } else { Backing::Private }.name();
    let name = vm.name()?.unwrap_or_else(|| socket.display().to_string());
    let name = format!("{name}: {:.2} GiB, {backing} RAM", gib(ram_bytes));
    Ok(GuestShape { name, ram_bytes, backing, data_bytes: 0, repeated_bytes: 0 })
}

fn is_kvm(vm: &mut Vm) -> bool {
    let answer = vm.execute("query-kvm", serde_json::Value::Null).unwrap_or_default();
    answer.get("enabled").and_then(serde_json::Value::as_bool).unwrap_or(false)
}
