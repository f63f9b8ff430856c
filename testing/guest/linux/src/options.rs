//! The options of this guest, from the kernel's command line.

use std::error::Error;
use std::fs;

/// The `vmfile.` parameters of the kernel's command line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) seed: u64,
    pub(crate) fill_mib: usize,
    pub(crate) data_share: u64,
    pub(crate) busy: bool,
    pub(crate) disk: bool,
    pub(crate) moment: bool,
    pub(crate) sleep: Option<u64>,
}

impl Options {
    pub(crate) fn of_this_kernel() -> Result<Options, Box<dyn Error>> {
        Options::parse(&fs::read_to_string("/proc/cmdline")?)
    }

    /// Parses a command line. A parameter that begins with `vmfile.` and is not known is an error:
    /// otherwise a misspelled parameter would silently test something else.
    fn parse(command_line: &str) -> Result<Options, Box<dyn Error>> {
        let mut options = Options {
            seed: 1,
            fill_mib: 16,
            data_share: 128,
            busy: false,
            disk: false,
            moment: false,
            sleep: None,
        };
        for word in command_line.split_ascii_whitespace() {
            let Some(parameter) = word.strip_prefix("vmfile.") else { continue };
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, "1"));
            match name {
                "seed" => options.seed = value.parse()?,
                "fill" => options.fill_mib = value.parse()?,
                "data" => options.data_share = value.parse()?,
                "busy" => options.busy = value == "1",
                "disk" => options.disk = value == "1",
                "moment" => options.moment = value == "1",
                "sleep" => options.sleep = Some(value.parse()?),
                _ => return Err(format!("unknown parameter {word}").into()),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_others_are_left_alone() {
        let options = Options::parse("console=ttyS0 vmfile.fill=700 quiet vmfile.busy=1").unwrap();
        let (disk, moment, sleep) = (false, false, None);
        let expected =
            Options { seed: 1, fill_mib: 700, data_share: 128, busy: true, disk, moment, sleep };
        assert_eq!(options, expected);
    }

    #[test]
    fn a_misspelled_parameter_is_refused() {
        assert!(Options::parse("vmfile.fil=700").is_err());
    }
}
