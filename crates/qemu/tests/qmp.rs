//! QMP with peers that misbehave.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd as Socket;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmfile_qemu::qmp::{EVENT_COUNT_MAX, LINE_LEN_MAX};
use vmfile_qemu::{Qmp, QmpError};

const SHORT: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_secs(20);
const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \
                        \"major\": 10}, \"package\": \"\"}, \"capabilities\": [\"oob\"]}}\r\n";

/// Connects to a peer that runs `behave` with its end.
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
    assert_eq!(
        error.to_string(),
        "the QMP connection ended during query-status: QEMU is gone, or has closed it"
    );
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

/// Returns a flag that is set after `delay`.
fn set_after(delay: Duration) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    thread::spawn(move || {
        thread::sleep(delay);
        flag.store(true, Ordering::Relaxed);
    });
    stop
}

/// Returns a socket whose backlog is full, as QEMU's is while it serves one client and two wait,
/// with the clients that keep it full.
fn full(directory: &TempDir) -> (UnixListener, Vec<Socket>, PathBuf) {
    let path = directory.path().join("full.sock");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let address = SocketAddrUnix::new(&path).unwrap();
    let mut clients = Vec::new();
    loop {
        let flags = SocketFlags::NONBLOCK;
        let client = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        if rustix::net::connect(&client, &address).is_err() {
            return (listener, clients, path);
        }
        clients.push(client);
    }
}

/// `connect` to a Unix socket blocks while the backlog is full, even after a signal that has a
/// handler. With one client at the monitor and two that waited, `vmfile list` and `save` hung and
/// ignored SIGINT.
#[test]
fn a_connect_that_finds_no_room_has_a_limit_and_says_who_waits() {
    let directory = TempDir::new().unwrap();
    let (_listener, clients, path) = full(&directory);
    let started = Instant::now();
    let error = Qmp::connect(&path, SHORT).unwrap_err();
    assert!(started.elapsed() < SHORT * 5, "{:?}", started.elapsed());
    let words = error.to_string();
    assert!(words.contains("full.sock"), "{words}");
    assert!(words.contains(&format!("and {} wait", clients.len())), "{words}");
    assert!(error.hint().is_some_and(|hint| hint.contains("second one")), "{error}");
}

#[test]
fn a_connect_that_finds_no_room_ends_when_it_is_stopped() {
    let directory = TempDir::new().unwrap();
    let (_listener, _clients, path) = full(&directory);
    let started = Instant::now();
    let error = Qmp::connect_until(&path, LONG, Some(set_after(SHORT))).unwrap_err();
    assert!(error.is_stopped(), "{error}");
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[test]
fn a_wait_for_the_greeting_ends_when_it_is_stopped() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("silent.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let started = Instant::now();
    let error = Qmp::connect_until(&path, LONG, Some(set_after(SHORT))).unwrap_err();
    assert_eq!(error.to_string(), "stopped while waiting for QEMU's greeting");
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

/// QEMU sent the answer to a killed client's command to the next client, before its greeting or
/// after it. A save failed with "not a QMP monitor", or took the answer for that to its own
/// command.
#[test]
fn what_qemu_says_to_the_client_before_is_skipped() {
    let mut qmp = connect(LONG, |mut stream| {
        for late in [json!({"return": {}, "id": 1}), json!({"event": "STOP"})] {
            stream.write_all(format!("{late}\r\n").as_bytes()).unwrap();
        }
        let mut peer = greet(stream);
        let id = read_id(&mut peer).unwrap();
        for late in (1..9).map(|id| json!({"return": "late", "id": id})) {
            answer(&mut peer, &late);
        }
        answer(&mut peer, &json!({"return": "late"}));
        answer(&mut peer, &json!({"return": "mine", "id": id}));
        hold(peer);
    })
    .unwrap();
    assert_eq!(qmp.execute("query-status", Value::Null).unwrap(), "mine");
    assert!(qmp.take_events().is_empty(), "an event of before");
}

/// `stop` may take minutes if disks are slow, and `save` ignored SIGINT meanwhile, which tempts
/// users to `kill -9`. The commands that restore the VM must still be sent after a signal.
#[test]
fn a_wait_for_an_answer_ends_when_it_is_stopped_and_what_puts_back_is_sent() {
    let mut qmp = connect(LONG, |stream| {
        let mut peer = greet(stream);
        let _stop = read_id(&mut peer);
        let cont = read_id(&mut peer);
        answer(&mut peer, &json!({"return": {}, "id": cont}));
        hold(peer);
    })
    .unwrap();
    qmp.set_stop(set_after(SHORT));
    let started = Instant::now();
    let error = qmp.execute("stop", Value::Null).unwrap_err();
    assert_eq!(error.to_string(), "stopped while waiting for the answer to stop");
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    // From now on, only `unstoppable` sends commands.
    let error = qmp.execute("query-status", Value::Null).unwrap_err();
    assert_eq!(error.to_string(), "stopped before query-status");
    qmp.unstoppable(LONG, |qmp| qmp.execute("cont", Value::Null)).unwrap();
    assert!(qmp.execute("query-status", Value::Null).unwrap_err().is_stopped());
}

/// The client waits a short time for the answer after a stop: then it knows what the command did,
/// and can undo it.
#[test]
fn the_answer_that_comes_soon_after_a_stop_is_taken() {
    let mut qmp = connect(LONG, |stream| {
        let mut peer = greet(stream);
        let id = read_id(&mut peer);
        thread::sleep(SHORT);
        answer(&mut peer, &json!({"return": {"fdset-id": 3}, "id": id}));
        hold(peer);
    })
    .unwrap();
    qmp.set_stop(set_after(SHORT / 2));
    assert_eq!(qmp.execute("add-fd", Value::Null).unwrap(), json!({"fdset-id": 3}));
}

#[test]
fn what_puts_back_has_a_limit_of_its_own() {
    let mut qmp = connect(LONG, |stream| hold(greet(stream))).unwrap();
    qmp.set_stop(set_after(Duration::ZERO));
    let started = Instant::now();
    let error = qmp.unstoppable(SHORT, |qmp| qmp.execute("cont", Value::Null)).unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    assert!(started.elapsed() < SHORT * 3, "{:?}", started.elapsed());
}

/// A save that a monitor left without an answer waited for ten seconds in each of its steps back, and for a minute
/// in all.
#[test]
fn what_puts_back_waits_once_for_a_peer_that_is_silent() {
    let mut qmp = connect(LONG, |stream| hold(greet(stream))).unwrap();
    let (started, limit) = (Instant::now(), SHORT * 5);
    for command in ["cont", "migrate-set-parameters", "object-del"] {
        qmp.unstoppable(limit, |qmp| qmp.execute(command, Value::Null)).unwrap_err();
    }
    assert!(started.elapsed() < limit * 2, "{:?}", started.elapsed());
}
