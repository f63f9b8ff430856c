//! `DeviceState::locate`, `unused_id`, `run_state` and `set_run_state`.
//!
//! The first byte of the input is the id of the section "ram".
//!
//! Contract: no panic; `locate` ends, however many false footers there are; the sections that it
//! finds follow one another without a gap up to EOF; a run state that was set is read back, and
//! changes at most 32 bytes, all inside one section.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmfile_format::limits::DEVICE_SECTIONS_MAX;
use vmfile_format::stream::device_state::DeviceState;

/// Where the bytes lie in the file; any place will do.
const OFFSET: u64 = 0x1000;

fuzz_target!(|input: &[u8]| {
    let Some((&ram_id, bytes)) = input.split_first() else { return };
    let state = match DeviceState::locate(bytes, OFFSET, ram_id.into()) {
        Ok(state) => state,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let at = |offset: u64| (offset - OFFSET) as usize;
    let mut end = state.start;
    for section in &state.sections {
        assert_eq!(section.offset, end, "sections follow one another");
        end = section.offset + section.len;
        assert_eq!(bytes[at(section.offset)], 0x04);
        assert_eq!(bytes[at(end) - 5], 0x7e);
        assert_eq!(bytes[at(end) - 4..at(end)], section.id.to_be_bytes());
    }
    assert!(state.sections.len() <= DEVICE_SECTIONS_MAX);
    assert_eq!(bytes[at(end)], 0x00);
    assert_eq!(state.end, end + 1);
    assert!(state.stream_end <= OFFSET + bytes.len() as u64);
    if let Some((offset, len)) = state.vm_description {
        assert_eq!(offset + len, state.stream_end);
    }
    let unused = state.unused_id();
    assert!(state.sections.iter().all(|section| section.id != unused));

    // What the other sections with parts hold comes before the devices, and not into one another.
    let mut end_of_parts = OFFSET;
    for &(offset, len) in &state.parts {
        assert!(offset >= end_of_parts && len > 0);
        end_of_parts = offset + len;
    }
    assert!(end_of_parts <= state.start);

    let mut changed = bytes[at(state.start)..at(state.end)].to_vec();
    let before = changed.clone();
    let _ = state.run_state(&changed);
    if state.set_run_state(&mut changed, "paused") {
        assert_eq!(state.run_state(&changed), Some("paused"));
        let section = state.sections.iter().find(|section| section.name == "globalstate");
        let section = section.expect("it was found");
        let first = changed.iter().zip(&before).position(|(a, b)| a != b);
        let last = changed.iter().zip(&before).rposition(|(a, b)| a != b);
        if let (Some(first), Some(last)) = (first, last) {
            let start = (section.offset - state.start) as usize;
            assert!(first >= start && last < start + section.len as usize && last - first < 32);
        }
    } else {
        assert_eq!(changed, before);
    }
    // Too few bytes are refused, not indexed.
    assert_eq!(state.run_state(&[]), None);
    assert!(!state.set_run_state(&mut [], "paused"));
    assert!(!state.set_run_state(&mut changed, "a name that does not fit into 32 bytes"));
});
