//! A guest whose saves are broken, and what must be as before afterwards.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use vmfile_testing::{Guest, Qemu, Ram, Random, TestError, TestResult};

use crate::guests::directory;
use crate::run::{Said, names_in, vmfile, wait_until};
use crate::words;

/// How soon the guest must run again on an idle machine; the test allows `ALLOWANCE` times as long.
const SOON: Duration = Duration::from_secs(1);
const ALLOWANCE: u32 = 5;

/// Stands for the path of a file that was saved before.
const BASE: &str = "BASE";

/// Every route, also live, with disks, and with a base.
pub(crate) const WAYS: [&[&str]; 12] = [
    &["--route", "direct"],
    &["--route", "direct", "--with-disks"],
    &["--route", "stream"],
    &["--route", "stream", "--channels", "2"],
    &["--route", "stream", "--with-disks"],
    &["--route", "native"],
    &["--route", "native", "--with-disks"],
    &["--live"],
    &["--live", "--with-disks"],
    &["--live", "--base", BASE],
    &["--base", BASE],
    &["--route", "direct", "--after", "pause"],
];

/// What a save may change in QEMU, as QEMU reports it.
#[derive(Debug, PartialEq)]
pub(crate) struct State {
    settings: Value,
    parameters: Value,
    sets: Value,
    objects: Vec<String>,
    /// What QEMU's descriptor 0 refers to. QEMU 10.0.2 closes it if a background snapshot fails
    /// before it begins; the next failure then closed the monitor that had got the number 0.
    stdin: PathBuf,
}

impl State {
    pub(crate) fn of(guest: &mut Guest) -> TestResult<State> {
        let objects = guest.qmp("qom-list", json!({ "path": "/objects" }))?;
        let name = |object: &Value| object["name"].as_str().map(str::to_owned);
        // The note of the file that was saved last stays.
        let is_note = |name: &String| name == "vmfile-last";
        Ok(State {
            settings: guest.qmp("query-migrate-capabilities", json!({}))?,
            parameters: guest.qmp("query-migrate-parameters", json!({}))?,
            sets: guest.qmp("query-fdsets", json!({}))?,
            stdin: fs::read_link(format!("/proc/{}/fd/0", guest.pid()?))?,
            objects: objects
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(name)
                .filter(|name| !is_note(name))
                .collect(),
        })
    }
}

/// A guest that writes to its memory and its disk all the time, with its state at the start.
pub(crate) struct Trial {
    pub(crate) guest: Guest,
    pub(crate) directory: TempDir,
    /// Where the base is.
    base: TempDir,
    before: State,
    pub(crate) random: Random,
    /// How long each way takes if it is not killed.
    seconds: BTreeMap<usize, f64>,
    /// The longest time until the guest ran again.
    pub(crate) slowest: Duration,
    /// How many saves had their file all the same.
    pub(crate) finished: u64,
    /// How many saves did not succeed: what was to end them came in time.
    pub(crate) ended: u64,
}

impl Trial {
    pub(crate) fn begin(qemu: &Qemu, random: Random) -> TestResult<Trial> {
        let config = Guest::linux(Ram::private(256)).vcpus(2).disk(16).one_moment().fill_mib(120);
        let mut guest = config.busy().boot_to(qemu, 1)?;
        let before = State::of(&mut guest)?;
        let (seconds, slowest) = (BTreeMap::new(), Duration::ZERO);
        let (directory, base) = (directory()?, directory()?);
        let words = words!["save", guest.qmp_path(), base.path().join(BASE), "--after", "resume"];
        vmfile(words).assert(0, &["saved"]);
        Ok(Trial {
            guest,
            directory,
            base,
            before,
            random,
            seconds,
            slowest,
            finished: 0,
            ended: 0,
        })
    }

    pub(crate) fn words(&self, way: usize, file: &Path) -> Vec<OsString> {
        let mut words = words!["save", self.guest.qmp_path(), file].to_vec();
        words.extend(WAYS[way].iter().map(|&word| match word {
            BASE => self.base.path().join(BASE).into(),
            word => OsString::from(word),
        }));
        if !WAYS[way].contains(&"--after") {
            words.extend(["--after", "resume"].map(OsString::from));
        }
        words
    }

    /// Returns how long a way takes; the first call measures it.
    pub(crate) fn seconds(&mut self, way: usize) -> TestResult<f64> {
        if let Some(seconds) = self.seconds.get(&way) {
            return Ok(*seconds);
        }
        let file = self.directory.path().join("whole.vmf");
        let began = Instant::now();
        vmfile(self.words(way, &file)).assert(0, &["saved"]);
        let seconds = began.elapsed().as_secs_f64();
        fs::remove_file(&file)?;
        self.run_if_paused()?;
        self.seconds.insert(way, seconds);
        Ok(seconds)
    }

    /// Lets the guest run after a save with `--after pause`.
    pub(crate) fn run_if_paused(&mut self) -> TestResult {
        if self.guest.status()? == "paused" { self.guest.resume() } else { Ok(()) }
    }

    /// Runs `save`, which kills a save, and checks the VM.
    pub(crate) fn end_a_save(
        &mut self,
        (what, way, file): (&str, usize, &Path),
        save: impl FnOnce(&mut Trial) -> TestResult<(Said, u32)>,
    ) -> TestResult {
        let image = self.image()?;
        let images = self.images()?;
        let (said, pid) = save(self)?;
        let killed_at = Instant::now();
        let is_there = file.exists();
        self.finished += u64::from(is_there);
        self.ended += u64::from(said.code != Some(0));
        // A file that has its name and may not be durable is left, and the guest runs: the save has failed.
        let has_failed = matches!(said.code, Some(3..=6));
        let asked_to_stand = WAYS[way].contains(&"pause") && is_there && !has_failed;
        let is_alive = |guest: &mut Guest| {
            guest
                .status()
                .is_ok_and(|status| status == "running" || asked_to_stand && status == "paused")
        };
        wait_until(&format!("{what}: the guest runs"), || is_alive(&mut self.guest))
            .map_err(|error| self.with_state(error))?;
        let took = killed_at.elapsed();
        self.slowest = self.slowest.max(took);
        assert!(took < SOON * ALLOWANCE, "{what}: the guest ran after {took:?}; {said:?}");
        // The rest may take longer, because an overlay is merged while the guest runs.
        wait_until(&format!("{what}: nothing is left in QEMU"), || {
            State::of(&mut self.guest).is_ok_and(|state| state == self.before)
        })
        .map_err(|error| self.with_state(error))?;
        assert_eq!(self.guest.status()? == "paused", asked_to_stand, "{what}");
        self.run_if_paused()?;
        self.expect_no_trace(what, (file, is_there), (image, images))?;
        let sockets = format!("vmfile-{pid}-");
        let left = names_in(Path::new("/tmp")).into_iter().find(|name| name.starts_with(&sockets));
        assert_eq!(left, None, "{what}");
        self.guest.counts_on(1)?;
        Ok(())
    }

    /// Adds QEMU's state to an error.
    fn with_state(&mut self, error: TestError) -> TestError {
        let status = self.guest.status();
        let migration = self.guest.qmp("query-migrate", json!({}));
        let state = State::of(&mut self.guest);
        let before = &self.before;
        format!("{error}: {status:?}, {migration:?}, {state:?}, expected {before:?}").into()
    }

    /// Expects that the image in use and the files are as before, unless the save completed.
    fn expect_no_trace(
        &mut self,
        what: &str,
        (file, is_there): (&Path, bool),
        (image, images): (String, Vec<String>),
    ) -> TestResult {
        if is_there {
            let said = vmfile(words!["check", file]);
            said.assert(0, &[]);
            fs::remove_file(file)?;
        } else {
            assert_eq!(self.image()?, image, "{what}");
            assert_eq!(self.images()?, images, "{what}");
        }
        assert_eq!(names_in(self.directory.path()), [""; 0], "{what}");
        Ok(())
    }

    /// The top image of the guest's disk, as QEMU reports it.
    fn image(&mut self) -> TestResult<String> {
        let drives = self.guest.qmp("query-block", json!({}))?;
        let mut drives = drives.as_array().into_iter().flatten();
        let disk = drives.find(|drive| drive["device"] == "disk0").ok_or("no disk")?;
        Ok(disk["inserted"]["image"]["filename"].as_str().unwrap_or_default().to_owned())
    }

    fn images(&self) -> TestResult<Vec<String>> {
        let disk = self.guest.config().disk_path();
        let mut names = names_in(disk.parent().ok_or("a directory")?);
        names.sort();
        Ok(names)
    }

    /// Expects that a save which is not killed succeeds.
    pub(crate) fn next_save_is_right(&mut self) -> TestResult {
        let file = self.directory.path().join("next.vmf");
        vmfile(words!["save", self.guest.qmp_path(), file, "--after", "resume"])
            .assert(0, &["saved"]);
        vmfile(words!["check", file]).assert(0, &[]);
        fs::remove_file(&file)?;
        self.guest.counts_on(1)
    }
}
