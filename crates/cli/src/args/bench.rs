//! The arguments of `vmfile bench`.

use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[derive(Debug, Args)]
pub(crate) struct BenchArguments {
    /// RAM of the guests: sizes such as 512M or 4G
    #[arg(long, value_name = "SIZE,...", default_value = "1G", value_delimiter = ',', value_parser = ram_size)]
    pub(crate) size: Vec<u64>,
    /// Where their RAM lies
    #[arg(long, value_name = "KIND,...", default_value = "private", value_delimiter = ',')]
    pub(crate) ram: Vec<RamMode>,
    /// Pages that hold random words, in percent; the rest was never touched
    #[arg(long, value_name = "PERCENT", default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) data: u8,
    /// Pages in which one word repeats, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) repeated: u8,
    /// Rounds that count, after one that warms up
    #[arg(long, value_name = "N", default_value = "5")]
    pub(crate) runs: NonZeroU32,
    /// Measure a VM that runs, a QMP socket, process id or name; it stands still meanwhile
    #[arg(long, value_name = "VM", conflicts_with_all = ["size", "ram", "data", "repeated", "sweep"])]
    pub(crate) vm: Option<String>,
    /// Where the files are written
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) dir: PathBuf,
    /// QEMU's program
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    pub(crate) qemu: PathBuf,
    /// Measure only the ways whose names have one of these parts, such as "vmfile,fio"; a restore only with
    /// the save that makes its file
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', conflicts_with = "against")]
    pub(crate) ways: Vec<String>,
    /// Measure no restores, check or info
    #[arg(long)]
    pub(crate) saves_only: bool,
    /// Measure also how cost grows with RAM, zero pages, jobs and clones
    #[arg(long)]
    pub(crate) sweep: bool,
    /// Measure nothing but this program and another build of it, in turns
    #[arg(long, value_name = "PROGRAM", conflicts_with_all = ["vm", "sweep", "html", "saves_only"])]
    pub(crate) against: Option<PathBuf>,
    /// Write a page with plots, too
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

/// Where the RAM of a guest lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RamMode {
    /// Memory of QEMU's own
    Private,
    /// A memfd
    Shared,
}

/// Reads the length of a guest's RAM, in bytes.
fn ram_size(text: &str) -> Result<u64, String> {
    const SMALLEST: u64 = 64 << 20;
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => return Err("expected a size such as 512M or 4G".to_owned()),
    };
    let number = digits.parse::<u64>().map_err(|error| error.to_string())?;
    let bytes = number.checked_mul(1 << shift).filter(|&bytes| bytes >= SMALLEST);
    bytes.ok_or_else(|| "expected 64M or more".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_unit_and_are_not_too_small() {
        assert_eq!(ram_size("64M"), Ok(64 << 20));
        assert_eq!(ram_size("4g"), Ok(4 << 30));
        for bad in ["", "4", "G", "1T", "63M", "-1G", "99999999999G", "\u{e9}"] {
            assert!(ram_size(bad).is_err(), "{bad}");
        }
    }
}
