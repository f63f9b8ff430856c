//! Tests whether a page is zero.

/// Bytes that are folded together before they are tested: one turn of a vector loop.
const CHUNK: usize = 128;

/// Says whether every byte of `page` is zero; true for no bytes.
///
/// Safe code that the compiler turns into vector instructions; memory is the limit, not this.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    let mut chunks = page.chunks_exact(CHUNK);
    chunks.all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && chunks.remainder().iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_are_zero() {
        assert!(is_zero(&[]));
    }

    #[test]
    fn one_byte_at_any_place_is_found() {
        for len in [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 4096, 4099] {
            let mut page = vec![0; len];
            assert!(is_zero(&page));
            for at in 0..len {
                page[at] = 0x80;
                assert!(!is_zero(&page), "byte {at} of {len}");
                page[at] = 0;
            }
        }
    }
}
