//! Who uses a monitor.

use std::fmt;
use std::fs;
use std::path::Path;

/// Who uses a monitor, as far as the kernel tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// Connections that QEMU has taken.
    pub serving: usize,
    /// Connections that wait until QEMU takes them.
    pub waiting: usize,
}

impl Holders {
    /// Looks for the connections to the socket at `path`; none where they cannot be told.
    pub(super) fn of(path: &Path) -> Holders {
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        fs::read_to_string("/proc/net/unix").map(|table| count(&table, &path)).unwrap_or_default()
    }
}

impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.serving, self.waiting) {
            (0, 0) => Ok(()),
            (0, waiting) => write!(f, ": QEMU takes no client, and {waiting} wait"),
            (_, 0) => f.write_str(": another client holds this monitor"),
            (_, waiting) => write!(f, ": another client holds this monitor, and {waiting} wait"),
        }
    }
}

/// Reads the kernel's table of Unix sockets: state 03 is connected, 02 a connection that was not
/// accepted, and both have the name of the socket that listens (Linux 6).
fn count(table: &str, path: &Path) -> Holders {
    let mut holders = Holders::default();
    for line in table.lines().skip(1) {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let [_, _, _, _, _, state, _, bound @ ..] = columns.as_slice() else { continue };
        if Path::new(&bound.join(" ")) != path {
            continue;
        }
        match *state {
            "03" => holders.serving += 1,
            "02" => holders.waiting += 1,
            _ => {}
        }
    }
    holders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_that_are_served_are_told_from_those_that_wait() {
        let table = "\
Num       RefCount Protocol Flags    Type St Inode Path
ffff8c1d: 00000002 00000000 00010000 0001 01 12345 /run/vm.sock
ffff8c1e: 00000003 00000000 00000000 0001 03   777 /run/vm.sock
ffff8c1f: 00000002 00000000 00000000 0001 02     0 /run/vm.sock
ffff8c20: 00000002 00000000 00000000 0001 02     0 /run/vm.sock
ffff8c21: 00000002 00000000 00000000 0001 02     0 /run/other.sock
";
        let holders = count(table, Path::new("/run/vm.sock"));
        assert_eq!(holders, Holders { serving: 1, waiting: 2 });
        assert_eq!(holders.to_string(), ": another client holds this monitor, and 2 wait");
        assert_eq!(count(table, Path::new("/run/none.sock")), Holders::default());
    }
}
