//! A guest that QEMU sends or takes, and a guest that sends itself to `receive`.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmfile::Control;
use vmfile::receive::{ReceiveError, ReceiveOptions, ReceiveReport, StreamFrom, receive};

use crate::{Guest, GuestConfig, Qemu, Saved, TestResult};

/// What a receive came to.
pub type Outcome = Result<ReceiveReport, ReceiveError>;

/// Lets the guest send itself to `file`, by as many multifd channels as `options` say; returns what
/// became of both.
///
/// # Errors
///
/// Whatever QEMU says.
///
/// # Panics
///
/// If the receiver does not listen, or panics.
pub fn send_to(
    guest: &mut Guest,
    file: &Path,
    options: &ReceiveOptions,
) -> TestResult<(Outcome, Value)> {
    let socket = guest.directory().join("stream");
    let uri = format!("unix:{}", socket.display());
    let from = StreamFrom::Listen(socket.clone());
    let (file, options) = (file.to_path_buf(), options.clone());
    if let Some(channels) = options.channels {
        set_capability(guest, "multifd")?;
        set_parameter(guest, "multifd-channels", json!(channels.count()))?;
    }
    set_parameter(guest, "max-bandwidth", json!(0))?;
    let receiver = thread::spawn(move || receive(from, &file, &options, &Control::none()));
    let deadline = Instant::now() + Duration::from_secs(10);
    while !socket.exists() && !receiver.is_finished() {
        assert!(Instant::now() < deadline, "the receiver listens");
        thread::sleep(Duration::from_millis(5));
    }
    let status = migrate(guest, &uri)?;
    Ok((receiver.join().expect("no panic"), status))
}

/// Lets the guest send itself to `receive`, as [`send_to`], and expects that nothing fails.
///
/// # Errors
///
/// Whatever the library or QEMU says.
///
/// # Panics
///
/// If QEMU says that it has not sent all, and as [`send_to`].
pub fn received(guest: &mut Guest, options: &ReceiveOptions) -> TestResult<Saved<ReceiveReport>> {
    Saved::by(guest, |guest, file| {
        let (received, status) = send_to(guest, file, options)?;
        let report = received?;
        assert_eq!(status["status"], "completed", "{status}");
        Ok(report)
    })
}

/// Lets QEMU send the guest to `uri`, and waits as [`wait_for_migration`].
///
/// # Errors
///
/// Whatever QEMU says.
pub fn migrate(guest: &mut Guest, uri: &str) -> TestResult<Value> {
    guest.qmp("migrate", json!({ "uri": uri }))?;
    wait_for_migration(guest)
}

/// Lets QEMU send the guest to `uri`, which must take all.
///
/// # Errors
///
/// Whatever QEMU says, and that it failed.
pub fn migrate_all(guest: &mut Guest, uri: &str) -> TestResult {
    guest.qmp("migrate", json!({ "uri": uri }))?;
    wait_until_complete(guest)
}

/// Waits until QEMU has sent or taken all.
///
/// # Errors
///
/// Whatever QEMU says, and that it failed.
pub fn wait_until_complete(guest: &mut Guest) -> TestResult {
    let answer = wait_for_migration(guest)?;
    if answer["status"] == "completed" { Ok(()) } else { Err(format!("QEMU: {answer}").into()) }
}

/// Has QEMU write the guest to `uri`, a file of the form mapped RAM.
///
/// # Errors
///
/// Whatever QEMU says.
pub fn qemu_writes(guest: &mut Guest, uri: &str) -> TestResult {
    set_capability(guest, "mapped-ram")?;
    migrate_all(guest, uri)
}

/// Has QEMU read a guest from a file of the form mapped RAM, with nothing of ours.
///
/// # Errors
///
/// Whatever QEMU says.
pub fn qemu_reads(qemu: &Qemu, config: &GuestConfig, file: &Path) -> TestResult<Guest> {
    let mut guest = config.incoming(qemu, "defer")?;
    set_capability(&mut guest, "mapped-ram")?;
    guest.qmp("migrate-incoming", json!({ "uri": format!("file:{}", file.display()) }))?;
    wait_until_complete(&mut guest)?;
    Ok(guest)
}

/// Waits until QEMU has sent all or given up; returns what it says of it.
///
/// # Errors
///
/// Whatever QEMU says.
pub fn wait_for_migration(guest: &mut Guest) -> TestResult<Value> {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let answer = guest.qmp("query-migrate", json!({}))?;
        match answer["status"].as_str() {
            Some("completed" | "failed") => return Ok(answer),
            _ if Instant::now() > deadline => return Err(format!("too long: {answer}").into()),
            _ => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Turns a migration capability of QEMU on.
///
/// # Errors
///
/// Whatever QEMU says.
pub fn set_capability(guest: &mut Guest, name: &str) -> TestResult {
    let list = json!([{ "capability": name, "state": true }]);
    guest.qmp("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
}

/// Sets a migration parameter of QEMU.
///
/// # Errors
///
/// Whatever QEMU says.
pub fn set_parameter(guest: &mut Guest, name: &str, value: Value) -> TestResult {
    let mut arguments = json!({});
    arguments[name] = value;
    guest.qmp("migrate-set-parameters", arguments).map(drop)
}
