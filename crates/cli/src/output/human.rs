//! Reports as text for people.

use std::fmt::Write;

use vmfile::check::{CheckReport, Finding};
use vmfile::convert::ConvertReport;
use vmfile::info::Info;
use vmfile::receive::ReceiveReport;
use vmfile::restore::RestoreReport;
use vmfile::save::{BaseUsed, SaveReport};
use vmfile::send::SendReport;
use vmfile::{FileFormat, MemoryRangeMeta};

use super::{one_line, size};

pub(crate) fn save(report: &SaveReport) -> String {
    let mut text = String::new();
    line(&mut text, "saved", &report.file.display());
    let percent_zero = (report.pages_zero * 100).checked_div(report.pages_total).unwrap_or(0);
    let written = format!(
        "{} of data, {percent_zero} % of {} pages are zero",
        size::bytes(report.bytes_written),
        report.pages_total
    );
    line(&mut text, "memory", &written);
    // A rate says little about a save that mostly compares.
    let rate = match report.base {
        None => format!(" at {}", size::rate(report.bytes_written, report.total_seconds)),
        Some(_) => String::new(),
    };
    let (total, pause) = (size::seconds(report.total_seconds), size::seconds(report.pause_seconds));
    line(&mut text, "took", &format!("{total}{rate}, guest paused {pause}"));
    line(&mut text, "route", &format!("{} ({})", report.route, report.route_reason));
    if let Some(method) = &report.live_method {
        let again = match report.bytes_rewritten {
            0 => String::new(),
            bytes => format!(", {} written again", size::bytes(bytes)),
        };
        line(&mut text, "live", &format!("{method}{again}"));
    }
    if let Some(waits) = &report.guest_waits {
        let longest = size::seconds(waits.longest_seconds);
        let waited = match waits.count {
            0 => "none".to_owned(),
            count => format!("{count} times, the longest {longest}"),
        };
        line(&mut text, "waits", &format!("{waited}; {}", copied(waits.aside_bytes)));
    }
    match &report.base {
        Some(BaseUsed::Yes { file, thin_reason, pages, bytes_read, .. }) => {
            let whole = match thin_reason {
                Some(reason) => format!("the new file is thin and needs it ({reason})"),
                None => "the new file is whole".to_owned(),
            };
            let read = size::bytes(*bytes_read);
            let kept =
                format!("{pages} pages are those of {}, {read} compared; {whole}", file.display());
            line(&mut text, "base", &kept);
        }
        Some(BaseUsed::No { reason }) => line(&mut text, "base", &format!("none ({reason})")),
        _ => {}
    }
    for disk in &report.disks {
        line(&mut text, "disk", &format!("{} stays, {} goes on", disk.image, disk.overlay));
    }
    for change in &report.changes {
        line(&mut text, "changed", change);
    }
    line(&mut text, "engine", &format!("{}, direct I/O: {}", report.io, report.direct_io));
    text
}

/// Says how much a live save copied into memory.
fn copied(bytes: u64) -> String {
    match bytes {
        0 => "nothing was copied aside".to_owned(),
        bytes => format!("{} were copied aside", size::bytes(bytes)),
    }
}

pub(crate) fn receive(report: &ReceiveReport) -> String {
    let mut text = String::new();
    line(&mut text, "received", &report.file.display());
    line(&mut text, "machine", &report.machine);
    let percent_zero = (report.pages_zero * 100).checked_div(report.pages_total).unwrap_or(0);
    let written = format!(
        "{} of data, {} of it twice or more, {percent_zero} % of {} pages are zero",
        size::bytes(report.bytes_written),
        size::bytes(report.bytes_rewritten),
        report.pages_total
    );
    line(&mut text, "memory", &written);
    let channels = match report.channels {
        0 => String::new(),
        channels => format!(", {channels} channels"),
    };
    let took = format!(
        "{} at {}, stream of {}{channels}",
        size::seconds(report.total_seconds),
        size::rate(report.bytes_written, report.total_seconds),
        size::bytes(report.stream_bytes)
    );
    line(&mut text, "took", &took);
    line(&mut text, "engine", &format!("{}, direct I/O: {}", report.io, report.direct_io));
    text
}

pub(crate) fn convert(report: &ConvertReport) -> String {
    let mut text = String::new();
    line(&mut text, "converted", &report.file.display());
    line(&mut text, "format", &format!("{} to {}", report.from, report.to));
    let memory = format!("{} of {} pages hold data", report.pages_data, report.pages_total);
    line(&mut text, "memory", &memory);
    line(&mut text, "verified", &report.verified);
    line(&mut text, "took", &size::seconds(report.total_seconds));
    text
}

pub(crate) fn restore(report: &RestoreReport) -> String {
    let mut text = String::new();
    let state = &report.run_state;
    let pid = report
        .pid
        .map_or_else(|| "in a process not seen here".to_owned(), |pid| format!("pid {pid}"));
    line(&mut text, "restored", &format!("{state}, {pid}"));
    if let Some(qmp) = &report.qmp {
        line(&mut text, "qmp", &qmp.display());
    }
    line(&mut text, "mode", &format!("{} ({})", report.mode, report.mode_reason));
    if report.bytes_read > 0 {
        let direct_io =
            report.direct_io.as_ref().map_or_else(|| "no".to_owned(), ToString::to_string);
        let read = format!("{}, direct I/O: {direct_io}", size::bytes(report.bytes_read));
        line(&mut text, "read", &read);
    }
    for disk in &report.disks {
        let (image, overlay) = (disk.image.display(), disk.overlay.display());
        line(&mut text, "disk", &format!("{overlay} on top of {image}"));
    }
    line(&mut text, "verified", &report.verified);
    let end = if report.running { "guest resumed" } else { "VM restored" };
    let took = format!(
        "QEMU started in {}, {end} {} later",
        size::seconds(report.qemu_start_seconds),
        size::seconds(report.resume_seconds)
    );
    line(&mut text, "took", &took);
    text
}

pub(crate) fn send(report: &SendReport) -> String {
    let mut text = String::new();
    line(&mut text, "sent", &report.file.display());
    let left_out = report.pages_total - report.pages_data - report.pages_zero;
    let pages = format!(
        "{} pages with data, {} zero pages, {left_out} zero pages left out",
        report.pages_data, report.pages_zero
    );
    line(&mut text, "memory", &pages);
    line(&mut text, "verified", &report.verified);
    let took = format!(
        "{} at {}, stream of {}",
        size::seconds(report.total_seconds),
        size::rate(report.bytes_sent, report.total_seconds),
        size::bytes(report.bytes_sent)
    );
    line(&mut text, "took", &took);
    line(&mut text, "engine", &format!("{}, direct I/O: {}", report.io, report.direct_io));
    text
}

pub(crate) fn check(report: &CheckReport) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let _ = writeln!(text, "{}", describe(finding));
    }
    let listed = report.findings.len() as u64;
    if report.findings_total > listed {
        let _ = writeln!(text, "and {} more", report.findings_total - listed);
    }
    if report.format == FileFormat::Vmfile {
        let result = if report.findings_total == 0 { "ok" } else { "damaged" };
        let checked = format!(
            "{result}: {} pages, {} {}, {}",
            report.pages_checked,
            report.findings_total,
            if report.findings_total == 1 { "finding" } else { "findings" },
            size::seconds(report.total_seconds)
        );
        line(&mut text, "checked", &checked);
        let io = report.io.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string);
        line(&mut text, "engine", &format!("{io}, direct I/O: {}", report.direct_io));
    } else {
        line(&mut text, "checked", &"structure only: QEMU writes no checksums");
    }
    text
}

fn describe(finding: &Finding) -> String {
    let kind = serde_json::to_value(finding.kind).ok();
    let kind = kind.as_ref().and_then(|kind| kind.as_str()).unwrap_or("damage").to_owned();
    let mut text = kind.replace('_', " ");
    if let Some(block) = &finding.block {
        let _ = write!(text, ": RAM block {block:?}");
    }
    if let Some(page) = finding.page {
        let _ = write!(text, ", page {page}");
    }
    if let Some(section) = &finding.section {
        let _ = write!(text, ": {section}");
    }
    if let Some(file) = &finding.file {
        let _ = write!(text, ", in {}", file.display());
    }
    let _ = write!(text, ", file offset {:#x}", finding.offset);
    if let Some(error) = &finding.error {
        let _ = write!(text, ": {error}");
    }
    text
}

/// Adds how the file was made, and its size.
fn origin(text: &mut String, info: &Info) {
    if let (Some(route), Some(pause)) = (&info.route, info.pause_seconds) {
        let pause = size::seconds(pause);
        line(text, "route", &format!("{route}, guest paused {pause} when this was written"));
    }
    let (len, room) = (size::bytes(info.file_bytes), size::bytes(info.allocated_bytes));
    line(text, "file", &format!("{len}, {room} on the disk"));
}

/// Adds the file's id, and what a thin file needs.
fn identity(text: &mut String, info: &Info) {
    if let Some(id) = info.id {
        line(text, "id", &id);
    }
    let Some(base) = &info.base else { return };
    let (pages, path) = (base.pages, one_line(&base.path));
    line(text, "base", &format!("thin: {pages} pages are in {path}, id {}", base.id));
    for file in &base.files {
        line(text, "", &one_line(&file.display().to_string()));
    }
    if let Some(missing) = &base.missing {
        line(text, "", &format!("MISSING: {}", one_line(missing)));
    }
}

pub(crate) fn info(info: &Info, verbose: bool) -> String {
    let mut text = String::new();
    line(&mut text, "format", &info.format);
    if let Some(vm) = &info.vm {
        line(&mut text, "VM", &vm.name.as_deref().unwrap_or("(no name)"));
        if let Some(uuid) = &vm.uuid {
            line(&mut text, "uuid", uuid);
        }
        line(&mut text, "run state", &vm.run_state);
    }
    line(&mut text, "machine", &info.machine);
    if let Some(version) = &info.qemu_version {
        line(&mut text, "QEMU", version);
    }
    if let Some(seconds) = info.saved_at_unix_seconds {
        line(&mut text, "saved at", &time(seconds));
    }
    origin(&mut text, info);
    identity(&mut text, info);
    let devices = format!(
        "{} sections, {}",
        info.device_sections.len(),
        size::bytes(info.device_state_bytes)
    );
    line(&mut text, "devices", &devices);
    let _ = writeln!(text, "\nRAM blocks");
    for block in &info.blocks {
        let _ = writeln!(
            text,
            "  {:<28} {:>9}  {:>9} data pages  {:>9} zero  at {:#x}",
            one_line(&block.name),
            size::bytes(block.bytes),
            block.pages_data,
            block.pages_zero,
            block.pages_offset
        );
    }
    if !info.disks.is_empty() {
        let _ = writeln!(text, "\ndisks, not in the file");
        for disk in &info.disks {
            let access = if disk.read_only { "read-only" } else { "writable" };
            let mut words = format!("{}: {} ({}, {access})", disk.device, disk.path, disk.format);
            if let Some(overlay) = &disk.overlay {
                let _ = write!(words, ", belongs to the file; the VM went on in {overlay}");
            }
            let _ = writeln!(text, "  {}", one_line(&words));
        }
    }
    if verbose {
        let _ = writeln!(text, "\ndevice sections");
        for section in &info.device_sections {
            let _ = writeln!(
                text,
                "  {:<40} instance {:<3} version {:<3} {:>9}  at {:#x}",
                one_line(&section.name),
                section.instance,
                section.version,
                size::bytes(section.bytes),
                section.offset
            );
        }
        memory_map(&mut text, info.memory_map.as_deref().unwrap_or_default());
        if let Some(vm) = &info.vm {
            let words = one_line(&vm.command_line.join(" "));
            let _ = writeln!(text, "\ncommand line\n  {words}");
        }
    }
    text
}

/// Lists which memory the guest saw at which address.
fn memory_map(text: &mut String, map: &[MemoryRangeMeta]) {
    if !map.is_empty() {
        let _ = writeln!(text, "\nguest-physical map");
    }
    for range in map {
        let block = range.block.as_deref().unwrap_or("not in the file");
        let _ = writeln!(
            text,
            "  {:#018x} {:>9} {:<9}  {} at {:#x}",
            range.guest_address,
            size::bytes(range.bytes),
            if range.writable { "writable" } else { "read-only" },
            one_line(block),
            range.offset
        );
    }
}

/// Returns a point in time as RFC 3339, UTC.
pub(crate) fn time(unix_seconds: u64) -> String {
    let seconds = i64::try_from(unix_seconds).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds)
        .map_or_else(|_| format!("{unix_seconds} s after 1970"), |time| time.to_string())
}

pub(crate) fn line(text: &mut String, label: &str, value: &dyn std::fmt::Display) {
    let _ = writeln!(text, "{label:<9} {}", one_line(&value.to_string()));
}
