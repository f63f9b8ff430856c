//! Takes fields from bytes: no decoder reads them in another way. Each field is bounded, counted
//! and named.

use alloc::string::String;

use crate::error::{FormatError, FormatErrorKind};

/// Walks over bytes whose first byte has a known file offset.
#[derive(Clone, Debug)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
    offset: u64,
}

impl<'a> Cursor<'a> {
    /// Starts at the first of `bytes`, which lies at `offset` in the file.
    pub(crate) fn new(bytes: &'a [u8], offset: u64) -> Cursor<'a> {
        Cursor { rest: bytes, offset }
    }

    /// Returns the file offset of the next byte.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the next byte without taking it.
    pub(crate) fn peek(&self) -> Option<u8> {
        self.rest.first().copied()
    }

    /// Takes `len` bytes.
    pub(crate) fn bytes(
        &mut self,
        field: &'static str,
        len: usize,
    ) -> Result<&'a [u8], FormatError> {
        let Some((taken, rest)) = self.rest.split_at_checked(len) else {
            return Err(self.error(FormatErrorKind::Ends {
                field,
                needed: len as u64,
                found: self.rest.len() as u64,
            }));
        };
        self.rest = rest;
        self.offset = self.offset.saturating_add(len as u64);
        Ok(taken)
    }

    /// Takes as many of `len` bytes, more than none, as there are; returns how many.
    pub(crate) fn skip_up_to(&mut self, len: u64) -> Result<u64, FormatError> {
        let field = "contents of a section with parts";
        let here = self.rest.len().max(1);
        let len = usize::try_from(len).map_or(here, |len| len.min(here));
        Ok(self.bytes(field, len)?.len() as u64)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], FormatError> {
        let bytes = self.bytes(field, N)?;
        Ok(<[u8; N]>::try_from(bytes).expect("`bytes` returned N bytes"))
    }

    /// Takes one byte.
    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, FormatError> {
        Ok(u8::from_be_bytes(self.array(field)?))
    }

    /// Takes a big-endian 16-bit number.
    pub(crate) fn be16(&mut self, field: &'static str) -> Result<u16, FormatError> {
        Ok(u16::from_be_bytes(self.array(field)?))
    }

    /// Takes a big-endian 32-bit number.
    pub(crate) fn be32(&mut self, field: &'static str) -> Result<u32, FormatError> {
        Ok(u32::from_be_bytes(self.array(field)?))
    }

    /// Takes a big-endian 64-bit number.
    pub(crate) fn be64(&mut self, field: &'static str) -> Result<u64, FormatError> {
        Ok(u64::from_be_bytes(self.array(field)?))
    }

    /// Takes a big-endian 128-bit number.
    pub(crate) fn be128(&mut self, field: &'static str) -> Result<u128, FormatError> {
        Ok(u128::from_be_bytes(self.array(field)?))
    }

    /// Takes a text of `len` bytes.
    pub(crate) fn text(&mut self, field: &'static str, len: usize) -> Result<String, FormatError> {
        let offset = self.offset;
        let bytes = self.bytes(field, len)?;
        let text = core::str::from_utf8(bytes)
            .map_err(|_| FormatError::new(offset, FormatErrorKind::NotText { field }))?;
        Ok(String::from(text))
    }

    /// Takes a text that one byte of length precedes.
    pub(crate) fn counted_text(&mut self, field: &'static str) -> Result<String, FormatError> {
        let len = self.u8(field)?;
        self.text(field, usize::from(len))
    }

    /// Takes a 32-bit number that can have one value only.
    pub(crate) fn expect_be32(
        &mut self,
        field: &'static str,
        expected: u32,
    ) -> Result<(), FormatError> {
        let offset = self.offset;
        let found = self.be32(field)?;
        if found != expected {
            let kind =
                FormatErrorKind::Differs { field, found: found.into(), expected: expected.into() };
            return Err(FormatError::new(offset, kind));
        }
        Ok(())
    }

    /// Takes a byte that can have one value only.
    pub(crate) fn expect_u8(
        &mut self,
        field: &'static str,
        expected: u8,
    ) -> Result<(), FormatError> {
        let offset = self.offset;
        let found = self.u8(field)?;
        if found != expected {
            let kind =
                FormatErrorKind::Differs { field, found: found.into(), expected: expected.into() };
            return Err(FormatError::new(offset, kind));
        }
        Ok(())
    }

    /// Returns an error about the next byte.
    pub(crate) fn error(&self, kind: FormatErrorKind) -> FormatError {
        FormatError::new(self.offset, kind)
    }
}
