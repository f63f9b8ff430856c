//! Lines on the first serial port, each in one write.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};

/// The guest's serial port.
#[derive(Debug)]
pub(crate) struct Console {
    port: File,
}

impl Console {
    pub(crate) fn open() -> io::Result<Console> {
        Ok(Console { port: OpenOptions::new().write(true).open("/dev/ttyS0")? })
    }

    /// Prints one line. One write, so that the kernel's own messages do not fall into it.
    pub(crate) fn line(&mut self, text: &str) -> io::Result<()> {
        self.port.write_all(format!("{text}\n").as_bytes())
    }
}
