//! A part of a file that QEMU's driver raw makes an image of.

use serde_json::Value;

use crate::size::parse_size;

/// Deepest chain of nodes followed: a longer one is a loop or a mistake.
const DEPTH_MAX: usize = 256;

/// Keys of a raw node that say where the image lies within its file.
pub(crate) const RAW_WINDOW: [&str; 2] = ["offset", "size"];

/// Where an image lies within its file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawWindow {
    /// Where it begins.
    pub offset: u64,
    /// How long it is; `None` if it goes on to the end of the file.
    pub size: Option<u64>,
}

impl RawWindow {
    /// Looks for a part of a file in a tree of nodes, from `node` down to the file. Returns `None`
    /// for a whole file, and the window of size 0 for numbers that only QEMU reads.
    pub(crate) fn of(node: &Value) -> Option<RawWindow> {
        let nodes = std::iter::successors(Some(node), |node| node.get("file"));
        let raw = nodes.take(DEPTH_MAX).find_map(RawWindow::of_node);
        raw.filter(|window| !window.is_whole())
    }

    /// Tells whether it is the whole file.
    pub(crate) fn is_whole(self) -> bool {
        self == RawWindow { offset: 0, size: None }
    }

    /// Reads what one node says; `None` for a node that says nothing of a window.
    pub(crate) fn of_node(node: &Value) -> Option<RawWindow> {
        let driver = node.get("driver").and_then(Value::as_str);
        if driver.is_some_and(|driver| driver != "raw") {
            return None;
        }
        let [offset, size] = RAW_WINDOW.map(|key| node.get(key));
        if offset.is_none() && size.is_none() {
            return None;
        }
        let number = |value: &Value| {
            value.as_u64().or_else(|| value.as_str().and_then(parse_size)).unwrap_or(0)
        };
        Some(RawWindow { offset: offset.map_or(0, number), size: size.map(number) })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_window_is_found_wherever_it_is_in_the_chain() {
        let raw = json!({"driver": "raw", "offset": 512, "size": "1M", "file": {"driver": "file"}});
        let expected = Some(RawWindow { offset: 512, size: Some(1 << 20) });
        assert_eq!(RawWindow::of(&raw), expected);
        assert_eq!(RawWindow::of(&json!({"driver": "qcow2", "file": raw})), expected);
    }

    #[test]
    fn a_whole_file_is_no_window() {
        for node in [
            json!({"driver": "raw", "offset": 0, "file": {"driver": "file", "filename": "a"}}),
            json!({"driver": "throttle", "file": {"driver": "raw", "file": {"driver": "file"}}}),
            json!({"driver": "null-co", "size": 4096}),
        ] {
            assert_eq!(RawWindow::of(&node), None, "{node}");
        }
    }
}
