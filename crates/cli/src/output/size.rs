//! Sizes and times as people read them.

/// Returns `bytes` in the largest binary unit that leaves at least 1.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = None;
    let mut scaled = bytes_to_f64(bytes);
    for name in UNITS {
        if scaled < 1024.0 {
            break;
        }
        scaled /= 1024.0;
        unit = Some(name);
    }
    match unit {
        None => format!("{bytes} B"),
        Some(unit) if scaled < 10.0 => format!("{scaled:.2} {unit}"),
        Some(unit) if scaled < 100.0 => format!("{scaled:.1} {unit}"),
        Some(unit) => format!("{scaled:.0} {unit}"),
    }
}

/// Returns `seconds` with a unit that suits them.
pub(crate) fn seconds(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", seconds * 1000.0) } else { format!("{seconds:.2} s") }
}

/// Returns a rate in bytes per second.
pub(crate) fn rate(bytes_done: u64, elapsed_seconds: f64) -> String {
    if elapsed_seconds <= 0.0 {
        return "-".to_owned();
    }
    let gib = bytes_to_f64(bytes_done) / elapsed_seconds / f64::from(1 << 30);
    format!("{gib:.2} GiB/s")
}

#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn bytes_to_f64(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_and_binary_units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(4096), "4.00 KiB");
        assert_eq!(bytes(64 << 20), "64.0 MiB");
        assert_eq!(bytes(3 << 39), "1.50 TiB");
        assert_eq!(bytes(u64::MAX), "16384 PiB");
    }

    #[test]
    fn times_below_a_second_are_in_milliseconds() {
        assert_eq!(seconds(0.0123), "12.3 ms");
        assert_eq!(seconds(1.5), "1.50 s");
    }
}
