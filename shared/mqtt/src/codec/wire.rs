//! The field types of MQTT 5 §1.5, read with bounds and written.

use super::CodecError;

/// Reads fields off the front of a packet's body.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

const SHORT: CodecError = CodecError::Malformed("a field runs beyond the packet's end");

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    #[inline]
    pub(crate) fn take(&mut self, n: usize) -> Result<&'a [u8], CodecError> {
        let (head, tail) = self.rest.split_at_checked(n).ok_or(SHORT)?;
        self.rest = tail;
        Ok(head)
    }

    #[inline]
    pub(crate) fn u8(&mut self) -> Result<u8, CodecError> {
        let (&byte, tail) = self.rest.split_first().ok_or(SHORT)?;
        self.rest = tail;
        Ok(byte)
    }

    #[inline]
    pub(crate) fn u16(&mut self) -> Result<u16, CodecError> {
        let (head, tail) = self.rest.split_first_chunk::<2>().ok_or(SHORT)?;
        self.rest = tail;
        Ok(u16::from_be_bytes(*head))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, CodecError> {
        let (head, tail) = self.rest.split_first_chunk::<4>().ok_or(SHORT)?;
        self.rest = tail;
        Ok(u32::from_be_bytes(*head))
    }

    /// Variable byte integer (§1.5.5), in its shortest form only.
    #[inline]
    pub(crate) fn varint(&mut self) -> Result<u32, CodecError> {
        let mut value = 0u32;
        for shift in [0u32, 7, 14, 21] {
            let byte = self.u8()?;
            value |= u32::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(CodecError::Malformed("variable byte integer is longer than it must be"));
                }
                return Ok(value);
            }
        }
        Err(CodecError::Malformed("variable byte integer has more than four bytes"))
    }

    #[inline]
    pub(crate) fn binary(&mut self) -> Result<&'a [u8], CodecError> {
        let length = self.u16()?;
        self.take(usize::from(length))
    }

    /// UTF-8 string (§1.5.4): well-formed, without surrogates and U+0000.
    #[inline]
    pub(crate) fn string(&mut self) -> Result<&'a str, CodecError> {
        let bytes = self.binary()?;
        let text = std::str::from_utf8(bytes).map_err(|_| CodecError::Malformed("a string is not UTF-8"))?;
        if bytes.contains(&0) {
            return Err(CodecError::Malformed("a string holds U+0000"));
        }
        Ok(text)
    }

    /// A packet identifier: never 0 (§2.2.1).
    #[inline]
    pub(crate) fn packet_id(&mut self) -> Result<u16, CodecError> {
        match self.u16()? {
            0 => Err(CodecError::Protocol("packet identifier 0")),
            id => Ok(id),
        }
    }

    pub(crate) fn end(&self) -> Result<(), CodecError> {
        if self.rest.is_empty() { Ok(()) } else { Err(CodecError::Malformed("bytes after the packet's last field")) }
    }
}

/// Appends a variable byte integer; the caller has checked that it is at most [`super::REMAINING_LENGTH_MAX`].
pub(crate) fn put_remaining_length(out: &mut Vec<u8>, mut value: usize) {
    loop {
        let low = (value & 0x7F) as u8;
        value >>= 7;
        if value == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

pub(crate) fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_be_bytes());
}

pub(crate) fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}
