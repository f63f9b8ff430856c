//! One VM test at a time.
//!
//! Two guests under emulation on two cores take each other's time and run into each other's
//! timeouts, and cargo starts test binaries and their threads as it likes. The lock is a file in the
//! build directory, so that it also holds between test binaries.

use std::cell::RefCell;
use std::fs::{self, File};
use std::sync::{Arc, Weak};

use rustix::fs::{FlockOperation, flock};

use crate::TestResult;
use crate::build_directory::target_directory;

thread_local! {
    /// The lock of the test that runs on this thread: a test may ask for QEMU more than once.
    static OF_THIS_TEST: RefCell<Weak<VmLock>> = const { RefCell::new(Weak::new()) };
}

/// The right to run VMs, until the last copy of it is dropped.
#[derive(Debug)]
pub(crate) struct VmLock {
    _file: File,
}

impl VmLock {
    /// Waits until no other test runs VMs.
    pub(crate) fn acquire() -> TestResult<Arc<VmLock>> {
        if let Some(lock) = OF_THIS_TEST.with_borrow(Weak::upgrade) {
            return Ok(lock);
        }
        let path = target_directory().join("vm-tests.lock");
        fs::create_dir_all(target_directory())?;
        let file = File::options().create(true).truncate(false).write(true).open(&path)?;
        // A lock of this kind belongs to the open file, so it also holds between threads.
        flock(&file, FlockOperation::LockExclusive)?;
        let lock = Arc::new(VmLock { _file: file });
        OF_THIS_TEST.set(Arc::downgrade(&lock));
        Ok(lock)
    }
}
