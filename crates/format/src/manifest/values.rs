//! How many values a manifest has, counted before any is read: each takes more memory than its bytes in JSON.

use crate::error::FormatErrorKind;
use crate::limits::{MANIFEST_OBJECTS_MAX, MANIFEST_VALUES_MAX};

/// Refuses JSON with more values, or objects and lists, than a manifest may have.
pub(super) fn refuse_too_many(json: &[u8]) -> Result<(), FormatErrorKind> {
    let (values, objects) = count(json);
    let at_most = |field, found, max| match found > max {
        true => Err(FormatErrorKind::TooLarge { field, found, max }),
        false => Ok(()),
    };
    at_most("number of values in the manifest", values, MANIFEST_VALUES_MAX)?;
    at_most("number of objects in the manifest", objects, MANIFEST_OBJECTS_MAX)
}

/// Counts the commas, and the beginnings of objects and lists, outside of strings. The parser,
/// which comes after this, refuses what is not JSON.
fn count(json: &[u8]) -> (u64, u64) {
    let (mut values, mut objects): (u64, u64) = (1, 0);
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b',' => values = values.saturating_add(1),
            b'{' | b'[' => objects = objects.saturating_add(1),
            b'"' => {
                while let Some(byte) = bytes.next() {
                    match byte {
                        b'"' => break,
                        b'\\' => drop(bytes.next()),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    (values, objects)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_outside_of_strings() {
        assert_eq!(count(br#"{"a":[1,2,"x,[{\",,",{}],"b":null}"#), (5, 3));
        assert_eq!(count(b"\"open, and \\"), (1, 0));
    }

    /// 16 MiB of short words took 465 MB of memory.
    #[test]
    fn a_manifest_of_short_words_is_refused_before_it_is_read() {
        let words = |number: usize| std::format!("[{}1]", "1,".repeat(number));
        assert_eq!(refuse_too_many(words(100_000).as_bytes()), Ok(()));
        let refused = refuse_too_many(words(200_000).as_bytes());
        assert!(matches!(refused, Err(FormatErrorKind::TooLarge { found: 200_001, .. })));
        assert!(refuse_too_many("[".repeat(40_000).as_bytes()).is_err());
    }
}
