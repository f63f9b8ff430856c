//! Pseudo-random numbers. A test prints its seed, so that a failure can be repeated.

use std::env;
use std::time::{SystemTime, UNIX_EPOCH};

/// A sequence of pseudo-random numbers.
#[derive(Clone, Copy, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// Begins the sequence of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random { state: seed }
    }

    /// Begins the sequence of the seed that the user gave in `VMFILE_SEED`, or of one that another run does
    /// not have. Prints it, so that a failure can be repeated.
    ///
    /// # Panics
    ///
    /// If the user gave no number.
    #[expect(clippy::print_stdout, reason = "the output of a test that failed is shown")]
    #[must_use]
    pub fn of_this_run() -> Random {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seed = given("VMFILE_SEED").unwrap_or(u64::from(now.subsec_nanos()) ^ now.as_secs());
        println!("VMFILE_SEED={seed}");
        Random::new(seed)
    }

    /// Returns the next number (`SplitMix64`).
    pub fn next_number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns one of `items`.
    ///
    /// # Panics
    ///
    /// If there are none.
    pub fn one_of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        let number = self.next_number() % items.len() as u64;
        &items[usize::try_from(number).expect("less than a length")]
    }

    /// Returns the next fraction: at least 0, less than 1.
    pub fn next_fraction(&mut self) -> f64 {
        let number = u32::try_from(self.next_number() >> 32).unwrap_or_default();
        f64::from(number) / 4_294_967_296.0
    }
}

/// Returns the number that the user gave in a variable of the environment, such as how many moments a test
/// tries.
///
/// # Panics
///
/// If it is no number.
#[must_use]
pub fn given(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_fractions_again() {
        let fractions = |seed| {
            let mut random = Random::new(seed);
            [0; 8].map(|_: i32| random.next_fraction())
        };
        assert_eq!(fractions(7), fractions(7));
        assert_ne!(fractions(7), fractions(8));
        assert!(fractions(9).iter().all(|fraction| (0.0..1.0).contains(fraction)));
    }
}
