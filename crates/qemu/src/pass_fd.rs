//! Descriptors that travel to QEMU over the monitor's socket.
//!
//! QEMU keeps them in two ways: under a name (`getfd`), for the commands that take `fd:NAME`; and
//! in numbered sets (`add-fd`), which stand for a file as `/dev/fdset/N`. For neither does QEMU
//! need a permission in the file system.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::qmp::{Qmp, QmpError, unexpected};

/// Sends as many of `bytes` as the socket takes at once, and `fd` along with the first of them.
pub(crate) fn send_some(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() {
        let fits = control.push(SendAncillaryMessage::ScmRights(&fds));
        assert!(fits, "the buffer was made for one descriptor");
    }
    // No SIGPIPE: a library cannot know what its program does with that signal.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}

/// Gives QEMU `fd` under `name`, replacing one of that name.
pub(crate) fn getfd(qmp: &mut Qmp, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
    qmp.execute_with_fd("getfd", json!({"fdname": name}), fd).map(drop)
}

/// Closes the descriptor that QEMU keeps under `name`.
pub(crate) fn closefd(qmp: &mut Qmp, name: &str) -> Result<(), QmpError> {
    qmp.execute("closefd", json!({"fdname": name})).map(drop)
}

/// The text beside each of vmfile's descriptors in QEMU's sets.
///
/// libvirtd (11.3) ends with SIGSEGV when `query-fdsets` shows a descriptor without such a text;
/// and vmfile recognizes by it a set that an earlier save has left.
pub(crate) const OPAQUE: &str = "vmfile";

/// The numbers of vmfile's sets. vmfile chooses them, and not QEMU, so that a guardian can remove a
/// set even if its process ended before QEMU answered. One save at a time uses them.
pub(crate) const FDSETS: [u64; 2] = [DEVICE_STATE_FDSET, FILE_FDSET];

/// The set of the device state's descriptor: "vmf", and a number.
pub(crate) const DEVICE_STATE_FDSET: u64 = 0x766d_6601;

/// The set of the descriptors of a file that QEMU writes.
pub(crate) const FILE_FDSET: u64 = 0x766d_6602;

/// Gives QEMU `fd` in the set `fdset`, which is made if there is none of that number.
pub(crate) fn add_fd(qmp: &mut Qmp, fdset: u64, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
    qmp.execute_with_fd("add-fd", json!({"fdset-id": fdset, "opaque": OPAQUE}), fd).map(drop)
}

/// Removes a set; QEMU closes its descriptors once nothing uses them.
pub(crate) fn remove_fd(qmp: &mut Qmp, fdset: u64) -> Result<(), QmpError> {
    qmp.execute("remove-fd", json!({"fdset-id": fdset})).map(drop)
}

/// Removes every set that a save of vmfile has left.
pub(crate) fn remove_left(qmp: &mut Qmp) -> Result<(), QmpError> {
    let sets = qmp.execute("query-fdsets", Value::Null)?;
    let sets = sets.as_array().ok_or_else(|| unexpected("query-fdsets", "list"))?;
    let is_ours = |fd: &Value| fd.get("opaque").and_then(Value::as_str) == Some(OPAQUE);
    for set in sets {
        let mut fds = set.get("fds").and_then(Value::as_array).into_iter().flatten();
        let number = set.get("fdset-id").and_then(Value::as_u64);
        if let (true, Some(number)) = (fds.any(is_ours), number) {
            remove_fd(qmp, number)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};
    use std::mem::MaybeUninit;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    #[test]
    fn a_descriptor_arrives_once_with_all_the_bytes() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (carried, mut other_end) = UnixStream::pair().unwrap();
        let sent = send_some(ours.as_fd(), b"line\n", Some(carried.as_fd())).unwrap();
        assert_eq!(sent, 5);
        drop((ours, carried));

        let mut bytes = [0_u8; 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(
            &theirs,
            &mut [io::IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::empty(),
        )
        .unwrap();
        let fds: Vec<_> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();

        assert_eq!(bytes.get(..message.bytes), Some(&b"line\n"[..]));
        assert_eq!(fds.len(), 1);
        UnixStream::from(fds.into_iter().next().unwrap()).write_all(b"x").unwrap();
        let mut byte = [0_u8; 1];
        other_end.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        assert_eq!(theirs.read(&mut byte).unwrap(), 0);
    }
}
