//! How values become bytes: primitive types, bounds, and the notation in which messages are declared.
//!
//! ```text
//! message! {
//!     /// One sentence.
//!     pub struct ThingRequest [Thing, 0..=5, flexible 3..] {   // top level: key, versions, flexible versions
//!         name: String [0..];                                   // field: type, versions that carry it
//!         items: Option<Vec<Item>> [1.., null 2..];             // Option: may be null, here only from 2 on
//!         limit: i32 [4..] = -1;                                // what it is where it is not carried
//!     } tagged {
//!         0 hint: i64 [3..] = -1;                               // tag number first (KIP-482)
//!     }
//! }
//! ```
//! A field that a version does not carry is left out when writing and takes its default when reading. `null` where a
//! version has none is written as empty and refused when read. In flexible versions lengths are unsigned varints of
//! length + 1 (0 is null) and each struct ends in tagged fields, of which unknown ones are skipped. Otherwise lengths
//! are i16 for strings and i32 for bytes and arrays, -1 is null. All integers are big-endian.
//!
//! Nothing is allocated on the word of a length or count: a length must lie within the bytes that remain, an array
//! grows element by element, and one message has at most [`ELEMENTS_MAX`] elements in all its arrays together.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Most array elements in one message. A small element takes a byte on the wire and fifty times as much in memory; this
/// bounds the difference. Kafka's own clients stay below a hundredth of it.
pub const ELEMENTS_MAX: usize = 500_000;

/// Record bytes shorter than this are copied into the response: a vectored write costs more than the copy.
const SPLICE_BYTES_MIN: usize = 1024;

/// Why bytes are not the message they should be. The peer is at fault; there is nothing to retry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field or length reaches beyond the end.
    #[error("message is cut: {wanted} bytes wanted, {left} left")]
    Cut {
        /// What the field or length asks for.
        wanted: u64,
        /// What there is.
        left: usize,
    },
    /// A negative length that is not the null marker.
    #[error("length {0} is negative")]
    NegativeLength(i64),
    /// Null where this version allows none.
    #[error("field {0} is null")]
    Null(&'static str),
    /// A string that is not UTF-8.
    #[error("string is not UTF-8")]
    NotUtf8,
    /// An unsigned varint of more than 32 bits.
    #[error("varint is too long")]
    VarintTooLong,
    /// More than [`ELEMENTS_MAX`] array elements.
    #[error("message has more than {ELEMENTS_MAX} array elements")]
    TooManyElements,
    /// A version this crate cannot read.
    #[error("version {version} of API {key} is not known")]
    UnknownVersion {
        /// API key.
        key: i16,
        /// Version asked for.
        version: i16,
    },
}

/// A topic id on the wire. Zero means none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// No id.
    pub const ZERO: Self = Self([0; 16]);

    /// Whether this is no id.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }
}

/// Record batches in a response: slices of stored bytes that are sent as they are, without a copy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Records(pub Vec<Bytes>);

impl Records {
    /// Total bytes.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }
}

/// A top-level request or response.
pub trait Message: Field + Default {
    /// The API it belongs to.
    const KEY: crate::ApiKey;
    /// The versions this crate reads and writes.
    const VERSIONS: std::ops::RangeInclusive<i16>;

    /// Whether a version has compact lengths and tagged fields (KIP-482).
    fn is_flexible(version: i16) -> bool;

    /// Reads a message of a version. Bytes after it are ignored, as Kafka does.
    fn decode(bytes: Bytes, version: i16) -> Result<Self, WireError> {
        if !Self::VERSIONS.contains(&version) {
            return Err(WireError::UnknownVersion { key: Self::KEY as i16, version });
        }
        Self::read(&mut Reader::new(bytes, version, Self::is_flexible(version)))
    }

    /// Writes the body alone in one piece: what tests and clients need.
    fn encode(&self, version: i16) -> Bytes {
        let mut writer = Writer::new(version, Self::is_flexible(version));
        self.write(&mut writer);
        writer.finish().concat()
    }
}

/// A value that can stand in a message.
pub trait Field: Sized {
    /// Takes the value off the front.
    fn read(reader: &mut Reader) -> Result<Self, WireError>;
    /// Puts the value at the end.
    fn write(&self, writer: &mut Writer);
    /// Some value, for tests.
    #[cfg(test)]
    fn sample(sampler: &mut crate::tests::Sampler) -> Self;
}

/// Bytes of one message on their way to values.
#[derive(Debug)]
pub struct Reader {
    bytes: Bytes,
    version: i16,
    flexible: bool,
    elements_left: usize,
}

impl Reader {
    /// A reader over the whole of `bytes`. What it hands out as bytes are views of these.
    pub fn new(bytes: Bytes, version: i16, flexible: bool) -> Self {
        Self { bytes, version, flexible, elements_left: ELEMENTS_MAX }
    }

    /// The version being read.
    pub fn version(&self) -> i16 {
        self.version
    }

    /// Whether that version is flexible.
    pub fn is_flexible(&self) -> bool {
        self.flexible
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.bytes.len()
    }

    /// What was not read.
    pub fn into_rest(self) -> Bytes {
        self.bytes
    }

    fn need(&self, wanted: u64) -> Result<(), WireError> {
        if wanted > self.bytes.len() as u64 {
            return Err(WireError::Cut { wanted, left: self.bytes.len() });
        }
        Ok(())
    }

    fn take(&mut self, length: usize) -> Result<Bytes, WireError> {
        self.need(length as u64)?;
        Ok(self.bytes.split_to(length))
    }

    /// An unsigned varint of at most 32 bits, least significant group first.
    pub fn uvarint(&mut self) -> Result<u32, WireError> {
        let mut value = 0u32;
        for shift in (0..35).step_by(7) {
            let byte = u8::read(self)?;
            if shift == 28 && byte > 0x0f {
                break;
            }
            value |= u32::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(WireError::VarintTooLong)
    }

    /// A length that lies within the bytes that remain; `None` is null. An array's count passes the same check, for
    /// each element takes a byte at least.
    fn length(&mut self, wide: bool) -> Result<Option<usize>, WireError> {
        let length = match (self.flexible, wide) {
            (true, _) => i64::from(self.uvarint()?) - 1,
            (false, true) => i64::from(i32::read(self)?),
            (false, false) => i64::from(i16::read(self)?),
        };
        match u64::try_from(length) {
            Ok(length) => self.need(length).map(|()| Some(length as usize)),
            Err(_) if length == -1 => Ok(None),
            Err(_) => Err(WireError::NegativeLength(length)),
        }
    }

    /// Reads the tagged fields that end a struct. `known` reads a field's value, or says that it does not know the tag.
    pub fn tagged(&mut self, mut known: impl FnMut(u32, &mut Self) -> Result<(), WireError>) -> Result<(), WireError> {
        for _ in 0..self.uvarint()? {
            let tag = self.uvarint()?;
            let length = self.uvarint()?;
            let bytes = self.take(length as usize)?;
            let mut inner = Self { bytes, ..*self };
            known(tag, &mut inner)?;
            self.elements_left = inner.elements_left;
        }
        Ok(())
    }
}

/// Bytes of one message being written: small fields gathered, records spliced in uncopied.
#[derive(Debug)]
pub struct Writer {
    /// Everything before the first splice. Kept apart so that the frame's size can still be written into it.
    head: Option<BytesMut>,
    chunks: Vec<Bytes>,
    tail: BytesMut,
    length: usize,
    version: i16,
    flexible: bool,
}

impl Writer {
    /// An empty writer for a version.
    pub fn new(version: i16, flexible: bool) -> Self {
        Self { head: None, chunks: Vec::new(), tail: BytesMut::new(), length: 0, version, flexible }
    }

    /// A writer that leaves room for the frame's size, which [`Writer::finish_frame`] fills in.
    pub fn frame(version: i16, flexible: bool) -> Self {
        let mut writer = Self::new(version, flexible);
        writer.tail.reserve(256);
        writer.put(&[0; 4]);
        writer
    }

    /// The version being written.
    pub fn version(&self) -> i16 {
        self.version
    }

    /// Whether that version is flexible.
    pub fn is_flexible(&self) -> bool {
        self.flexible
    }

    fn put(&mut self, bytes: &[u8]) {
        self.length += bytes.len();
        self.tail.put_slice(bytes);
    }

    /// Adds stored bytes without copying them, unless they are few.
    fn splice(&mut self, bytes: &Bytes) {
        if bytes.len() < SPLICE_BYTES_MIN {
            return self.put(bytes);
        }
        self.length += bytes.len();
        let before = self.tail.split();
        match self.head {
            None => self.head = Some(before),
            Some(_) if before.is_empty() => {}
            Some(_) => self.chunks.push(before.freeze()),
        }
        self.chunks.push(bytes.clone());
    }

    /// Writes an unsigned varint.
    pub fn uvarint(&mut self, mut value: u32) {
        while value >= 0x80 {
            self.put(&[value as u8 | 0x80]);
            value >>= 7;
        }
        self.put(&[value as u8]);
    }

    fn put_length(&mut self, length: Option<usize>, wide: bool) {
        match (self.flexible, wide) {
            (true, _) => self.uvarint(length.map_or(0, |length| length as u32 + 1)),
            (false, true) => length.map_or(-1, |length| length as i32).write(self),
            (false, false) => length.map_or(-1, |length| length as i16).write(self),
        }
    }

    /// Writes a string with an i16 length whatever the version: the header's client id.
    pub(crate) fn put_classic_string(&mut self, text: Option<&str>) {
        let text = text.map(|text| truncated(text, i16::MAX as usize));
        text.map_or(-1, |text| text.len() as i16).write(self);
        self.put(text.unwrap_or_default().as_bytes());
    }

    /// Writes the tagged fields that end a struct, in ascending order of tag.
    pub fn tagged(&mut self, fields: &[(u32, Bytes)]) {
        self.uvarint(fields.len() as u32);
        for (tag, bytes) in fields {
            self.uvarint(*tag);
            self.uvarint(bytes.len() as u32);
            self.put(bytes);
        }
    }

    /// One tagged field's value.
    pub fn tag_value(&self, field: &impl Field) -> Bytes {
        let mut inner = Self::new(self.version, self.flexible);
        field.write(&mut inner);
        inner.finish().concat()
    }

    /// What was written.
    pub fn finish(self) -> Encoded {
        let mut chunks = Vec::with_capacity(self.chunks.len() + 2);
        chunks.extend(self.head.map(BytesMut::freeze));
        chunks.extend(self.chunks);
        if !self.tail.is_empty() {
            chunks.push(self.tail.freeze());
        }
        Encoded { chunks, length: self.length }
    }

    /// What was written since [`Writer::frame`], with the size of the rest in its first four bytes.
    pub fn finish_frame(mut self) -> Encoded {
        let size = (self.length.saturating_sub(4) as u32).to_be_bytes();
        if let Some(room) = self.head.as_mut().unwrap_or(&mut self.tail).get_mut(..4) {
            room.copy_from_slice(&size);
        }
        self.finish()
    }
}

/// A written message in pieces, for vectored writes.
#[derive(Debug, Clone, Default)]
pub struct Encoded {
    /// The pieces in order.
    pub chunks: Vec<Bytes>,
    /// Their total length.
    pub length: usize,
}

impl Encoded {
    /// All in one piece.
    pub fn concat(self) -> Bytes {
        match <[Bytes; 1]>::try_from(self.chunks) {
            Ok([only]) => only,
            Err(chunks) => chunks.concat().into(),
        }
    }
}

macro_rules! integers {
    ($($int:ident $get:ident)*) => {$(
        impl Field for $int {
            fn read(reader: &mut Reader) -> Result<Self, WireError> {
                reader.need(size_of::<Self>() as u64)?;
                Ok(reader.bytes.$get())
            }

            fn write(&self, writer: &mut Writer) {
                writer.put(&self.to_be_bytes());
            }

            #[cfg(test)]
            fn sample(sampler: &mut crate::tests::Sampler) -> Self {
                sampler.number() as Self
            }
        }
    )*};
}

integers! { u8 get_u8 i8 get_i8 u16 get_u16 i16 get_i16 i32 get_i32 i64 get_i64 }

impl Field for bool {
    fn read(reader: &mut Reader) -> Result<Self, WireError> {
        Ok(u8::read(reader)? != 0)
    }

    fn write(&self, writer: &mut Writer) {
        u8::from(*self).write(writer);
    }

    #[cfg(test)]
    fn sample(sampler: &mut crate::tests::Sampler) -> Self {
        sampler.number() & 1 == 1
    }
}

impl Field for Uuid {
    fn read(reader: &mut Reader) -> Result<Self, WireError> {
        let mut id = [0; 16];
        reader.need(16)?;
        reader.bytes.copy_to_slice(&mut id);
        Ok(Self(id))
    }

    fn write(&self, writer: &mut Writer) {
        writer.put(&self.0);
    }

    #[cfg(test)]
    fn sample(sampler: &mut crate::tests::Sampler) -> Self {
        Self(std::array::from_fn(|_| sampler.number() as u8))
    }
}

impl Field for crate::ErrorCode {
    fn read(reader: &mut Reader) -> Result<Self, WireError> {
        i16::read(reader).map(Self)
    }

    fn write(&self, writer: &mut Writer) {
        self.0.write(writer);
    }

    #[cfg(test)]
    fn sample(sampler: &mut crate::tests::Sampler) -> Self {
        Self(i16::sample(sampler))
    }
}

/// A value with a length before it, which can say null.
pub trait Nullable: Sized + Default {
    /// Reads the value or null.
    fn read_nullable(reader: &mut Reader) -> Result<Option<Self>, WireError>;
    /// Writes the value or null.
    fn write_nullable(value: Option<&Self>, writer: &mut Writer);
    /// Some value, for tests.
    #[cfg(test)]
    fn sample_some(sampler: &mut crate::tests::Sampler) -> Self;
}

impl Nullable for String {
    fn read_nullable(reader: &mut Reader) -> Result<Option<Self>, WireError> {
        let Some(length) = reader.length(false)? else { return Ok(None) };
        let bytes = reader.take(length)?;
        std::str::from_utf8(&bytes).map(|text| Some(text.to_owned())).map_err(|_| WireError::NotUtf8)
    }

    fn write_nullable(value: Option<&Self>, writer: &mut Writer) {
        // Only text of our own can be longer than an old version's length field holds (an error message at worst).
        let text = value.map(|text| if writer.flexible { text } else { truncated(text, i16::MAX as usize) });
        writer.put_length(text.map(str::len), false);
        writer.put(text.unwrap_or_default().as_bytes());
    }

    #[cfg(test)]
    fn sample_some(sampler: &mut crate::tests::Sampler) -> Self {
        sampler.text()
    }
}

fn truncated(text: &str, bytes_max: usize) -> &str {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

impl Nullable for Bytes {
    fn read_nullable(reader: &mut Reader) -> Result<Option<Self>, WireError> {
        let Some(length) = reader.length(true)? else { return Ok(None) };
        reader.take(length).map(Some)
    }

    fn write_nullable(value: Option<&Self>, writer: &mut Writer) {
        writer.put_length(value.map(Bytes::len), true);
        if let Some(bytes) = value {
            writer.splice(bytes);
        }
    }

    #[cfg(test)]
    fn sample_some(sampler: &mut crate::tests::Sampler) -> Self {
        sampler.bytes()
    }
}

impl Nullable for Records {
    fn read_nullable(reader: &mut Reader) -> Result<Option<Self>, WireError> {
        let bytes = Bytes::read_nullable(reader)?;
        Ok(bytes.map(|bytes| Self(if bytes.is_empty() { Vec::new() } else { vec![bytes] })))
    }

    fn write_nullable(value: Option<&Self>, writer: &mut Writer) {
        writer.put_length(value.map(Self::bytes), true);
        for slice in value.iter().flat_map(|records| &records.0) {
            writer.splice(slice);
        }
    }

    #[cfg(test)]
    fn sample_some(sampler: &mut crate::tests::Sampler) -> Self {
        let bytes = sampler.bytes();
        Self(if bytes.is_empty() { Vec::new() } else { vec![bytes] })
    }
}

impl<T: Field> Nullable for Vec<T> {
    fn read_nullable(reader: &mut Reader) -> Result<Option<Self>, WireError> {
        let Some(count) = reader.length(true)? else { return Ok(None) };
        reader.elements_left = reader.elements_left.checked_sub(count).ok_or(WireError::TooManyElements)?;
        let mut items = Self::new();
        for _ in 0..count {
            items.push(T::read(reader)?);
        }
        Ok(Some(items))
    }

    fn write_nullable(value: Option<&Self>, writer: &mut Writer) {
        writer.put_length(value.map(Vec::len), true);
        for item in value.into_iter().flatten() {
            item.write(writer);
        }
    }

    #[cfg(test)]
    fn sample_some(sampler: &mut crate::tests::Sampler) -> Self {
        (0..sampler.count()).map(|_| T::sample(sampler)).collect()
    }
}

macro_rules! never_null {
    ($([$($generics:tt)*] $ty:ty;)*) => {$(
        impl<$($generics)*> Field for $ty {
            fn read(reader: &mut Reader) -> Result<Self, WireError> {
                Self::read_nullable(reader)?.ok_or(WireError::Null(stringify!($ty)))
            }

            fn write(&self, writer: &mut Writer) {
                Self::write_nullable(Some(self), writer);
            }

            #[cfg(test)]
            fn sample(sampler: &mut crate::tests::Sampler) -> Self {
                Self::sample_some(sampler)
            }
        }
    )*};
}

never_null! { [] String; [] Bytes; [] Records; [T: Field] Vec<T>; }

impl<T: Nullable> Field for Option<T> {
    fn read(reader: &mut Reader) -> Result<Self, WireError> {
        T::read_nullable(reader)
    }

    fn write(&self, writer: &mut Writer) {
        T::write_nullable(self.as_ref(), writer);
    }

    #[cfg(test)]
    fn sample(sampler: &mut crate::tests::Sampler) -> Self {
        (sampler.number() & 3 != 0).then(|| T::sample_some(sampler))
    }
}

/// Writes a nullable field in a version that has no null: as empty.
#[doc(hidden)]
pub fn write_never_null<T: Nullable>(value: &Option<T>, writer: &mut Writer) {
    match value {
        Some(value) => T::write_nullable(Some(value), writer),
        None => T::write_nullable(Some(&T::default()), writer),
    }
}

/// A field's default: its type's, or the one declared.
macro_rules! default_of {
    ($ty:ty) => {
        <$ty as Default>::default()
    };
    ($ty:ty, $default:expr) => {
        $default
    };
}

/// Declares messages and their parts; the notation is described at the top of this module.
macro_rules! message {
    ($(
        $(#[$meta:meta])*
        pub struct $name:ident $([$key:ident, $versions:expr, flexible $flexible:expr])? {
            $( $(#[$field_meta:meta])* $field:ident : $ty:ty [$since:expr $(, null $null:expr)?] $(= $default:expr)?; )*
        } $(tagged {
            $( $(#[$tag_meta:meta])* $tag:literal $tag_field:ident : $tag_ty:ty [$tag_since:expr] $(= $tag_default:expr)?; )*
        })?
    )*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[allow(missing_docs, reason = "fields carry Kafka's names; a comment stands where there is more to say")]
        pub struct $name {
            $( $(#[$field_meta])* pub $field: $ty, )*
            $($( $(#[$tag_meta])* pub $tag_field: $tag_ty, )*)?
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $( $field: default_of!($ty $(, $default)?), )*
                    $($( $tag_field: default_of!($tag_ty $(, $tag_default)?), )*)?
                }
            }
        }

        #[allow(clippy::redundant_pattern_matching, clippy::manual_range_contains, unused_variables, unused_mut)]
        impl $crate::codec::Field for $name {
            fn read(reader: &mut $crate::codec::Reader) -> Result<Self, $crate::codec::WireError> {
                let version = reader.version();
                let mut value = Self::default();
                $(
                    if ($since).contains(&version) {
                        value.$field = $crate::codec::Field::read(reader)?;
                        $(
                            if !($null).contains(&version) && value.$field.is_none() {
                                return Err($crate::codec::WireError::Null(stringify!($field)));
                            }
                        )?
                    }
                )*
                if reader.is_flexible() {
                    reader.tagged(|tag, reader| {
                        match tag {
                            $($(
                                $tag if ($tag_since).contains(&version) => {
                                    value.$tag_field = $crate::codec::Field::read(reader)?;
                                }
                            )*)?
                            _ => {}
                        }
                        Ok(())
                    })?;
                }
                Ok(value)
            }

            fn write(&self, writer: &mut $crate::codec::Writer) {
                let version = writer.version();
                $(
                    if ($since).contains(&version) {
                        message!(@write self.$field, writer, version $(, $null)?);
                    }
                )*
                if writer.is_flexible() {
                    let mut tags: Vec<(u32, bytes::Bytes)> = Vec::new();
                    $($(
                        if ($tag_since).contains(&version)
                            && self.$tag_field != default_of!($tag_ty $(, $tag_default)?)
                        {
                            tags.push(($tag, writer.tag_value(&self.$tag_field)));
                        }
                    )*)?
                    writer.tagged(&tags);
                }
            }

            #[cfg(test)]
            fn sample(sampler: &mut $crate::tests::Sampler) -> Self {
                let version = sampler.version;
                let mut value = Self::default();
                $(
                    if ($since).contains(&version) {
                        value.$field = $crate::codec::Field::sample(sampler);
                        $(
                            if !($null).contains(&version) {
                                value.$field.get_or_insert_default();
                            }
                        )?
                    }
                )*
                $($(
                    if sampler.flexible && ($tag_since).contains(&version) {
                        value.$tag_field = $crate::codec::Field::sample(sampler);
                    }
                )*)?
                value
            }
        }

        $(
            impl $crate::codec::Message for $name {
                const KEY: $crate::ApiKey = $crate::ApiKey::$key;
                const VERSIONS: std::ops::RangeInclusive<i16> = $versions;

                fn is_flexible(version: i16) -> bool {
                    ($flexible).contains(&version)
                }
            }
        )?
    )*};
    (@write $value:expr, $writer:ident, $version:ident) => {
        $crate::codec::Field::write(&$value, $writer)
    };
    (@write $value:expr, $writer:ident, $version:ident, $null:expr) => {
        if ($null).contains(&$version) {
            $crate::codec::Field::write(&$value, $writer);
        } else {
            $crate::codec::write_never_null(&$value, $writer);
        }
    };
}
