//! Changes to a page: XBZRLE, runs of bytes that stay and runs of bytes that are replaced.
//!
//! ```text
//! length  of a run that stays; 0 only at first
//! length  of a run that is replaced, not 0; so many bytes
//! ...     ends after a run that is replaced; what follows it in the page stays
//! ```
//!
//! A length is ULEB128 in one or two bytes, so at most 0x3fff.

use alloc::string::ToString;

use crate::error::FormatErrorKind;

const RUN: &str = "XBZRLE run";

/// Applies `delta` to `page`, which holds the page as it came before.
///
/// A `delta` of no bytes changes nothing.
///
/// # Errors
///
/// Returns [`FormatErrorKind`] if a run has no length, goes past the end of the page, or is not
/// whole. The page is then neither the old nor the new one.
pub fn apply(delta: &[u8], page: &mut [u8]) -> Result<(), FormatErrorKind> {
    let limit = page.len() as u64;
    let outside = |rest: usize, run: usize| {
        let end = limit.saturating_sub(rest as u64).saturating_add(run as u64);
        FormatErrorKind::Outside { field: RUN, end, limit }
    };
    let mut delta = delta;
    let mut page = page;
    let mut first = true;
    while !delta.is_empty() {
        let stays = take_len(&mut delta)?;
        if stays == 0 && !first {
            return Err(empty());
        }
        first = false;
        let rest = page.len();
        (_, page) = page.split_at_mut_checked(stays).ok_or_else(|| outside(rest, stays))?;
        let replaced = take_len(&mut delta)?;
        if replaced == 0 {
            return Err(empty());
        }
        let rest = page.len();
        let (target, after) =
            page.split_at_mut_checked(replaced).ok_or_else(|| outside(rest, replaced))?;
        let Some((source, rest)) = delta.split_at_checked(replaced) else {
            return Err(ends(replaced as u64, delta.len() as u64));
        };
        target.copy_from_slice(source);
        (page, delta) = (after, rest);
    }
    Ok(())
}

fn take_len(delta: &mut &[u8]) -> Result<usize, FormatErrorKind> {
    const MORE: u8 = 0x80;
    match **delta {
        [] => Err(ends(1, 0)),
        [len, ref rest @ ..] if len & MORE == 0 => {
            *delta = rest;
            Ok(usize::from(len))
        }
        [_] => Err(ends(2, 1)),
        [_, high, ..] if high & MORE != 0 => {
            Err(FormatErrorKind::TooLarge { field: RUN, found: 0x4000, max: 0x3fff })
        }
        [low, high, ref rest @ ..] => {
            *delta = rest;
            Ok(usize::from(low & !MORE) | usize::from(high) << 7)
        }
    }
}

fn ends(needed: u64, found: u64) -> FormatErrorKind {
    FormatErrorKind::Ends { field: RUN, needed, found }
}

fn empty() -> FormatErrorKind {
    FormatErrorKind::Unsupported { what: "XBZRLE run of length", name: 0.to_string() }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn put_len(delta: &mut Vec<u8>, len: usize) {
        let low = u8::try_from(len & 0x7f).unwrap();
        match u8::try_from(len >> 7).unwrap() {
            0 => delta.push(low),
            high => delta.extend([low | 0x80, high]),
        }
    }

    /// What QEMU would send.
    fn encode(old: &[u8], new: &[u8]) -> Vec<u8> {
        let run = |at: usize, same: bool| {
            old[at..].iter().zip(&new[at..]).take_while(|(a, b)| (a == b) == same).count()
        };
        let (mut delta, mut at) = (Vec::new(), 0);
        loop {
            let stays = run(at, true);
            let replaced = run(at + stays, false);
            if replaced == 0 {
                return delta;
            }
            put_len(&mut delta, stays);
            put_len(&mut delta, replaced);
            at += stays + replaced;
            delta.extend_from_slice(&new[at - replaced..at]);
        }
    }

    #[test]
    fn runs_alternate_between_bytes_that_stay_and_bytes_that_come() {
        let mut page = vec![1_u8; 300];
        apply(&[0, 2, 8, 9, 0x81, 0x02, 1, 7], &mut page).unwrap();
        let mut expected = vec![1_u8; 300];
        expected[0] = 8;
        expected[1] = 9;
        expected[2 + 0x101] = 7;
        assert_eq!(page, expected);
        apply(&[], &mut page).unwrap();
        assert_eq!(page, expected);
    }

    #[test]
    fn runs_that_are_not_as_they_should_be_are_refused() {
        let refusals: [(&[u8], &str); 9] = [
            (&[0, 0], "XBZRLE run of length \"0\" is not supported"),
            (&[1, 1, 5, 0, 1, 5], "XBZRLE run of length \"0\" is not supported"),
            (&[5], "XBZRLE run needs 1 bytes, 0 are left"),
            (&[0x85], "XBZRLE run needs 2 bytes, 1 are left"),
            (&[5, 3, 1, 1], "XBZRLE run needs 3 bytes, 2 are left"),
            (&[17, 1, 1], "XBZRLE run ends at 0x11, past 0x10"),
            (&[8, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1], "XBZRLE run ends at 0x11, past 0x10"),
            (&[4, 1, 1, 0xff, 0x7f], "XBZRLE run ends at 0x4004, past 0x10"),
            (&[0xff, 0x80, 1], "XBZRLE run is 16384, at most 16383 is accepted"),
        ];
        for (delta, text) in refusals {
            let error = apply(delta, &mut [0; 16]).unwrap_err();
            assert_eq!(error.to_string(), text, "{delta:?}");
        }
    }

    proptest! {
        #[test]
        fn a_delta_leads_from_the_old_page_to_the_new(
            (old, changes) in (
                proptest::collection::vec(any::<u8>(), 4096),
                proptest::collection::vec((0_usize..4096, any::<u8>()), 0..300),
            ),
        ) {
            let mut new = old.clone();
            changes.iter().for_each(|&(at, value)| new[at] = value);
            let mut page = old.clone();
            apply(&encode(&old, &new), &mut page).unwrap();
            prop_assert_eq!(page, new);
            std::println!("cases: 1 mutations");
        }

        #[test]
        fn no_delta_makes_it_panic(delta in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = apply(&delta, &mut [0; 200]);
            std::println!("cases: 1 mutations");
        }
    }
}
