//! The run state in a device state: whether the restored VM runs, and whether its guest sleeps.

use core::ops::Range;

use super::device_state::DeviceState;

/// QEMU's name of the run state of a guest that sleeps (ACPI S3).
const ASLEEP: &str = "suspended";

/// "The second byte is there", and "a guest that was stopped slept before".
const SLEPT: [u8; 2] = [1, 1];

impl DeviceState {
    /// Returns the run state in the section `globalstate`, which decides whether the restored VM
    /// runs: `running`, `paused`, ... `bytes` are as for [`DeviceState::payload`].
    ///
    /// `None` if there is no such section; every QEMU since 2.4 writes one.
    #[must_use]
    pub fn run_state<'a>(&self, bytes: &'a [u8]) -> Option<&'a str> {
        let name = bytes.get(self.run_state_range(bytes)?)?;
        let len = name.iter().position(|&byte| byte == 0)?;
        core::str::from_utf8(name.get(..len)?).ok()
    }

    /// Tells whether the guest sleeps (ACPI S3): the section `globalstate` names that run state, or says
    /// that a guest that was stopped slept before, which QEMU 9.0 and later write. `bytes` are as for
    /// [`DeviceState::payload`].
    #[must_use]
    pub fn sleeps(&self, bytes: &[u8]) -> bool {
        let slept = || bytes.get(self.sleep_range(bytes)?).map(|flags| flags == SLEPT);
        self.run_state(bytes) == Some(ASLEEP) || slept().unwrap_or(false)
    }

    /// Writes `state` where [`DeviceState::run_state`] reads it; returns whether there is room. A guest
    /// that [sleeps](DeviceState::sleeps) still does.
    #[must_use]
    pub fn set_run_state(&self, bytes: &mut [u8], state: &str) -> bool {
        let Some(range) = self.run_state_range(bytes) else { return false };
        if self.run_state(bytes) == Some(ASLEEP) {
            let flags = self.sleep_range(bytes).and_then(|range| bytes.get_mut(range));
            let Some(flags) = flags else { return state == ASLEEP };
            flags.copy_from_slice(&SLEPT);
        }
        let Some(field) = bytes.get_mut(range).filter(|field| state.len() < field.len()) else {
            return false;
        };
        field.fill(0);
        for (target, source) in field.iter_mut().zip(state.bytes()) {
            *target = source;
        }
        true
    }

    /// Returns where the name of the run state lies in `bytes`.
    fn run_state_range(&self, bytes: &[u8]) -> Option<Range<usize>> {
        self.global_state_range(bytes, 4..36)
    }

    /// Returns where two bytes lie that say whether a guest that was stopped slept: the first says that
    /// the second is there.
    fn sleep_range(&self, bytes: &[u8]) -> Option<Range<usize>> {
        self.global_state_range(bytes, 36..38)
    }

    /// Returns where a part of the section `globalstate` lies in `bytes`. Its payload is a be32 size, the
    /// name of the run state in 32 bytes, NUL-padded, the two bytes about sleep, and zeros.
    fn global_state_range(&self, bytes: &[u8], part: Range<u64>) -> Option<Range<usize>> {
        let section = self.sections.iter().find(|section| section.name == "globalstate")?;
        let (payload, len) = section.payload();
        if len < part.end {
            return None;
        }
        let payload = section.offset.checked_add(payload)?;
        let first = self.place(payload.checked_add(part.start)?, bytes)?;
        Some(first..first.checked_add(usize::try_from(part.end.checked_sub(part.start)?).ok()?)?)
    }
}

#[cfg(test)]
mod tests {
    use std::string::String;
    use std::vec::Vec;

    use super::*;
    use crate::stream::{encoder, section};

    /// Returns a device state whose only section is `globalstate`.
    fn of(payload: &[u8]) -> (DeviceState, Vec<u8>) {
        let mut bytes = std::vec![section::FULL, 0, 0, 0, 9];
        encoder::counted_text(&mut bytes, "globalstate");
        bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend_from_slice(payload);
        bytes.extend_from_slice(&[section::FOOTER, 0, 0, 0, 9, section::EOF]);
        (DeviceState::locate(&bytes, 0x40, 1).unwrap(), bytes)
    }

    /// Returns the payload that QEMU writes; `flags` are the bytes about sleep.
    fn payload(name: &str, flags: [u8; 2]) -> [u8; 104] {
        let mut payload = [0; 104];
        payload[4..4 + name.len()].copy_from_slice(name.as_bytes());
        payload[36..38].copy_from_slice(&flags);
        payload
    }

    #[test]
    fn the_run_state_is_written_where_qemu_reads_it() {
        let (state, mut bytes) = of(&[0x55; 106]);
        assert!(state.set_run_state(&mut bytes, "paused"));
        assert_eq!(state.run_state(&bytes), Some("paused"));
        assert!(!state.set_run_state(&mut bytes, &"p".repeat(32)));
        let (first, _) = state.sections[0].payload();
        let first = usize::try_from(first).unwrap();
        assert_eq!(&bytes[first + 4..first + 11], b"paused\0");
        assert_eq!(bytes[first + 36], 0x55);
    }

    #[test]
    fn a_run_state_takes_36_bytes() {
        let of = |payload: &[u8]| {
            let (state, mut bytes) = of(payload);
            let written = state.set_run_state(&mut bytes, "paused");
            (written, state.run_state(&bytes).map(String::from))
        };
        assert_eq!(of(&[0x55; 36]), (true, Some("paused".into())));
        // What follows the payload is the footer, and no part of a name.
        assert_eq!(of(&[0x55; 35]), (false, None));
    }

    /// QEMU names the state of a guest that sleeps, and if it was stopped before, sets two bytes.
    #[test]
    fn a_guest_that_sleeps_does_so_whatever_run_state_is_written() {
        for (name, flags, sleeps) in [
            ("running", [0, 0], false),
            ("running", [1, 0], false),
            ("running", [0, 1], false),
            ("running", [1, 1], true),
            ("paused", [1, 1], true),
            ("suspended", [0, 0], true),
            ("suspended", [1, 0], true),
        ] {
            let (state, mut bytes) = of(&payload(name, flags));
            assert_eq!(state.sleeps(&bytes), sleeps, "{name} {flags:?}");
            for written in ["paused", "running", "suspended"] {
                assert!(state.set_run_state(&mut bytes, written));
                assert_eq!(state.run_state(&bytes), Some(written));
                assert_eq!(state.sleeps(&bytes), sleeps || written == "suspended");
            }
        }
    }

    #[test]
    fn a_section_without_room_for_sleep_keeps_a_guest_that_sleeps() {
        let (state, mut bytes) = of(&payload("suspended", [0, 0])[..36]);
        assert!(state.sleeps(&bytes));
        assert!(!state.set_run_state(&mut bytes, "paused"));
        assert_eq!(state.run_state(&bytes), Some("suspended"));
    }
}
