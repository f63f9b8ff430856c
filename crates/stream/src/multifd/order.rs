//! Where the pages of a multifd packet stand in the buffer that they are read into and written
//! from.

use vmfile_format::PageIndex;
use vmfile_format::error::FormatErrorKind;
use vmfile_format::stream::multifd::PacketPages;

/// The pages with data of a packet, in ascending order.
#[derive(Debug)]
pub(crate) struct Order {
    /// Each page with its place in the buffer, in pages.
    pub places: Vec<(usize, PageIndex)>,
    /// For each page in the order of the packet, its index in `places`.
    wire: Vec<usize>,
    /// Whether the data in the packet are in the order of the buffer, without gaps.
    pub is_wire: bool,
}

impl Order {
    /// Orders the pages with data of a packet for a buffer of `room` pages, which has room for
    /// them.
    ///
    /// Zero pages of the packet that lie between them get places too, as far as there is room: then
    /// one write takes all of them. No other channel sends those pages in this round.
    pub(crate) fn of(packet: &PacketPages, room: usize) -> Result<Order, FormatErrorKind> {
        let pages = &packet.normal;
        let mut sorted: Vec<usize> = (0..pages.len()).collect();
        sorted.sort_by_key(|&index| pages[index]);
        let mut zero = packet.zero.clone();
        zero.sort_unstable();
        zero.dedup();
        let mut places: Vec<(usize, PageIndex)> = Vec::with_capacity(pages.len());
        let mut wire = vec![0; pages.len()];
        for (number, &index) in sorted.iter().enumerate() {
            let (page, left) = (pages[index], sorted.len() - number);
            let place = match places.last() {
                Some(&(_, last)) if last == page => {
                    let (what, name) = ("multifd packet with twice the page", page.0.to_string());
                    return Err(FormatErrorKind::Unsupported { what, name });
                }
                Some(&(before, last)) => {
                    let gap = zeros_between(&zero, last, page);
                    let gap = gap.filter(|gap| before + 1 + gap + left <= room);
                    before + 1 + gap.unwrap_or(0)
                }
                None => 0,
            };
            wire[index] = number;
            places.push((place, page));
        }
        let is_wire = wire.is_sorted() && places.last().is_none_or(|last| last.0 < pages.len());
        Ok(Order { places, wire, is_wire })
    }

    /// Returns how many pages of the buffer are used.
    pub(crate) fn len(&self) -> usize {
        self.places.last().map_or(0, |last| last.0 + 1)
    }

    /// Cuts `room`, of [`Order::len`] pages, into slots for the pages in the order of the packet.
    pub(crate) fn slots<'a>(
        &self,
        room: &'a mut [u8],
    ) -> impl Iterator<Item = &'a mut [u8]> + use<'_, 'a> {
        let page_len = room.len() / self.len();
        let mut slots: Vec<Option<&mut [u8]>> = room.chunks_exact_mut(page_len).map(Some).collect();
        let place = |&number: &usize| self.places[number].0;
        self.wire.iter().map(move |number| slots[place(number)].take().expect("a page of its own"))
    }
}

/// Returns how many pages lie between `before` and `after`, if `zero`, a sorted list without
/// duplicates, has all of them.
fn zeros_between(zero: &[PageIndex], before: PageIndex, after: PageIndex) -> Option<usize> {
    let start = zero.partition_point(|page| *page <= before);
    let end = zero.partition_point(|page| *page < after);
    let gap = usize::try_from(after.0 - before.0 - 1).ok()?;
    (end - start == gap).then_some(gap)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(normal: &[u64], zero: &[u64], room: usize) -> Result<Order, FormatErrorKind> {
        let list = |pages: &[u64]| pages.iter().copied().map(PageIndex).collect();
        Order::of(&PacketPages { block: 0, normal: list(normal), zero: list(zero) }, room)
    }

    fn places(order: &Order) -> Vec<(usize, u64)> {
        order.places.iter().map(|&(place, page)| (place, page.0)).collect()
    }

    #[test]
    fn pages_that_come_in_any_order_find_their_places() {
        let found = order(&[7, 2, 5], &[], 9).expect("three pages");
        assert_eq!(places(&found), [(0, 2), (1, 5), (2, 7)]);
        assert!(!found.is_wire);
        let mut room = [0; 6];
        for (slot, byte) in found.slots(&mut room).zip(*b"abc") {
            slot.fill(byte);
        }
        assert_eq!(&room, b"bbccaa");
        assert!(order(&[2, 5, 7], &[], 9).expect("three pages").is_wire);
    }

    #[test]
    fn zero_pages_of_the_packet_have_their_places_between_where_there_is_room() {
        let found = order(&[9, 2, 5, 7], &[4, 3, 6], 9).expect("four pages");
        assert_eq!(places(&found), [(0, 2), (3, 5), (5, 7), (6, 9)]);
        assert_eq!((found.len(), found.is_wire), (7, false));
        let mut room = [0; 7];
        for (slot, byte) in found.slots(&mut room).zip(*b"abcd") {
            slot.fill(byte);
        }
        assert_eq!(&room, b"b\0\0c\0da");
        // The second gap has no room, and the first one has.
        let found = order(&[2, 5, 7, 9], &[3, 4, 6], 6).expect("four pages");
        assert_eq!(places(&found), [(0, 2), (3, 5), (4, 7), (5, 9)]);
        assert!(!found.is_wire);
        // A zero page that is named twice counts once.
        let found = order(&[2, 5], &[4, 4], 9).expect("two pages");
        assert_eq!(places(&found), [(0, 2), (1, 5)]);
    }

    #[test]
    fn a_packet_with_a_page_twice_is_refused() {
        let error = order(&[7, 2, 7], &[], 9).expect_err("7 comes twice");
        let text = "multifd packet with twice the page \"7\" is not supported";
        assert_eq!(error.to_string(), text);
    }
}
