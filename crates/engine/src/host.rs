//! What the host has.

use std::fs;

/// Returns how many bytes of memory the host has left, by its own estimate (`MemAvailable`); 0 if it
/// does not say.
#[must_use]
pub fn available_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    available_in(&text)
}

fn available_in(text: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    number.unwrap_or(0) << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_in_kibibytes() {
        let text = "MemTotal:  24684000 kB\nMemFree: 3 kB\nMemAvailable:   20 kB\n";
        assert_eq!(available_in(text), 20 << 10);
        assert_eq!(available_in("MemTotal: 1 kB\n"), 0);
        assert!(available_memory() > 0);
    }
}
