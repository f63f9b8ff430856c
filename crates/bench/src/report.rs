//! The report: everything that was measured, and the source of all that is printed.

use serde::Serialize;

use crate::series::Summary;

/// The results of a run of the benchmark.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// Where it was measured.
    pub host: Host,
    /// One for each guest that was measured.
    #[serde(rename = "scenes")]
    pub guests: Vec<GuestResults>,
    /// How times grow with one quantity while the rest stays; empty unless the options ask for
    /// sweeps.
    pub sweeps: Vec<Sweep>,
    /// How this build compares with another one; empty unless the options name one.
    pub comparisons: Vec<Comparison>,
    /// What could not be measured, and why.
    pub not_measured: Vec<NotMeasured>,
    /// How long the benchmark took, in seconds.
    pub total_seconds: f64,
}

impl BenchReport {
    /// Returns the report of a run that has measured nothing yet.
    pub(crate) fn of_host(host: Host) -> BenchReport {
        BenchReport {
            host,
            guests: Vec::new(),
            sweeps: Vec::new(),
            comparisons: Vec::new(),
            not_measured: Vec::new(),
            total_seconds: 0.0,
        }
    }
}

/// The machine, and what was measured on it.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// Such as `2 x AMD EPYC`.
    pub cpu: String,
    /// Length of its memory, in bytes.
    pub memory_bytes: u64,
    /// Such as `Linux 6.18.44`.
    pub kernel: String,
    /// The file system that was written to, such as `ext4 on vda`.
    pub file_system: String,
    /// QEMU's version.
    pub qemu: String,
    /// Whether guests ran under KVM.
    pub kvm: bool,
    /// fio's version, where it is installed.
    pub fio: Option<String>,
    /// libvirt's version, where it is installed.
    pub libvirt: Option<String>,
    /// vmfile's version.
    pub vmfile: String,
    /// When it began, in seconds since 1970-01-01 UTC.
    pub began_unix_seconds: u64,
    /// Processes that were ready to run when it began, over the last minute.
    pub load: f64,
    /// The command line.
    pub command: Vec<String>,
}

/// One guest, saved and restored in every way.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GuestResults {
    /// The guest.
    pub guest: GuestShape,
    /// The ways of saving it, in the order in which they were measured in each round.
    pub saves: Vec<Way>,
    /// The ways of restoring it.
    pub restores: Vec<Way>,
    /// The verbs that read the file that was saved.
    pub reads: Vec<Way>,
    /// Saves of what changed since another file, and a restore of such a file.
    pub checkpoints: Vec<Way>,
}

impl GuestResults {
    /// Returns the tables that it has, with their names.
    pub(crate) fn tables(&self) -> [(&'static str, &[Way]); 4] {
        [
            ("saves", &self.saves),
            ("restores", &self.restores),
            ("reads", &self.reads),
            ("checkpoints", &self.checkpoints),
        ]
    }
}

/// The RAM of a guest: its size and contents.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct GuestShape {
    /// Its name, for headings: `4 GiB, private, 75 % data`.
    pub name: String,
    /// Length of its RAM, in bytes.
    pub ram_bytes: u64,
    /// `private` or `shared`.
    pub backing: &'static str,
    /// Bytes of pages that are not zero.
    pub data_bytes: u64,
    /// Bytes of pages, among those, in which one word repeats.
    pub repeated_bytes: u64,
}

/// One way, and what each round of it took.
#[derive(Clone, Debug, Serialize)]
pub struct Way {
    /// Its name, such as `vmfile save` or `QEMU mapped-ram, multifd 4, direct-io`.
    pub name: String,
    /// A short name, for the heads of columns: `vmfile`, `multifd 4 dio`.
    pub short: String,
    /// Who does the work; decides the color, and what is compared.
    pub family: Family,
    /// One for each round that counts.
    pub runs: Vec<Run>,
    /// Statistics of the runs' seconds.
    pub seconds: Summary,
    /// The median of the rounds' ratios, this way's time to the best of vmfile's in the same round:
    /// 2 is twice as long.
    pub ratio_to_vmfile: Option<f64>,
    /// The median of the rounds' ratios, this way's time to the disk's limit in the same round.
    pub ratio_to_disk: Option<f64>,
}

/// Who does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// fio: the disk's limit.
    Disk,
    /// This program.
    Vmfile,
    /// QEMU alone, or with `cat`.
    Qemu,
    /// `virsh`.
    Libvirt,
}

/// One run of one way.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Run {
    /// From the start to the durable file, or to the VM that has its memory, in seconds.
    pub seconds: f64,
    /// GiB of pages for each second.
    pub gib_per_second: f64,
    /// CPU time of all processes that take part, in seconds.
    pub cpu_seconds: Option<f64>,
    /// Most memory that the writing processes had beside the guest's, in bytes.
    pub peak_memory_bytes: Option<u64>,
    /// How much of the file is left in the page cache, in bytes.
    pub cached_bytes: Option<u64>,
    /// How long the guest stood still, in seconds.
    pub pause_seconds: Option<f64>,
    /// How many of `seconds` QEMU itself took to start.
    pub qemu_start_seconds: Option<f64>,
    /// How many of `seconds` passed from QEMU's first answer until the guest ran.
    pub resume_seconds: Option<f64>,
}

/// How times or memory grow with one quantity.
#[derive(Clone, Debug, Serialize)]
pub struct Sweep {
    /// The quantity that grows: `RAM`, `share of zero pages`, `jobs`, `clones`.
    pub name: String,
    /// Its unit: `MiB`, `%`, or nothing.
    pub unit: &'static str,
    /// What is measured, in the order of `points`' values: `vmfile save`, `restore by map`.
    pub lines: Vec<String>,
    /// The unit of the values: `s` or `MiB`.
    pub value_unit: &'static str,
    /// The points, in ascending order.
    pub points: Vec<SweepPoint>,
}

/// One point of a sweep.
#[derive(Clone, Debug, Serialize)]
pub struct SweepPoint {
    /// The quantity, in the unit of the sweep.
    pub x: f64,
    /// A value for each line; `None` if it was not measured.
    pub values: Vec<Option<Summary>>,
}

/// One task, done by another build of vmfile and by this one in turns.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The task.
    pub what: String,
    /// The time that the other build took.
    pub base_seconds: Summary,
    /// The time that this build took.
    pub seconds: Summary,
    /// This build's time to the other's in the same round: 2 is twice as long.
    pub ratio: Summary,
    /// Whether the rounds agree on a difference.
    pub verdict: Difference,
}

/// Whether two builds differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Difference {
    /// This build was faster in every round.
    Faster,
    /// This build was slower in every round.
    Slower,
    /// The rounds do not agree.
    None,
}

/// Something that could not be measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotMeasured {
    /// What.
    pub what: String,
    /// Why not.
    pub why: String,
}
