//! A report with plausible invented numbers.

use vmfile_bench::report::{
    BenchReport, Family, GuestResults, GuestShape, Host, NotMeasured, Run, Sweep, SweepPoint, Way,
};
use vmfile_bench::series::{Summary, ratio};

const ROUNDS: usize = 5;
const GIB: u64 = 1 << 30;

/// How many sweeps the report has.
pub(crate) const SWEEPS: usize = 4;

/// A way, with its short name and family, the seconds for each GiB of data, and the seconds that it
/// always takes.
struct Made(&'static str, &'static str, Family, f64, f64);

const SAVES: [Made; 13] = [
    Made("fio write limit", "disk", Family::Disk, 0.32, 0.02),
    Made("vmfile save", "vmfile", Family::Vmfile, 0.38, 0.04),
    Made("vmfile save --route stream", "vmfile stream", Family::Vmfile, 0.46, 0.05),
    Made("vmfile save --live", "vmfile live", Family::Vmfile, 0.61, 0.09),
    Made("QEMU exec:vmfile receive", "exec:vmfile", Family::Vmfile, 0.55, 0.06),
    Made("QEMU mapped-ram, multifd 2, direct-io", "multifd 2 dio", Family::Qemu, 0.53, 0.08),
    Made("QEMU mapped-ram, multifd 4, direct-io", "multifd 4 dio", Family::Qemu, 0.56, 0.08),
    Made("QEMU mapped-ram, multifd 8, direct-io", "multifd 8 dio", Family::Qemu, 0.55, 0.08),
    Made("QEMU file: stream", "file:", Family::Qemu, 2.71, 0.05),
    Made("QEMU mapped-ram", "mapped-ram", Family::Qemu, 1.57, 0.05),
    Made("QEMU exec:cat >", "exec:cat", Family::Qemu, 1.42, 0.05),
    Made("virsh save --bypass-cache", "virsh bypass", Family::Libvirt, 2.17, 0.3),
    Made("virsh save --image-format sparse", "virsh sparse", Family::Libvirt, 1.45, 0.3),
];

const RESTORES: [Made; 6] = [
    Made("fio read limit", "disk", Family::Disk, 0.52, 0.02),
    Made("vmfile restore, by map", "vmfile map", Family::Vmfile, 0.001, 0.05),
    Made("vmfile restore, by load", "vmfile load", Family::Vmfile, 0.7, 0.1),
    Made("QEMU mapped-ram, multifd 4, direct-io", "multifd 4 dio", Family::Qemu, 0.9, 0.12),
    Made("QEMU file: stream", "file:", Family::Qemu, 2.4, 0.1),
    Made("virsh restore --bypass-cache", "virsh bypass", Family::Libvirt, 2.6, 0.4),
];

/// Pseudo-random numbers from 0 to 1, the same ones each time.
struct Noise(u32);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(self.0 >> 8) / f64::from(1 << 24)
    }

    /// Returns `seconds` with the noise of a measurement.
    fn measured(&mut self, seconds: f64) -> f64 {
        let slow = if self.next() > 0.93 { 1.5 } else { 1.0 };
        seconds * (0.93 + 0.16 * self.next()) * slow
    }
}

/// Returns a report of two sizes of RAM, private and shared, and four sweeps.
pub(crate) fn report() -> BenchReport {
    let mut noise = Noise(7);
    let mut guests = Vec::new();
    for backing in ["private", "shared"] {
        for gib in [4, 16] {
            guests.push(results(gib, backing, &mut noise));
        }
    }
    let not_measured = [
        ("virsh save --image-format sparse --parallel-channels 2", "libvirt 10.0 is too old"),
        ("restore with postcopy", "userfaultfd needs a privilege: vm.unprivileged_userfaultfd=1"),
    ];
    let not_measured = not_measured
        .map(|(what, why)| NotMeasured { what: what.to_owned(), why: why.to_owned() })
        .to_vec();
    let sweeps = sweeps(&mut noise);
    let comparisons = Vec::new();
    BenchReport { host: host(), guests, sweeps, comparisons, not_measured, total_seconds: 1919.0 }
}

fn host() -> Host {
    Host {
        cpu: "2 x AMD EPYC".to_owned(),
        memory_bytes: 24_105 << 20,
        kernel: "Linux 6.18.44".to_owned(),
        file_system: "ext4 on vda".to_owned(),
        qemu: "10.0.2".to_owned(),
        kvm: false,
        fio: Some("3.33".to_owned()),
        libvirt: Some("11.3.0".to_owned()),
        vmfile: "0.1.0, commit 63601cb265f1".to_owned(),
        began_unix_seconds: 1_795_629_660,
        load: 0.48,
        command: ["vmfile-bench", "--ram", "4G,16G", "--rounds", "5", "--html", "page.html"]
            .map(str::to_owned)
            .to_vec(),
    }
}

fn results(gib: u32, backing: &'static str, noise: &mut Noise) -> GuestResults {
    let data_gib = f64::from(gib) * 0.75;
    let guest = GuestShape {
        name: format!("{gib} GiB, {backing}, 75 % data"),
        ram_bytes: u64::from(gib) * GIB,
        backing,
        data_bytes: u64::from(gib) * GIB * 3 / 4,
        repeated_bytes: u64::from(gib) * GIB / 64,
    };
    GuestResults {
        guest,
        saves: ways(&SAVES, data_gib, noise),
        restores: ways(&RESTORES, data_gib, noise),
        reads: Vec::new(),
        checkpoints: Vec::new(),
    }
}

fn ways(made: &[Made], data_gib: f64, noise: &mut Noise) -> Vec<Way> {
    let mut ways: Vec<Way> = made.iter().map(|made| way(made, data_gib, noise)).collect();
    let seconds = |way: &Way| way.runs.iter().map(|run| run.seconds).collect::<Vec<_>>();
    let (disk, ours) = (seconds(&ways[0]), seconds(&ways[1]));
    for way in &mut ways {
        way.ratio_to_disk = ratio(&seconds(way), &disk);
        way.ratio_to_vmfile = ratio(&seconds(way), &ours);
    }
    ways
}

fn way(made: &Made, data_gib: f64, noise: &mut Noise) -> Way {
    let Made(name, short, family, per_gib, always) = made;
    let run = |noise: &mut Noise| {
        let seconds = noise.measured(per_gib * data_gib + always);
        let is_disk = *family == Family::Disk;
        Run {
            seconds,
            gib_per_second: data_gib / seconds,
            cpu_seconds: Some(seconds * 0.6),
            peak_memory_bytes: (!is_disk).then_some(17 << 20),
            cached_bytes: (!is_disk).then_some(180 << 10),
            pause_seconds: name.contains("live").then_some(0.0021),
            qemu_start_seconds: None,
            resume_seconds: None,
        }
    };
    let runs: Vec<Run> = (0..ROUNDS).map(|_| run(noise)).collect();
    let seconds: Vec<f64> = runs.iter().map(|run| run.seconds).collect();
    Way {
        name: (*name).to_owned(),
        short: (*short).to_owned(),
        family: *family,
        runs,
        seconds: Summary::of(&seconds).expect("there are rounds"),
        ratio_to_vmfile: None,
        ratio_to_disk: None,
    }
}

/// The value of a line at `x`; `None` if it was not measured there.
type Cost = fn(line: usize, x: f64) -> Option<f64>;

fn sweeps(noise: &mut Noise) -> Vec<Sweep> {
    let sizes = [2048.0, 8192.0, 32_768.0, 131_072.0, 262_144.0];
    let of_ram: Cost = |line, x| Some([0.46, 0.91, 0.064][line] * (1.0 + x / 3_000_000.0));
    let of_zero: Cost = |line, x| Some([1.3, 1.8, 2.4][line] * (1.04 - x / 100.0));
    let of_jobs: Cost = |line, x| (line == 0 || x < 8.0).then(|| [1.1, 1.0][line] + 1.3 / x);
    let of_clones: Cost = |line, x| Some([5.0, 4096.0 / 8.0][line] * x + 40.0);
    [
        ("RAM", "MiB", &["save", "check", "restore by map"][..], "s", &sizes[..], of_ram),
        (
            "share of zero pages",
            "%",
            &["vmfile save", "QEMU mapped-ram, multifd 2, direct-io", "QEMU exec:cat >"],
            "s",
            &[0.0, 25.0, 50.0, 75.0, 100.0],
            of_zero,
        ),
        ("jobs", "", &["save", "restore by load"], "s", &[1.0, 2.0, 4.0, 8.0, 16.0], of_jobs),
        (
            "clones",
            "",
            &["restore by map", "restore by load"],
            "MiB",
            &[1.0, 4.0, 8.0, 16.0, 32.0],
            of_clones,
        ),
    ]
    .map(|(name, unit, lines, value_unit, xs, cost)| Sweep {
        name: name.to_owned(),
        unit,
        lines: lines.iter().map(|&line| line.to_owned()).collect(),
        value_unit,
        points: xs
            .iter()
            .map(|&x| SweepPoint {
                x,
                values: (0..lines.len())
                    .map(|line| {
                        let runs: Vec<f64> = cost(line, x).map_or_else(Vec::new, |cost| {
                            (0..ROUNDS).map(|_| noise.measured(cost)).collect()
                        });
                        Summary::of(&runs)
                    })
                    .collect(),
            })
            .collect(),
    })
    .into()
}
