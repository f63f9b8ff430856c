//! What the main thread of another process waits for.

use std::io::{self, Read as _};

use rustix::fs::{Mode, OFlags};

use crate::process_memory::ProcessMemory;

impl ProcessMemory {
    /// Tells whether the main thread of the process waits for another thread, by a futex: for a lock, or
    /// for an event. A thread that waits for a file, a socket or a timer does not.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error. Needs the same right as reading the memory.
    pub fn main_thread_waits(&self) -> io::Result<bool> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(self.directory(), "syscall", flags, Mode::empty())?;
        let mut line = String::new();
        // One line: the number of the system call and its arguments, or `running`.
        std::fs::File::from(file).take(256).read_to_string(&mut line)?;
        let number = line.split_whitespace().next().and_then(|word| word.parse().ok());
        // -1: in no system call, for example in a page fault.
        Ok(matches!(number, Some(libc::SYS_futex | -1)))
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    struct Ended(Child);

    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Whether the main thread of `command` comes to wait by a futex within a second.
    fn waits(command: &mut Command) -> bool {
        let mut child = Ended(command.stdin(Stdio::piped()).spawn().unwrap());
        // What the child waits for, if it reads.
        let _open = child.0.stdin.take();
        let memory = ProcessMemory::open(child.0.id()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            if memory.main_thread_waits().unwrap() {
                return true;
            }
            thread::sleep(Duration::from_millis(10));
        }
        false
    }

    #[test]
    fn a_thread_that_waits_for_a_thread_is_told_from_one_that_reads() {
        const IS_CHILD: &str = "VMFILE_TEST_IS_CHILD";
        if std::env::var_os(IS_CHILD).is_some() {
            // The parent ends this process before.
            thread::sleep(Duration::from_secs(20));
            return;
        }
        // The main thread of the test harness waits for this test in another thread.
        let mut harness = Command::new(std::env::current_exe().unwrap());
        harness.args(["--test-threads=2", "a_thread_that_waits"]).env(IS_CHILD, "1");
        assert!(waits(harness.stdout(Stdio::null())));
        assert!(!waits(&mut Command::new("cat")));
    }
}
