//! What a process has from those who started it: a QEMU that vmfile starts has what vmfile's process has.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;

/// Variables of the environment that change what QEMU, or a library of it, does.
const VARIABLES: [&str; 16] = [
    "DISPLAY",
    "GLIBC_TUNABLES",
    "LANG",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "PIPEWIRE_REMOTE",
    "PULSE_SERVER",
    "QEMU_AUDIO_DRV",
    "QEMU_MODULE_DIR",
    "SDL_VIDEODRIVER",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TZ",
    "WAYLAND_DISPLAY",
    "XDG_RUNTIME_DIR",
];

/// The limits under which a QEMU fails or becomes slow, as `/proc/PID/limits` names them.
const LIMITS: [&str; 5] =
    ["Max address space", "Max file size", "Max locked memory", "Max open files", "Max processes"];

/// What a process has from those who started it. What `/proc` does not tell is not there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Surroundings {
    /// The control group of version 2, such as `/machine.slice/vm.scope`.
    pub control_group: Option<String>,
    /// The network namespace, such as `net:[4026531840]`.
    pub network_namespace: Option<String>,
    /// Soft limits by the kernel's names of them, such as `Max open files`; `u64::MAX` is "unlimited".
    pub limits: BTreeMap<String, u64>,
    /// The values of variables of the environment that change what QEMU does.
    pub environment: BTreeMap<String, Vec<u8>>,
}

impl Surroundings {
    /// Reads those of the process `pid`.
    #[must_use]
    pub fn of(pid: u32) -> Surroundings {
        Surroundings::read(&pid.to_string())
    }

    /// Reads those of this process.
    #[must_use]
    pub fn own() -> Surroundings {
        Surroundings::read("self")
    }

    /// Tells whether a variable of the environment is one of those that change what QEMU does.
    #[must_use]
    pub fn has_variable(name: &str) -> bool {
        VARIABLES.contains(&name)
    }

    fn read(process: &str) -> Surroundings {
        let text = |name: &str| fs::read_to_string(format!("/proc/{process}/{name}"));
        let namespace = fs::read_link(format!("/proc/{process}/ns/net")).ok();
        let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
        Surroundings {
            control_group: text("cgroup").ok().and_then(|text| control_group(&text)),
            network_namespace: namespace.and_then(|path| path.to_str().map(str::to_owned)),
            limits: text("limits").map(|text| limits(&text)).unwrap_or_default(),
            environment: variables(&environment),
        }
    }

    /// Returns what of these is not the same in `other`.
    #[must_use]
    pub fn besides(self, other: &Surroundings) -> Surroundings {
        let Surroundings { control_group, network_namespace, limits, environment } = self;
        Surroundings {
            control_group: control_group
                .filter(|group| other.control_group.as_ref() != Some(group)),
            network_namespace: network_namespace
                .filter(|namespace| other.network_namespace.as_ref() != Some(namespace)),
            limits: besides(limits, &other.limits),
            environment: besides(environment, &other.environment),
        }
    }
}

fn besides<T: PartialEq>(
    all: BTreeMap<String, T>,
    other: &BTreeMap<String, T>,
) -> BTreeMap<String, T> {
    all.into_iter().filter(|(name, value)| other.get(name) != Some(value)).collect()
}

/// Reads `/proc/PID/cgroup`: the line of version 2 has the number 0 and no controllers.
fn control_group(text: &str) -> Option<String> {
    text.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned)
}

/// Reads `/proc/PID/limits`: a name, the soft limit, the hard one and the unit, in columns.
fn limits(text: &str) -> BTreeMap<String, u64> {
    let of = |name: &&str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let soft = line.split_whitespace().next()?;
        let number = if soft == "unlimited" { u64::MAX } else { soft.parse().ok()? };
        Some(((*name).to_owned(), number))
    };
    LIMITS.iter().filter_map(of).collect()
}

/// Reads those of [`VARIABLES`] that are set in an environment, as `/proc/PID/environ` has it.
fn variables(environment: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let known = |variable: &[u8]| {
        let end = variable.iter().position(|&byte| byte == b'=')?;
        let (name, value) = variable.split_at(end);
        let name = VARIABLES.iter().find(|known| OsStr::new(known).as_bytes() == name)?;
        Some(((*name).to_owned(), value.get(1..)?.to_vec()))
    };
    environment.split(|&byte| byte == 0).filter_map(known).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_tells_is_read() {
        let text = "12:cpu:/old\n0::/machine.slice/vm.scope\n";
        assert_eq!(control_group(text).as_deref(), Some("/machine.slice/vm.scope"));
        assert_eq!(control_group("1:name=systemd:/x\n"), None);
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max file size             unlimited            unlimited            bytes     \n\
                    Max locked memory         8388608              8388608              bytes     \n\
                    Max open files            1024                 524288               files     \n";
        let found = limits(text);
        assert_eq!(found["Max locked memory"], 8 << 20);
        assert_eq!((found["Max file size"], found["Max open files"]), (u64::MAX, 1024));
        assert_eq!(found.len(), 3);
        let found = variables(b"TMPDIR=/big\0SECRET=x\0LANG=\0TZ\0XTMPDIR=/no\0");
        let pairs = [("LANG", ""), ("TMPDIR", "/big")];
        assert_eq!(found, pairs.map(|(name, value)| (name.into(), value.into())).into());
    }

    #[test]
    fn only_what_differs_is_left() {
        let own = Surroundings::own();
        assert!(own.network_namespace.is_some() && own.limits.len() == LIMITS.len(), "{own:?}");
        assert_eq!(own.clone().besides(&own), Surroundings::default());
        let mut other = own.clone();
        other.limits.insert("Max open files".into(), 7);
        other.environment.insert("TMPDIR".into(), b"/elsewhere".to_vec());
        other.network_namespace = Some("net:[1]".into());
        let found = other.besides(&own);
        assert_eq!(found.limits, [("Max open files".to_owned(), 7)].into());
        assert_eq!(found.environment.len(), 1);
        assert_eq!(found.network_namespace.as_deref(), Some("net:[1]"));
        assert_eq!(found.control_group, None);
    }
}
