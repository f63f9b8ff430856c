//! One VM test at a time.
//!
//! Two emulated guests on two cores slow each other down until tests time out, and cargo runs
//! several tests of a binary at once. The lock is a file in the build directory, so that it also
//! holds between test binaries.

use std::cell::RefCell;
use std::fs::{self, File};
use std::sync::{Arc, Weak};

use rustix::fs::{FlockOperation, flock};

use crate::TestResult;
use crate::build_directory::target_directory;

thread_local! {
    /// The lock that the test on this thread holds: a test may find several QEMUs.
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
        // `flock` locks belong to the open file, so they also exclude other threads of this
        // process.
        flock(&file, FlockOperation::LockExclusive)?;
        let lock = Arc::new(VmLock { _file: file });
        OF_THIS_TEST.set(Arc::downgrade(&lock));
        Ok(lock)
    }
}
