//! The userfaultfd of a process, as another one uses it.

use std::io;
use std::thread;
use std::time::Duration;

use vmfile_engine::{ProcessMemory, Userfault};

use crate::guarded::{Guarded, PAGE};

const SOON: Duration = Duration::from_millis(1);

#[test]
fn a_write_waits_until_its_protection_is_lifted() {
    let Some(memory) = Guarded::new(1) else { return };
    let userfault = memory.userfault();
    let page = |page: usize| {
        let start = memory.address() + (page * PAGE) as u64;
        start..start + PAGE as u64
    };
    assert_eq!(userfault.wait(SOON).unwrap(), []);
    thread::scope(|scope| {
        let writer = scope.spawn(|| memory.put(3, 2));
        let address = loop {
            if let Some(&address) = userfault.wait(SOON).unwrap().first() {
                break address;
            }
        };
        assert!(page(3).contains(&address), "{address:#x}");
        // Another page is none of it, and waking alone lifts nothing: the fault comes again.
        userfault.lift(&page(4)).unwrap();
        userfault.wake(&page(3)).unwrap();
        while userfault.wait(SOON).unwrap().is_empty() {}
        assert!(!writer.is_finished());
        userfault.lift(&page(3)).unwrap();
        writer.join().unwrap();
        // Protected once more, it waits once more.
        userfault.protect(&page(3)).unwrap();
        let writer = scope.spawn(|| memory.put(3, 3));
        while userfault.wait(SOON).unwrap().is_empty() {}
        userfault.lift(&page(3)).unwrap();
        writer.join().unwrap();
    });
    assert_eq!(memory.words()[3] % 65536, 3);
    memory.unregister();
    assert_eq!(userfault.lift(&page(3)).unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn what_is_no_userfaultfd_is_not_listed() {
    let process = ProcessMemory::open(std::process::id()).unwrap();
    let before = Userfault::all_of(&process).unwrap();
    let file = tempfile::tempfile().unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    assert!(!before.contains(&number) && !Userfault::all_of(&process).unwrap().contains(&number));
    let error = process.descriptor(i32::MAX).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::BADF.raw_os_error()));
}
