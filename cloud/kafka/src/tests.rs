//! Every message, every version: back and forth, against an independent codec, and with bytes that mean nothing.

use bytes::Bytes;

mod any_bytes;
mod golden;
mod oracle;

/// Makes values for tests out of a seed.
pub struct Sampler {
    state: u64,
    /// The version to make values for: fields it does not carry keep their defaults.
    pub version: i16,
    /// Whether that version is flexible.
    pub flexible: bool,
}

impl Sampler {
    /// A sampler for one version of a message.
    pub fn new(seed: u64, version: i16, flexible: bool) -> Self {
        Self { state: seed, version, flexible }
    }

    /// The next number (splitmix64).
    pub fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// How many elements an array gets.
    pub fn count(&mut self) -> u64 {
        self.number() % 4
    }

    /// Some text, empty and beyond ASCII too.
    pub fn text(&mut self) -> String {
        let length = self.number() % 12;
        (0..length).map(|_| ['a', 'Z', '0', '.', 'ä', '€', '𝄞'][self.number() as usize % 7]).collect()
    }

    /// Some bytes, now and then enough to be spliced instead of copied.
    pub fn bytes(&mut self) -> Bytes {
        let length = if self.number().is_multiple_of(8) { 5000 } else { self.number() % 40 };
        (0..length).map(|_| self.number() as u8).collect()
    }
}
