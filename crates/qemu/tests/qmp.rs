//! QMP against peers that are not what they should be.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use vmfile_qemu::qmp::{EVENT_COUNT_MAX, LINE_LEN_MAX};
use vmfile_qemu::{Qmp, QmpError};

const SHORT: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_secs(20);
const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \
                        \"major\": 10}, \"package\": \"\"}, \"capabilities\": [\"oob\"]}}\r\n";

/// Connects to a peer that does what `behave` says with its end.
fn connect(
    timeout: Duration,
    behave: impl FnOnce(UnixStream) + Send + 'static,
) -> Result<Qmp, QmpError> {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("peer.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || behave(listener.accept().unwrap().0));
    Qmp::connect(&path, timeout)
}

/// Reads one command and returns its id.
fn read_id(peer: &mut BufReader<UnixStream>) -> Option<u64> {
    let mut line = String::new();
    peer.read_line(&mut line).ok()?;
    let command: Value = serde_json::from_str(&line).ok()?;
    command.get("id")?.as_u64()
}

/// Greets as QEMU does, answers the negotiation, and returns the stream for more.
fn greet(mut stream: UnixStream) -> BufReader<UnixStream> {
    stream.write_all(GREETING.as_bytes()).unwrap();
    let mut peer = BufReader::new(stream);
    let id = read_id(&mut peer).unwrap();
    answer(&mut peer, &json!({"return": {}, "id": id}));
    peer
}

fn answer(peer: &mut BufReader<UnixStream>, message: &Value) {
    let _ = peer.get_mut().write_all(format!("{message}\r\n").as_bytes());
}

/// Keeps the connection open until the other side closes it.
fn hold(mut peer: BufReader<UnixStream>) {
    while read_id(&mut peer).is_some() {}
}

#[test]
fn a_socket_that_nobody_serves_is_named() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("stale.sock");
    drop(UnixListener::bind(&path).unwrap());
    let error = Qmp::connect(&path, SHORT).unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }), "{error}");
    assert!(error.to_string().contains("stale.sock"));
    assert!(error.hint().is_some_and(|hint| hint.contains("left over")));
}

#[test]
fn a_silent_socket_is_told_from_one_that_is_not_qmp() {
    let error = connect(SHORT, |stream| hold(BufReader::new(stream))).unwrap_err();
    assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
}

#[test]
fn another_protocol_is_not_qmp() {
    for words in ["SSH-2.0-OpenSSH_9.2\r\n", "{\"hello\": 1}\n", "[1]\n", "(qemu) "] {
        let error = connect(SHORT, move |mut stream| {
            stream.write_all(words.as_bytes()).unwrap();
            hold(BufReader::new(stream));
        });
        let error = error.unwrap_err();
        assert!(matches!(error, QmpError::NotQmp { .. }), "{words:?}: {error}");
    }
}

#[test]
fn a_line_without_end_is_given_up() {
    let started = Instant::now();
    let error = connect(LONG, |mut stream| {
        let piece = vec![b'x'; 1 << 16];
        for _ in 0..=LINE_LEN_MAX / piece.len() * 2 {
            if stream.write_all(&piece).is_err() {
                return;
            }
        }
    });
    let error = error.unwrap_err();
    assert!(matches!(error, QmpError::NotQmp { .. }), "{error}");
    assert!(started.elapsed() < LONG);
}

#[test]
fn a_peer_that_closes_in_the_middle_of_an_answer_is_closed() {
    let mut qmp = connect(LONG, |stream| {
        let mut peer = greet(stream);
        let _ = read_id(&mut peer);
        let _ = peer.get_mut().write_all(b"{\"return\": {\"stat");
    })
    .unwrap();
    let error = qmp.execute("query-status", Value::Null).unwrap_err();
    assert!(error.is_closed(), "{error}");
    assert_eq!(error.to_string(), "QEMU closed the QMP connection during query-status");
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_one() {
    let mut qmp = connect(LONG, |stream| {
        let mut peer = greet(stream);
        let first = read_id(&mut peer).unwrap();
        let second = read_id(&mut peer).unwrap();
        answer(&mut peer, &json!({"return": {"status": "late"}, "id": first}));
        answer(&mut peer, &json!({"return": {"status": "right"}, "id": second}));
        hold(peer);
    })
    .unwrap();
    let error = qmp.execute_within("query-status", Value::Null, SHORT).unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    assert_eq!(qmp.execute("query-status", Value::Null).unwrap(), json!({"status": "right"}));
}

#[test]
fn a_flood_of_events_neither_fills_memory_nor_hides_the_timeout() {
    let mut qmp = connect(LONG, |stream| {
        let mut peer = greet(stream);
        let event = b"{\"event\": \"RTC_CHANGE\", \"data\": {\"offset\": 1}}\n".repeat(100);
        while peer.get_mut().write_all(&event).is_ok() {}
    })
    .unwrap();
    let error = qmp.execute_within("query-status", Value::Null, SHORT).unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    assert!(qmp.events_dropped() > 0);
    assert_eq!(qmp.take_events().len(), EVENT_COUNT_MAX);
}

#[test]
fn an_event_is_waited_for_and_the_deadline_is_kept() {
    let mut qmp = connect(LONG, |stream| {
        let mut peer = greet(stream);
        answer(&mut peer, &json!({"event": "FROM_THE_FUTURE", "data": {"x": []}}));
        answer(&mut peer, &json!({"event": "STOP"}));
        hold(peer);
    })
    .unwrap();
    let stop = qmp.wait_for_event(&["STOP"], Instant::now() + LONG).unwrap();
    assert_eq!(stop.unwrap().name, "STOP");
    let none = qmp.wait_for_event(&["STOP"], Instant::now() + SHORT).unwrap();
    assert_eq!(none, None);
    assert_eq!(qmp.take_events().first().unwrap().name, "FROM_THE_FUTURE");
}
