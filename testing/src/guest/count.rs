//! The lines in which guests report their passes.

/// One pass that a guest reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Count {
    /// The number of the pass, from 1.
    pub number: u32,
    /// The sum over the guest's memory; `None` if the guest reports that its memory or its disk is
    /// wrong.
    pub sum: Option<u64>,
    /// The whole line.
    pub line: String,
}

impl Count {
    /// Parses `pass N sum X` and `count N sum X ok ...` and `count N CORRUPT ...`.
    ///
    /// Returns `None` for any other line, and for the rest of a line that began in another QEMU: a
    /// VM may be saved in the middle of a line.
    pub(crate) fn parse(line: &str) -> Option<Count> {
        let rest = line.strip_prefix("pass ").or_else(|| line.strip_prefix("count "))?;
        let (number, rest) = rest.split_once(' ')?;
        let number = number.parse().ok()?;
        let sum = match rest.strip_prefix("sum ") {
            Some(rest) => {
                let sum = rest.split(' ').next()?;
                Some(u64::from_str_radix(sum, 16).ok()?)
            }
            None if rest.starts_with("CORRUPT") => None,
            None => return None,
        };
        let sum = if line.contains("CORRUPT") { None } else { sum };
        Some(Count { number, sum, line: line.to_owned() })
    }

    /// Returns how many CPUs the Linux guest has online.
    #[must_use]
    pub fn online_cpus(&self) -> Option<u32> {
        let (_, rest) = self.line.split_once(" cpus ")?;
        rest.split(' ').next()?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_guests_lines_are_understood() {
        assert_eq!(Count::parse("pass 12 sum 0000beef").unwrap().sum, Some(0xbeef));
        let count = Count::parse("count 3 sum 8c1f0b7e22d0a94d ok cpus 2 memory 9 MiB").unwrap();
        assert_eq!((count.number, count.online_cpus()), (3, Some(2)));
    }

    #[test]
    fn corrupt_memory_and_a_corrupt_disk_have_no_sum() {
        assert_eq!(Count::parse("count 4 CORRUPT page 17 of 16384 cpus 2").unwrap().sum, None);
        let line = "count 4 sum 12 ok cpus 2 memory 9 MiB disk CORRUPT: block of pass 3";
        assert_eq!(Count::parse(line).unwrap().sum, None);
    }

    #[test]
    fn the_rest_of_a_broken_line_is_no_count() {
        for line in ["2 sum 0000beef", "ass 12 sum 0000beef", "pass 12", "cpus 2", ""] {
            assert_eq!(Count::parse(line), None, "{line}");
        }
    }
}
