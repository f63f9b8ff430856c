//! What is measured.

use std::num::NonZeroU32;
use std::path::PathBuf;

/// Where a guest's RAM lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Anonymous memory of QEMU's own, as without any option.
    Private,
    /// A memfd that others may map.
    Shared,
}

impl Backing {
    /// Returns its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Backing::Private => "private",
            Backing::Shared => "shared",
        }
    }
}

/// What the pages of a guest hold, in percent of its RAM; the guest never touched the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Pages of random words.
    pub data_percent: u8,
    /// Pages in which one word repeats.
    pub repeated_percent: u8,
}

/// What is measured, and how often.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// The QMP socket of a VM that runs already, to measure it instead of new guests. It is paused
    /// meanwhile.
    pub vm: Option<PathBuf>,
    /// RAM of the guests, in bytes.
    pub sizes: Vec<u64>,
    /// Where their RAM lies.
    pub backings: Vec<Backing>,
    /// What it holds.
    pub contents: Contents,
    /// How many rounds count, after one that warms up.
    pub rounds: NonZeroU32,
    /// Where the files are written.
    pub directory: PathBuf,
    /// QEMU's program.
    pub qemu: PathBuf,
    /// The program `vmfile`.
    pub program: PathBuf,
    /// Another build of vmfile: measure only `program` and this build, in turns.
    pub against: Option<PathBuf>,
    /// Parts of the names of the ways to measure, such as `vmfile save` or `exec`; all ways if empty. A
    /// restore can be measured only with the save that makes its file.
    pub ways: Vec<String>,
    /// Also measure restores, `check` and `info`.
    pub restores: bool,
    /// Also measure the sweeps: how times grow with one quantity.
    pub sweep: bool,
}

impl BenchOptions {
    /// Numbers of multifd channels to try; the best one is measured.
    pub const CHANNELS: [u32; 4] = [1, 2, 4, 8];
}
