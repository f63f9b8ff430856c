//! XXH3-128, of a page and of something longer.
//!
//! A checksum against damage, not against an attacker. Page hashes have a key, because a save with a
//! base takes pages with one hash for the same page: a guest that knew the key could make two
//! pages that have it.

use std::{fmt, io};

use rustix::rand::GetRandomFlags;
use twox_hash::XxHash3_128;

/// The key of page hashes: XXH3's seed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey(u64);

impl HashKey {
    /// The key of files of older versions, whose page hashes have the seed 0.
    pub const NONE: HashKey = HashKey(0);

    /// Returns the key with this seed.
    #[must_use]
    pub fn new(seed: u64) -> HashKey {
        HashKey(seed)
    }

    /// Returns a random key, never [`HashKey::NONE`].
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn random() -> io::Result<HashKey> {
        let mut seed = [0; 8];
        while seed == [0; 8] {
            rustix::rand::getrandom(&mut seed, GetRandomFlags::empty())?;
        }
        Ok(HashKey(u64::from_ne_bytes(seed)))
    }

    /// Returns the seed.
    #[must_use]
    pub fn seed(self) -> u64 {
        self.0
    }
}

/// Shows no seed: it stays out of logs.
impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HashKey").finish_non_exhaustive()
    }
}

/// Returns the XXH3-128 hash of `page` with this key.
#[must_use]
pub fn page_hash(page: &[u8], key: HashKey) -> u128 {
    XxHash3_128::oneshot_with_seed(key.0, page)
}

/// An XXH3-128 hash of bytes that arrive in pieces.
#[derive(Clone)]
pub struct RunningHash {
    hasher: XxHash3_128,
}

impl RunningHash {
    /// Starts a hash, with the seed 0.
    #[must_use]
    pub fn new() -> RunningHash {
        RunningHash { hasher: XxHash3_128::new() }
    }

    /// Adds `bytes` at the end.
    pub fn write(&mut self, bytes: &[u8]) {
        self.hasher.write(bytes);
    }

    /// Returns the hash of all bytes so far, equal to [`page_hash`] of them in one piece with [`HashKey::NONE`].
    #[must_use]
    pub fn finish(&self) -> u128 {
        self.hasher.finish_128()
    }
}

impl Default for RunningHash {
    fn default() -> RunningHash {
        RunningHash::new()
    }
}

impl fmt::Debug for RunningHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningHash").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_nothing_is_the_published_one() {
        // XXH3-128 with seed 0 of the empty string, from the xxHash specification's test vectors.
        assert_eq!(page_hash(&[], HashKey::NONE), 0x99aa_06d3_0147_98d8_6001_c324_468d_497f);
    }

    #[test]
    fn pieces_hash_as_the_whole() {
        let bytes: Vec<u8> = (0..10_000_u32).map(|i| i.to_le_bytes()[0] ^ 0x5a).collect();
        let mut hasher = RunningHash::new();
        for piece in bytes.chunks(777) {
            hasher.write(piece);
        }
        assert_eq!(hasher.finish(), page_hash(&bytes, HashKey::NONE));
    }
}
