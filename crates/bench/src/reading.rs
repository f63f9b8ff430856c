//! Verbs that read a saved VM: `check` reads every byte, `info` none of the pages.

use std::ffi::OsStr;

use crate::bench::Bench;
use crate::error::BenchError;
use crate::page_cache;
use crate::report::{Family, Run};
use crate::rounds::Measured;
use crate::saving::{gib, used};

/// A verb that reads a file of vmfile's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReadWay {
    verb: &'static str,
    is_cold: bool,
}

impl ReadWay {
    pub(crate) const CHECK_WARM: ReadWay = ReadWay { verb: "check", is_cold: false };
    pub(crate) const CHECK_COLD: ReadWay = ReadWay { verb: "check", is_cold: true };
    pub(crate) const INFO_COLD: ReadWay = ReadWay { verb: "info", is_cold: true };
    pub(crate) const ALL: [ReadWay; 3] =
        [ReadWay::CHECK_WARM, ReadWay::CHECK_COLD, ReadWay::INFO_COLD];

    /// Reads the file once. `data_bytes` is the length of its pages.
    pub(crate) fn read(
        self,
        bench: &Bench<'_>,
        file: &std::path::Path,
        data_bytes: u64,
    ) -> Result<Run, BenchError> {
        page_cache::prepare(file, self.is_cold, bench.stop)?;
        let (_, usage) = bench.vmfile(&[OsStr::new(self.verb), file.as_os_str()])?;
        Ok(Run { gib_per_second: gib(data_bytes) / usage.seconds, ..used(usage) })
    }
}

impl Measured for ReadWay {
    fn name(&self) -> String {
        format!("vmfile {}", self.short())
    }

    fn short(&self) -> String {
        format!("{}, {}", self.verb, if self.is_cold { "cold" } else { "warm" })
    }

    fn family(&self) -> Family {
        Family::Vmfile
    }
}
