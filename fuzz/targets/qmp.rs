//! `Qmp`: what a monitor says, from its greeting on.
//!
//! The input is everything that the monitor sends; then it closes the connection.
//!
//! Contract: no panic; every command ends with an answer or an error; events are bounded.

#![no_main]

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use vmfile_qemu::qmp::{EVENT_COUNT_MAX, Qmp};

fuzz_target!(|input: &[u8]| {
    // More does not fit into the socket, and nobody reads it yet.
    if input.len() > 64 << 10 {
        return;
    }
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    theirs.write_all(input).expect("room for the input");
    theirs.shutdown(Shutdown::Write).expect("it is open");
    let Ok(mut qmp) = Qmp::from_stream(ours, Duration::from_secs(1), None, None) else { return };
    let _ = qmp.greeting();
    for command in ["query-status", "stop", "query-named-block-nodes"] {
        if let Err(error) = qmp.execute(command, serde_json::Value::Null) {
            assert!(!error.to_string().is_empty());
        }
    }
    assert!(qmp.take_events().len() <= EVENT_COUNT_MAX);
});
