//! Migrations: QEMU sends or receives a guest, and QEMU sends a guest to `receive`.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmfile::Control;
use vmfile::receive::{ReceiveError, ReceiveOptions, ReceiveReport, StreamFrom, receive};

use crate::{Guest, GuestConfig, Qemu, Saved, TestResult};

/// The result of a receive.
pub type Outcome = Result<ReceiveReport, ReceiveError>;

/// Has QEMU send the guest to [`receive`], which writes `file`, over as many multifd channels as
/// `options` say. Returns the result of the receive and QEMU's answer to `query-migrate`.
///
/// # Errors
///
/// QEMU's error.
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

/// Has QEMU send the guest to [`receive`], as [`send_to`], and expects that nothing fails.
///
/// # Errors
///
/// The library's or QEMU's error.
///
/// # Panics
///
/// If QEMU reports that the migration failed, and as [`send_to`].
pub fn received(guest: &mut Guest, options: &ReceiveOptions) -> TestResult<Saved<ReceiveReport>> {
    Saved::by(guest, |guest, file| {
        let (received, status) = send_to(guest, file, options)?;
        let report = received?;
        assert_eq!(status["status"], "completed", "{status}");
        Ok(report)
    })
}

/// Has QEMU send the guest to `uri`, and waits as [`wait_for_migration`].
///
/// # Errors
///
/// QEMU's error.
pub fn migrate(guest: &mut Guest, uri: &str) -> TestResult<Value> {
    guest.qmp("migrate", json!({ "uri": uri }))?;
    wait_for_migration(guest)
}

/// Has QEMU send the guest to `uri`, and expects that it completes.
///
/// # Errors
///
/// QEMU's error, also when the migration fails.
pub fn migrate_all(guest: &mut Guest, uri: &str) -> TestResult {
    guest.qmp("migrate", json!({ "uri": uri }))?;
    wait_until_complete(guest)
}

/// Waits until QEMU has sent or received the whole guest.
///
/// # Errors
///
/// QEMU's error, also when the migration fails.
pub fn wait_until_complete(guest: &mut Guest) -> TestResult {
    let answer = wait_for_migration(guest)?;
    if answer["status"] == "completed" { Ok(()) } else { Err(format!("QEMU: {answer}").into()) }
}

/// Has QEMU write the guest to `uri`, as a mapped-RAM file.
///
/// # Errors
///
/// QEMU's error.
pub fn qemu_writes(guest: &mut Guest, uri: &str) -> TestResult {
    set_capability(guest, "mapped-ram")?;
    migrate_all(guest, uri)
}

/// Has QEMU read a guest from a mapped-RAM file, without vmfile.
///
/// # Errors
///
/// QEMU's error.
pub fn qemu_reads(qemu: &Qemu, config: &GuestConfig, file: &Path) -> TestResult<Guest> {
    let mut guest = config.incoming(qemu, "defer")?;
    set_capability(&mut guest, "mapped-ram")?;
    guest.qmp("migrate-incoming", json!({ "uri": format!("file:{}", file.display()) }))?;
    wait_until_complete(&mut guest)?;
    Ok(guest)
}

/// Waits until QEMU's migration has completed or failed; returns the answer to `query-migrate`.
///
/// # Errors
///
/// QEMU's error.
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
/// QEMU's error.
pub fn set_capability(guest: &mut Guest, name: &str) -> TestResult {
    let list = json!([{ "capability": name, "state": true }]);
    guest.qmp("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
}

/// Sets a migration parameter of QEMU.
///
/// # Errors
///
/// QEMU's error.
pub fn set_parameter(guest: &mut Guest, name: &str, value: Value) -> TestResult {
    let mut arguments = json!({});
    arguments[name] = value;
    guest.qmp("migrate-set-parameters", arguments).map(drop)
}
