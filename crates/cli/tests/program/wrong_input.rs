//! Wrong arguments, and files that are not vmfile's. The tests need no guest.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, mknodat};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};
use vmfile_testing::{Case, TestResult, cases};

use crate::run::{Said, command, names_in, program, start, vmfile};
use crate::words;

/// Listens on a new socket, and calls `serve` with each connection.
fn listen(serve: impl Fn(UnixStream) + Send + 'static) -> TestResult<(TempDir, PathBuf)> {
    let directory = tempdir()?;
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path)?;
    thread::spawn(move || listener.incoming().filter_map(Result::ok).for_each(serve));
    Ok((directory, path))
}

/// A monitor that reports a running VM and answers all other commands with an empty object.
fn monitor(stream: UnixStream) {
    let mut writer = stream.try_clone().expect("a descriptor");
    let greeting = json!({"QMP": {
        "version": {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": ""},
        "capabilities": []
    }});
    let _ = writeln!(writer, "{greeting}");
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let request: Value = serde_json::from_str(&line).expect("JSON");
        let answer = match request["execute"].as_str() {
            Some("query-status") => json!({"status": "running", "running": true}),
            _ => json!({}),
        };
        let _ = writeln!(writer, "{}", json!({"return": answer, "id": request["id"]}));
    }
}

#[test]
fn a_socket_that_is_not_there_is_named() {
    vmfile(["save", "/nonexistent/vm.sock", "/tmp/never.vmf"]).assert(
        3,
        &["/nonexistent/vm.sock", "No such file or directory", "hint: name a QMP socket"],
    );
}

/// `--channels` was ignored with the route direct, and `--live` with the route native if the VM was
/// paused.
#[test]
fn options_that_exclude_one_another_are_refused_before_the_vm_is_asked() {
    for (options, said) in [
        (["--route", "direct", "--channels", "2"].as_slice(), "hint: --channels goes with"),
        (["--route", "native", "--live"].as_slice(), "hint: --live goes with"),
    ] {
        let words = ["save", "/nonexistent/vm.sock", "/tmp/never.vmf"];
        vmfile(words.iter().chain(options)).assert(2, &[said]);
        cases(1, Case::WrongInput);
    }
}

#[test]
fn a_file_that_is_no_socket_is_refused() {
    vmfile(["save", "/etc/passwd", "/tmp/never.vmf"]).assert(3, &["/etc/passwd", "hint:"]);
}

#[test]
fn a_socket_whose_owner_is_gone_is_refused() -> TestResult {
    let directory = tempdir()?;
    let path = directory.path().join("socket");
    drop(UnixListener::bind(&path)?);
    vmfile(words!["save", path, "x.vmf"]).assert(3, &["left over from a QEMU that is gone"]);
    Ok(())
}

#[test]
fn a_socket_that_speaks_something_else_is_refused() -> TestResult {
    let (_directory, path) = listen(|mut stream| {
        let _ = stream.write_all(b"220 mail.example.org ESMTP\r\n");
        thread::sleep(Duration::from_secs(1));
    })?;
    vmfile(words!["save", path, "x.vmf"]).assert(3, &["not a QMP monitor", "hint:"]);
    Ok(())
}

#[test]
fn a_silent_socket_ends_in_seconds_and_hints_at_another_client() -> TestResult {
    let (_directory, path) = listen(|stream| {
        thread::sleep(Duration::from_secs(60));
        drop(stream);
    })?;
    let start = Instant::now();
    let said = vmfile(words!["save", path, "x.vmf"]);
    said.assert(3, &["no QMP greeting", "another client may hold this monitor"]);
    let error = vmfile(words!["save", "--json", path, "x.vmf"]).json_error()?;
    assert!(error["hint"].as_str().is_some_and(|hint| hint.contains("another client")), "{error}");
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    Ok(())
}

#[test]
fn an_unknown_process_and_an_unknown_name_are_refused() {
    vmfile(["save", "4194305", "x.vmf"]).assert(3, &["no VM 4194305", "vmfile list"]);
    vmfile(["save", "no-such-vm", "x.vmf"]).assert(3, &["no VM no-such-vm", "vmfile list"]);
}

#[test]
fn a_name_that_is_taken_is_refused_before_the_vm_is_touched() -> TestResult {
    let (directory, vm) = listen(monitor)?;
    let file = directory.path().join("vm.vmf");
    fs::write(&file, "mine")?;
    vmfile(words!["save", vm, file]).assert(5, &["vm.vmf exists", "--force replaces it"]);
    vmfile(words!["save", vm, directory.path()]).assert(5, &["exists", "name a file in it"]);
    vmfile(words!["save", vm, directory.path(), "--force"])
        .assert(5, &["is not a regular file", "choose another name"]);
    let missing = directory.path().join("missing/vm.vmf");
    vmfile(words!["save", vm, missing]).assert(5, &["no directory", "create the directory"]);
    vmfile(words!["save", vm, file.join("vm.vmf")]).assert(5, &["is not a directory"]);
    vmfile(words!["save", vm, "/tmp/"]).assert(2, &["names no file"]);
    vmfile(words!["save", vm, "/"]).assert(2, &["names no file"]);
    assert_eq!(fs::read(&file)?, b"mine");
    assert_eq!(names_in(directory.path()).len(), 2, "the socket and the file");
    Ok(())
}

#[test]
fn a_monitor_that_answers_nonsense_ends_in_an_error_and_no_file() -> TestResult {
    let (directory, vm) = listen(monitor)?;
    let file = directory.path().join("vm.vmf");
    let said = vmfile(words!["save", vm, file, "--force"]);
    said.assert(3, &["vmfile: "]);
    assert_eq!(names_in(directory.path()), ["socket"]);
    Ok(())
}

/// Asserts that every verb that opens `path` refuses it in the same way.
fn refused(path: &Path, code: i32, words: &[&str]) -> TestResult {
    for verb in ["info", "check", "restore"] {
        let name = path.display().to_string();
        let said = vmfile(words![verb, path]);
        said.assert(code, &[&name]);
        said.assert(code, words);
        assert_eq!(said.stdout, "");
        let error = vmfile(words![verb, path, "--json"]).json_error()?;
        assert_eq!(error["code"], code);
        assert!(error["message"].as_str().is_some_and(|text| text.contains(&name)), "{error}");
        assert!(error["kind"].is_string() && error.get("hint").is_some(), "{error}");
        cases(1, Case::WrongInput);
    }
    Ok(())
}

#[test]
fn files_that_are_none_of_ours_are_refused() -> TestResult {
    let directory = tempdir()?;
    let path = |name: &str| directory.path().join(name);
    fs::write(path("empty"), "")?;
    fs::write(path("text"), "root:x:0:0:root:/root:/bin/bash\n".repeat(100))?;
    fs::copy("/bin/sh", path("program"))?;
    fs::write(path("magic"), "QEVM")?;
    fs::write(path("zeros"), vec![0; 1 << 20])?;
    mknodat(rustix::fs::CWD, path("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    refused(&path("missing"), 5, &["No such file or directory"])?;
    for name in ["empty", "text", "program", "magic", "zeros"] {
        refused(&path(name), 4, &["at offset 0x", "hint: expected a file of `vmfile save`"])?;
    }
    refused(&path("pipe"), 4, &["is not a regular file"])?;
    refused(directory.path(), 4, &["is not a regular file"])?;
    refused(Path::new("/dev/zero"), 4, &["is not a regular file"])
}

#[test]
fn an_offset_past_the_end_is_refused() -> TestResult {
    let directory = tempdir()?;
    let path = directory.path().join("short");
    fs::write(&path, "QEVM")?;
    let name = format!("file:{},offset=0xffffffffffffffff", path.display());
    vmfile(["info", &name]).assert(4, &["short"]);
    let name = format!("file:{},offset=1M", path.display());
    vmfile(["check", &name]).assert(4, &["short"]);
    Ok(())
}

#[test]
fn a_file_that_is_none_is_refused_before_a_waiting_qemu_is_asked() -> TestResult {
    vmfile(["restore", "/etc/passwd", "--qmp", "/nonexistent/s"]).assert(4, &["/etc/passwd"]);
    Ok(())
}

#[test]
fn whoever_stops_reading_causes_no_panic() -> TestResult {
    for arguments in [&["--help"][..], &["list"], &["list", "--json"], &["save", "--help"]] {
        let mut child = start(arguments)?;
        drop(child.stdout.take());
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), stderr.as_ref()), (Some(0), ""), "{arguments:?}");
    }
    Ok(())
}

#[test]
fn a_full_standard_output_is_an_error() -> TestResult {
    let full = fs::File::options().write(true).open("/dev/full")?;
    let output = command().arg("list").stdout(full).stderr(Stdio::piped()).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5));
    assert!(stderr.contains("stdout: No space left on device"), "{stderr}");
    Ok(())
}

/// Rust's runtime puts /dev/null in the place of a closed descriptor; docs/cli.md says so.
#[test]
fn a_closed_standard_output_is_as_dev_null() -> TestResult {
    for (verb, to) in [("list", ">&-"), ("list --json", ">&-"), ("list", ">/dev/null")] {
        let shell = format!("exec \"$0\" {verb} {to}");
        let output = Command::new("sh").args(words!["-c", shell, program()]).output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), stderr.as_ref()), (Some(0), ""), "{verb} {to}");
    }
    Ok(())
}

/// The record of a save is text; a path that is none was a panic.
#[test]
fn a_destination_that_is_no_text_is_refused() -> TestResult {
    use std::os::unix::ffi::OsStrExt as _;
    let (_directory, socket) = listen(monitor)?;
    let directory = tempdir()?;
    let file = directory.path().join(std::ffi::OsStr::from_bytes(b"bad\xff.vmf"));
    let said = vmfile(words!["save", socket, file, "--after", "resume"]);
    said.assert(2, &["is not UTF-8"]);
    assert_eq!(names_in(directory.path()), [""; 0]);
    Ok(())
}

/// `save VM -` made a file of that name.
#[test]
fn standard_output_is_no_file_to_save_to() -> TestResult {
    let directory = tempdir()?;
    for words in
        [&["save", "vm.qmp", "-"][..], &["receive", "-"], &["convert", "a", "-", "--to", "stream"]]
    {
        let said = Said::from(command().current_dir(&directory).args(words).output()?);
        said.assert(2, &["does not go into a pipe", "./-"]);
        cases(1, Case::WrongInput);
    }
    assert_eq!(fs::read_dir(directory.path())?.count(), 0);
    Ok(())
}
