//! The program and QEMU as a user who is not root: what works, what takes the second best, and what
//! is refused.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::geteuid;
use serde_json::{Value, json};
use vmfile_testing::{
    Guest, GuestConfig, OrdinaryUser, Qemu, Ram, TestResult, Unprivileged, requires,
};

use crate::guests::directory;
use crate::run::{EndAllIn, Said, names_in, program, strace, vmfile};
use crate::words;

/// A user without rights, and the program where that user can run it.
struct User {
    user: OrdinaryUser,
    program: PathBuf,
}

impl User {
    fn new(user: OrdinaryUser) -> TestResult<User> {
        let program = user.copy(program())?;
        Ok(User { user, program })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.user.directory().join(name)
    }

    /// Runs the program as this user.
    fn vmfile(&self, arguments: &[OsString]) -> TestResult<Said> {
        self.under(&[], arguments)
    }

    /// Runs the program as this user, by a wrapper that is given as words.
    fn under(&self, wrapper: &[&str], arguments: &[OsString]) -> TestResult<Said> {
        let mut command = self.user.command("/usr/bin/env");
        command.arg("--default-signal").args(wrapper).arg(&self.program).args(arguments);
        Ok(command.env_remove("COLUMNS").stdin(Stdio::null()).output()?.into())
    }

    /// Saves a guest as this user, lets it run on, and returns the report.
    fn saves(&self, guest: &mut Guest, file: &Path, way: &[&str]) -> TestResult<Value> {
        let words = words!["save", guest.qmp_path(), file, "--after", "resume", "--json"];
        let way = way.iter().map(OsString::from);
        let said = self.vmfile(&words.into_iter().chain(way).collect::<Vec<_>>())?;
        said.assert(0, &[]);
        self.owns(file);
        self.vmfile(&words!["check", file])?.assert(0, &["ok: "]);
        guest.runs_on(1)?;
        said.json()
    }

    /// Expects that a save fails with this status and these words, makes no file, and leaves the guest as
    /// it was.
    fn fails(&self, guest: &mut Guest, way: &[&str], (code, words): (i32, &[&str])) -> TestResult {
        let file = self.path("none.vmf");
        let save = words!["save", guest.qmp_path(), file, "--after", "resume"];
        let way = way.iter().map(OsString::from);
        self.vmfile(&save.into_iter().chain(way).collect::<Vec<_>>())?.assert(code, words);
        assert!(!file.exists());
        guest.runs_on(1)
    }

    /// Restores a file as this user, and expects that the guest counts on.
    fn restores(&self, config: &GuestConfig, qemu: &Qemu, words: &[OsString]) -> TestResult<Value> {
        let prepared = config.prepare(qemu)?;
        prepared.belongs_to(&self.user)?;
        let _end = EndAllIn(prepared.directory().to_path_buf());
        let line = prepared.command_line();
        let words =
            words!["restore", "--json", "--disks-changed-ok"].into_iter().chain(words.to_vec());
        let words: Vec<OsString> = words.chain([OsString::from("--")]).chain(line).collect();
        let said = self.vmfile(&words)?;
        said.assert(0, &[]);
        prepared.attach()?.counts_on(2)?;
        said.json()
    }

    /// Expects that a file belongs to the user, and that no other user may read it.
    #[track_caller]
    fn owns(&self, file: &Path) {
        assert_eq!(owner_and_mode(file), (self.user.id(), 0o600), "{}", file.display());
    }
}

fn owner_and_mode(file: &Path) -> (u32, u32) {
    let metadata = file.metadata().expect("it is there");
    (metadata.uid(), metadata.permissions().mode() & 0o7777)
}

fn small(seed: u32) -> GuestConfig {
    Guest::boot_sector(Ram::private(64)).seed(seed)
}

/// Ways to save, and the route in the report.
const WAYS: [(&[&str], &str); 8] = [
    (&["--route", "direct"], "direct"),
    (&["--route", "direct", "--with-disks"], "direct"),
    (&["--base", "auto"], "direct"),
    (&["--route", "stream"], "stream"),
    (&["--route", "stream", "--channels", "2"], "stream"),
    (&["--route", "native"], "native"),
    (&["--live", "--with-disks"], "direct"),
    (&["--live", "--base", "auto"], "direct"),
];

/// Every test of a VM ran as root, who may do anything.
#[test]
fn a_user_saves_a_vm_in_every_way_and_has_it_back_in_every_mode() -> TestResult {
    let qemu = requires!(qemu >= "10.0");
    let user = User::new(requires!(OrdinaryUser::new()))?;
    let config = small(461).arguments(["-name", "cli-461"]);
    let mut guest = config.prepare(&qemu)?.start_as(&user.user)?;
    let vms = user.vmfile(&words!["list", "--json"])?.json()?;
    let vm = vms.as_array().into_iter().flatten().find(|vm| vm["name"] == "cli-461");
    assert_eq!(vm.ok_or("it is listed")?["routes"], json!(["direct", "stream", "native"]));
    for (number, (way, route)) in WAYS.into_iter().enumerate() {
        let file = user.path(&format!("{number}.vmf"));
        let report = user.saves(&mut guest, &file, way)?;
        assert_eq!(report["route"], route, "{way:?}: {report}");
        assert!(!report["warnings"].to_string().contains("denied"), "{report}");
        user.vmfile(&words!["info", file])?.assert(0, &["cli-461"]);
    }
    for (file, mode) in [("0", "map"), ("2", "load"), ("3", "stream"), ("5", "map"), ("7", "load")]
    {
        let file = user.path(&format!("{file}.vmf"));
        let report = user.restores(&config, &qemu, &words![file, "--mode", mode])?;
        assert_eq!(report["mode"], mode, "{report}");
    }
    guest.runs_on(1)
}

/// `convert`, `send` and `receive` as well, and the command line in a file of the user's own is run.
#[test]
fn a_user_moves_a_vm_through_every_form_of_file() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let user = User::new(requires!(OrdinaryUser::new()))?;
    let mut guest = small(462).prepare(&qemu)?.start_as(&user.user)?;
    let _end = EndAllIn(guest.directory().to_path_buf());
    let file = |name: &str| user.path(name);
    user.vmfile(&words!["save", guest.qmp_path(), file("vm.vmf")])?.assert(0, &["saved"]);
    guest.wait_for_exit()?;
    let convert = words!["convert", file("vm.vmf"), file("vm.mig"), "--to", "stream"];
    user.vmfile(&convert)?.assert(0, &["converted"]);
    let back = words!["convert", file("vm.mig"), file("back.vmf"), "--to", "mapped-ram"];
    user.vmfile(&back)?.assert(0, &["converted"]);
    let script = "\"$0\" send \"$1\" | \"$0\" receive \"$2\"";
    let mut sent = user.user.command("sh");
    sent.args(words!["-c", script, user.program, file("back.vmf"), file("received.vmf")]);
    Said::from(sent.output()?).assert(0, &["sent", "received"]);
    for name in ["vm.vmf", "vm.mig", "back.vmf", "received.vmf"] {
        user.owns(&file(name));
    }
    let seen = guest.counts().len();
    user.vmfile(&words!["restore", file("vm.vmf")])?.assert(0, &["restored  running"]);
    crate::run::wait_until("two passes", || guest.counts().len() >= seen + 2)?;
    guest.judge_counts()
}

/// A live save said that the kernel did not support it, also if only the user was not allowed it.
#[test]
fn a_live_save_uses_userfault_if_the_user_may_and_says_what_is_missing_if_not() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let user = User::new(requires!(OrdinaryUser::new()))?;
    let file = user.path("vm.vmf");
    for (is_allowed, expected) in [(false, "aside"), (true, "userfault")] {
        let _setting = requires!(Unprivileged::userfault(is_allowed));
        let mut guest = small(463).prepare(&qemu)?.start_as(&user.user)?;
        let report = user.saves(&mut guest, &file, &["--live", "--force"])?;
        let method = report["live_method"].as_str().unwrap_or_default();
        assert!(method.starts_with(expected), "{report}");
        assert_eq!(method.contains("vm.unprivileged_userfaultfd=1"), !is_allowed, "{report}");
        if !is_allowed {
            let report =
                user.saves(&mut guest, &file, &["--live", "--route", "stream", "--force"])?;
            assert!(report["live_method"].to_string().contains("pre-copy"), "{report}");
        }
    }
    Ok(())
}

/// Only root may look into a process whose program its user may not read.
#[test]
fn a_qemu_that_its_user_may_not_trace_is_saved_and_restored_by_its_stream() -> TestResult {
    let qemu = requires!(qemu >= "10.0");
    let user = User::new(requires!(OrdinaryUser::new()))?;
    let program = user.user.copy(&qemu.executable()?)?;
    fs::set_permissions(&program, Permissions::from_mode(0o711))?;
    let qemu = qemu.as_program(&program);
    let config = small(464);
    let mut guest = config.prepare(&qemu)?.start_as(&user.user)?;
    for (number, way) in
        [&[][..], &["--base", "auto"], &["--route", "native"], &["--live"]].iter().enumerate()
    {
        let file = user.path(&format!("{number}.vmf"));
        let report = user.saves(&mut guest, &file, way)?;
        let text = report.to_string();
        assert!(
            report["route"] != "direct" && text.contains("Permission denied"),
            "{way:?}: {text}"
        );
        assert!(text.contains("a restore needs one after"), "{text}");
    }
    let trace = (5, &["Permission denied", "the right to trace it", "--route stream"][..]);
    user.fails(&mut guest, &["--route", "direct"], trace)?;
    user.fails(&mut guest, &["--live", "--route", "direct"], trace)?;
    let file = user.path("0.vmf");
    user.restores(&config, &qemu, &words![file])?;
    let report = user.restores(&config, &qemu, &words![file, "--mode", "stream"])?;
    assert_eq!(report["mode"], "stream");
    Ok(())
}

/// Whoever may connect to a VM's monitor may save it, and may do nothing else to it.
#[test]
fn a_vm_of_root_is_out_of_a_users_reach_unless_its_monitor_is_open() -> TestResult {
    let qemu = requires!(qemu >= "10.0");
    let user = User::new(requires!(OrdinaryUser::new()))?;
    let mut guest = small(465).arguments(["-name", "cli-465"]).boot_to(&qemu, 1)?;
    let socket = guest.qmp_path();
    let (name, pid) = (socket.display().to_string(), guest.pid()?.to_string());
    // Its directory is closed; then only the socket is.
    for mode in [0o700, 0o755] {
        fs::set_permissions(guest.directory(), Permissions::from_mode(mode))?;
        let vms = user.vmfile(&words!["list", "--json"])?.json()?;
        let vm = vms.as_array().into_iter().flatten().find(|vm| vm["name"] == "cli-465");
        let reason = vm.ok_or("it is listed")?["reason"].to_string();
        assert!(reason.contains("Permission denied") && reason.contains(&name), "{reason}");
        for vm in [&name, &pid, "cli-465"] {
            let said = user.vmfile(&words!["save", vm, user.path("none.vmf")])?;
            said.assert(3, &[&name, "Permission denied", "hint: run as the user who owns the VM"]);
        }
    }
    fs::set_permissions(&socket, Permissions::from_mode(0o666))?;
    let report = user.saves(&mut guest, &user.path("vm.vmf"), &[])?;
    assert_eq!(report["route"], "stream", "{report}");
    let unread = format!("read the program of process {pid}: Permission denied");
    assert!(report["warnings"].to_string().contains(&unread), "{report}");
    let report = user.saves(&mut guest, &user.path("live.vmf"), &["--live"])?;
    assert!(report["live_method"].to_string().contains("Permission denied"), "{report}");
    let trace = (5, &["look into process", "Permission denied", "the right to trace it"][..]);
    user.fails(&mut guest, &["--route", "direct"], trace)?;
    let channels = (5, &["give it to user 0, who runs QEMU", "without --channels"][..]);
    user.fails(&mut guest, &["--route", "stream", "--channels", "2"], channels)?;
    // `vmfile-PID-NUMBER`; other programs may have files of similar names.
    let is_left = |name: &String| {
        let rest = name.strip_prefix("vmfile-").unwrap_or_default();
        rest.starts_with(|first: char| first.is_ascii_digit())
    };
    let left = names_in(Path::new("/tmp")).into_iter().find(is_left);
    assert_eq!(left, None);
    Ok(())
}

/// Each message names what was refused and where.
#[test]
fn files_and_directories_of_root_are_closed_to_a_user() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let user = User::new(requires!(OrdinaryUser::new()))?;
    let mut guest = small(466).prepare(&qemu)?.start_as(&user.user)?;
    let closed = user.path("closed");
    fs::create_dir(&closed)?;
    let (theirs, no) = (user.path("theirs.vmf"), "Permission denied");
    vmfile(words!["save", guest.qmp_path(), theirs, "--after", "resume"]).assert(0, &["saved"]);
    assert_eq!(owner_and_mode(&theirs), (geteuid().as_raw(), 0o600));
    let (name, new) = (theirs.display().to_string(), user.path("new.mig"));
    let convert = words!["convert", theirs, new, "--to", "stream"];
    for words in [
        &words!["info", theirs][..],
        &words!["check", theirs],
        &words!["send", theirs],
        &words!["restore", theirs],
        &convert,
    ] {
        user.vmfile(words)?.assert(5, &["open ", &name, no, "hint: vmfile makes files that only"]);
    }
    let report = user.saves(&mut guest, &user.path("own.vmf"), &["--base", "auto"])?;
    assert!(report["warnings"].to_string().contains(&format!("open {name}: {no}")), "{report}");

    let (inside, own) = (closed.join("new"), user.path("own.vmf"));
    let cannot = format!("cannot create {}: {no}", inside.display());
    user.vmfile(&words!["save", guest.qmp_path(), inside])?.assert(5, &[&cannot]);
    user.vmfile(&words!["receive", inside])?.assert(5, &[&cannot]);
    user.vmfile(&words!["convert", own, inside, "--to", "stream"])?.assert(5, &[&cannot]);
    let listen = words!["receive", new, "--listen", format!("unix:{}", inside.display())];
    let place = "hint: name a socket in a directory where this user may make files";
    user.vmfile(&listen)?.assert(5, &["listen at ", "/closed/new", no, place]);
    let socket = closed.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let send = words!["send", own, "--connect", format!("unix:{}", socket.display())];
    let words = ["connect to ", "/closed/socket", no, "hint: run as the user of the QEMU"];
    user.vmfile(&send)?.assert(3, &words);
    assert!(!new.exists());
    guest.runs_on(1)
}

/// What root makes for a user's VM is root's, but what QEMU makes is the user's.
#[test]
fn root_saves_a_users_vm_and_its_overlays_stay_the_users() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let user = User::new(requires!(OrdinaryUser::new()))?;
    let mut guest = small(467).prepare(&qemu)?.start_as(&user.user)?;
    let directory = directory()?;
    for (number, way) in [
        &["--with-disks"][..],
        &["--live"],
        &["--route", "stream", "--channels", "2"],
        &["--route", "native"],
    ]
    .iter()
    .enumerate()
    {
        let file = directory.path().join(number.to_string());
        let words = words!["save", guest.qmp_path(), file, "--after", "resume"];
        vmfile(words.into_iter().chain(way.iter().map(OsString::from))).assert(0, &["saved"]);
        assert_eq!(owner_and_mode(&file), (geteuid().as_raw(), 0o600));
        guest.runs_on(1)?;
    }
    let images = guest.config().disk_path();
    let images = images.parent().ok_or("a directory")?;
    for name in names_in(images) {
        assert_eq!(owner_and_mode(&images.join(&name)).0, user.user.id(), "{name}");
    }
    assert!(names_in(images).iter().any(|name| name.contains(".vmfile-")), "an overlay");
    Ok(())
}

/// Where the kernel refuses `io_uring`, threads do the work, and the report says why. A process that cannot
/// be started for a user who may have no more ended the program with a panic.
#[test]
fn limits_of_a_user_are_kept_or_told_and_the_vm_runs_on() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(strace());
    let user = User::new(requires!(OrdinaryUser::new()))?;
    let mut guest = small(468).prepare(&qemu)?.start_as(&user.user)?;
    let file = user.path("vm.vmf");
    let save = words!["save", guest.qmp_path(), file, "--after", "resume", "--json", "--force"];
    // As with kernel.io_uring_disabled, or a filter of a container.
    let no_ring =
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=io_uring_setup:error=EPERM"];
    // The kernel counts the memory of a ring as locked before 5.12, and again in 6.18.
    let works = [
        &no_ring[..],
        &["prlimit", "--memlock=0"],
        &["prlimit", "--memlock=65536"],
        &["prlimit", "--nofile=64"],
    ];
    for limit in works {
        let said = user.under(limit, &save)?;
        said.assert(0, &[]);
        let io = said.json()?["io"].to_string();
        assert!(io.contains("io_uring"), "{limit:?}: {io}");
        assert!(
            limit != no_ring || io.contains("threads (io_uring: Operation not permitted"),
            "{io}"
        );
        user.vmfile(&words!["check", file])?.assert(0, &["ok: "]);
        user.under(limit, &words!["check", file])?.assert(0, &["ok: "]);
        guest.runs_on(1)?;
    }
    let ring = words!["check", file, "--io", "io-uring"];
    user.under(&no_ring, &ring)?.assert(5, &["Operation not permitted"]);
    fs::remove_file(&file)?;
    let said = user.under(&["prlimit", "--nproc=1"], &save)?;
    said.assert(5, &["Resource temporarily unavailable"]);
    assert!(said.json_error()?["hint"].to_string().contains("`ulimit -u`"), "{said:?}");
    assert!(!file.exists());
    guest.runs_on(1)?;
    let own = user.path("own.vmf");
    user.saves(&mut guest, &own, &[])?;
    let said = user.under(&["prlimit", "--nproc=1"], &words!["check", own])?;
    said.assert(5, &["take threads", "`ulimit -u` says"]);
    Ok(())
}

/// A save with one descriptor more each time runs out of them at every place where it takes one. It fails
/// with a hint, or says that it took the stream because of that, or has enough.
#[test]
fn a_save_that_runs_out_of_descriptors_says_so_wherever_it_does() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let user = User::new(requires!(OrdinaryUser::new()))?;
    let mut guest = small(469).prepare(&qemu)?.start_as(&user.user)?;
    let file = user.path("vm.vmf");
    let save = words!["save", guest.qmp_path(), file, "--after", "resume", "--json"];
    let (mut refused, mut by_stream) = (0, 0);
    for limit in 5.. {
        let said = user.under(&["prlimit", &format!("--nofile={limit}")], &save)?;
        // The loader of programs cannot open its libraries.
        if said.code == Some(127) {
            continue;
        }
        guest.runs_on(1)?;
        if said.code != Some(0) {
            assert!(matches!(said.code, Some(3 | 5)), "{limit}: {said:?}");
            said.assert(said.code.unwrap_or_default(), &["Too many open files"]);
            let hint = said.json_error()?["hint"].to_string();
            assert!(hint.contains("`ulimit -n`"), "{limit}: {said:?}");
            assert!(!file.exists(), "{limit}");
            refused += 1;
            continue;
        }
        user.vmfile(&words!["check", file])?.assert(0, &["ok: "]);
        fs::remove_file(&file)?;
        let report = said.json()?;
        if report["route"] == "direct" {
            break;
        }
        let why = report["route_reason"].to_string();
        assert!(why.contains("Too many open files"), "{limit}: {said:?}");
        by_stream += 1;
    }
    println!("{refused} limits were refused, with {by_stream} the memory was not found");
    assert!(refused > 0);
    Ok(())
}
