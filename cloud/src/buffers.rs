//! Buffers to read into, used again: a fresh one costs a page fault for every 4 KiB of it and begins outside the
//! processor's caches, which together take longer than the copy from the page cache.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

/// Smaller ones are cheap to make.
const BUFFER_BYTES_MIN: usize = 64 << 10;
/// Larger ones are not kept.
const BUFFER_BYTES_MAX: usize = 8 << 20;

/// Buffers that nobody uses at the moment.
#[derive(Debug, Clone)]
pub struct Buffers {
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
    idle_bytes_max: usize,
}

/// A buffer in use. It holds what was in it before.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    home: Buffers,
}

impl Buffers {
    /// None yet. So many bytes are kept for later; the buffers used longest ago go first.
    pub fn new(idle_bytes_max: usize) -> Self {
        Self { idle: Arc::default(), idle_bytes_max }
    }

    /// A buffer of `bytes` bytes or up to twice as many.
    pub fn take(&self, bytes: usize) -> Buffer {
        let is_kept = (BUFFER_BYTES_MIN..=BUFFER_BYTES_MAX).contains(&bytes);
        let size = if is_kept { bytes.next_power_of_two() } else { bytes };
        let known = {
            let mut idle = self.idle.lock();
            let newest = idle.iter().rposition(|buffer| buffer.len() == size);
            newest.map(|index| idle.remove(index))
        };
        Buffer { bytes: known.unwrap_or_else(|| vec![0; size]), home: self.clone() }
    }

    /// A buffer of `bytes` bytes and no more, for what is kept: one that was used before if that is a power of two.
    pub fn take_exactly(&self, bytes: usize) -> Buffer {
        match bytes.is_power_of_two() {
            true => self.take(bytes),
            false => Buffer { bytes: vec![0; bytes], home: self.clone() },
        }
    }

    fn give_back(&self, buffer: Vec<u8>) {
        let is_kept = (BUFFER_BYTES_MIN..=BUFFER_BYTES_MAX).contains(&buffer.len()) && buffer.len().is_power_of_two();
        if !is_kept {
            return;
        }
        let mut idle = self.idle.lock();
        idle.push(buffer);
        let (mut bytes, mut kept) = (0, 0);
        for buffer in idle.iter().rev() {
            bytes += buffer.len();
            kept += usize::from(bytes <= self.idle_bytes_max);
        }
        let gone = idle.len() - kept;
        idle.drain(..gone);
    }
}

impl Buffer {
    /// What to write to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The first `length` bytes. The buffer is used again when the last slice of them is gone.
    pub fn freeze(self, length: usize) -> Bytes {
        let mut bytes = Bytes::from_owner(self);
        bytes.truncate(length);
        bytes
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.home.give_back(std::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn idle(buffers: &Buffers) -> Vec<usize> {
        buffers.idle.lock().iter().map(Vec::len).collect()
    }

    #[test]
    fn a_buffer_is_used_again_when_its_last_slice_is_gone() {
        let buffers = Buffers::new(16 * MIB);
        let mut buffer = buffers.take(MIB - 5);
        buffer.bytes_mut()[..4].copy_from_slice(b"seen");
        let address = buffer.as_ref().as_ptr();
        let whole = buffer.freeze(MIB - 5);
        assert_eq!(whole.len(), MIB - 5);
        let part = whole.slice(..4);
        drop(whole);
        assert_eq!((idle(&buffers), &part[..]), (Vec::new(), &b"seen"[..]), "a slice is still out");
        drop(part);
        assert_eq!(buffers.take(MIB).as_ref().as_ptr(), address);
        assert_eq!(buffers.take(700 << 10).as_ref().as_ptr(), address);
        assert_eq!(idle(&buffers), [MIB]);
        assert_eq!(buffers.take_exactly(MIB).as_ref().as_ptr(), address);
        assert_eq!(buffers.take_exactly(700 << 10).as_ref().len(), 700 << 10);
        assert_eq!(idle(&buffers), [MIB], "what has no size of its own is not kept");
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_newest_stay() {
        let buffers = Buffers::new(16 * MIB);
        let out: Vec<Buffer> = [1, 8, 4, 2, 4, 8].iter().map(|mib| buffers.take(mib * MIB)).collect();
        drop(out);
        assert_eq!(idle(&buffers), [2 * MIB, 4 * MIB, 8 * MIB]);
        drop(buffers.take(8 * MIB + 1));
        drop(buffers.take(100));
        assert_eq!(idle(&buffers), [2 * MIB, 4 * MIB, 8 * MIB], "what is too large or small to be kept is not");
    }
}
