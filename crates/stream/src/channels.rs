//! How many multifd channels there are beside a stream.

use std::num::NonZeroU8;

/// How many multifd channels there are beside a stream: 1 to 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channels(NonZeroU8);

impl Channels {
    /// The largest count. More channels gain nothing: a few kept every disk busy that was measured,
    /// and each has buffers of its own.
    pub const MAX: u8 = 16;

    /// Returns `count` channels, or `None` if that is not from 1 to [`Channels::MAX`].
    #[must_use]
    pub fn new(count: u8) -> Option<Channels> {
        NonZeroU8::new(count).filter(|count| count.get() <= Channels::MAX).map(Channels)
    }

    /// Returns the count.
    #[must_use]
    pub fn count(self) -> NonZeroU8 {
        self.0
    }

    /// Returns the count, which is 0 for `None`.
    #[must_use]
    pub fn count_of(channels: Option<Channels>) -> u8 {
        channels.map_or(0, |channels| channels.0.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_one_to_sixteen() {
        let count = |count| Channels::new(count).map(|channels| channels.count().get());
        assert_eq!([0, 1, 16, 17].map(count), [None, Some(1), Some(16), None]);
        assert_eq!(Channels::count_of(None), 0);
    }
}
