//! Commands on the wire, and how long each may take.

use std::time::Duration;

use serde_json::{Value, json};

use super::error::QmpError;

/// How long a command may take that does not wait for disks.
///
/// QEMU answers a query in microseconds; half a minute forgives a host that is swapping.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a command may take that waits for disks.
///
/// `stop` drains and flushes every disk, and so does the save of the device state; `blockdev-snapshot`
/// flushes one. A network disk under load has taken minutes.
const DISK_COMMAND_TIMEOUT: Duration = Duration::from_secs(600);

/// Returns how long `command` may take, given the connection's ordinary timeout.
pub(super) fn timeout_for(command: &str, ordinary: Duration) -> Duration {
    match command {
        "stop" | "cont" | "blockdev-snapshot" | "xen-save-devices-state" => {
            ordinary.max(DISK_COMMAND_TIMEOUT)
        }
        _ => ordinary,
    }
}

/// Returns one command as the line that QEMU reads.
pub(super) fn encode(command: &str, arguments: &Value, id: u64) -> Vec<u8> {
    let message = if arguments.is_null() {
        json!({"execute": command, "id": id})
    } else {
        json!({"execute": command, "arguments": arguments, "id": id})
    };
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Returns one command as the line that QEMU reads; its answer has `id` in it, in quotes.
///
/// It is for another user of a connection that [`Qmp`](super::Qmp) has used, whose own ids are
/// numbers.
#[must_use]
pub fn command_line(command: &str, arguments: &Value, id: &str) -> Vec<u8> {
    let message = json!({"execute": command, "arguments": arguments, "id": id});
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Reads a received object as the answer to command `id`; `None` when it answers another one.
///
/// An answer to another id belongs to a command that we stopped waiting for, or to an earlier
/// client of this monitor, which may have sent no ids.
pub(super) fn decode_answer(
    mut message: Value,
    command: &str,
    id: u64,
) -> Option<Result<Value, QmpError>> {
    let found = message.get("id").map(Value::as_u64);
    if found.is_some_and(|found| found != Some(id)) {
        return None;
    }
    if let Some(value) = message.get_mut("return") {
        return found.map(|_| Ok(value.take()));
    }
    let error = message.get("error")?;
    let text = |name| error.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    Some(Err(QmpError::Refused {
        command: command.to_owned(),
        class: text("class"),
        desc: text("desc"),
    }))
}

/// Tells whether QEMU lacks the command, because it is too old or built for another target.
pub(crate) fn is_missing_command(error: &QmpError) -> bool {
    matches!(error, QmpError::Refused { class, .. } if class == "CommandNotFound")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_without_arguments_has_no_arguments_field() {
        let line = String::from_utf8(encode("query-status", &Value::Null, 7)).unwrap();
        assert_eq!(line, "{\"execute\":\"query-status\",\"id\":7}\n");
    }

    #[test]
    fn the_answer_to_an_abandoned_command_is_skipped() {
        let late = json!({"return": {"status": "running"}, "id": 1});
        assert!(decode_answer(late, "stop", 2).is_none());
    }

    #[test]
    fn an_answer_without_our_id_is_for_another_client() {
        for late in [json!({"return": {}}), json!({"return": {}, "id": "libvirt-2"})] {
            assert!(decode_answer(late, "stop", 2).is_none());
        }
    }

    #[test]
    fn an_error_without_an_id_is_ours() {
        // QEMU leaves the id out when it could not parse the command.
        let message = json!({"error": {"class": "GenericError", "desc": "JSON parse error"}});
        let answer = decode_answer(message, "getfd", 3).unwrap();
        assert!(
            matches!(answer, Err(QmpError::Refused { desc, .. }) if desc == "JSON parse error")
        );
    }

    #[test]
    fn a_command_that_flushes_disks_may_take_longer() {
        assert_eq!(timeout_for("query-status", COMMAND_TIMEOUT), COMMAND_TIMEOUT);
        assert!(timeout_for("stop", COMMAND_TIMEOUT) > COMMAND_TIMEOUT);
        assert!(timeout_for("blockdev-snapshot", COMMAND_TIMEOUT) > COMMAND_TIMEOUT);
    }
}
