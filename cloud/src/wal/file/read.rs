//! Reading blocks back, whole or in parts.
//!
//! What one reader asks for at a time goes to one buffer, which is used again later, and is copied there once, by the
//! kernel. Parts that lie apart, those of a partition among many, would each wait for the disk in turn: the kernel is told
//! of all of them first. For parts that adjoin it finds out by itself, and asks the disk for more at a time than when told.

use std::sync::Arc;

use bytes::Bytes;

use super::{FRAME_BYTES, FileWal, Ring};
use crate::wal::disk::DiskFile;
use crate::wal::{Part, WalError, is_sound};

/// A part that begins so soon after the one before adjoins it: what lies between is the end of one block and the head of
/// the next.
const NEAR_BYTES: u64 = 4096;

/// Where a part is.
struct Place {
    file: Arc<dyn DiskFile>,
    position: u64,
    bytes: u32,
}

impl Place {
    fn adjoins(&self, before: &Place) -> bool {
        let gap = self.position.checked_sub(before.position + u64::from(before.bytes));
        Arc::ptr_eq(&self.file, &before.file) && gap.is_some_and(|gap| gap <= NEAR_BYTES)
    }
}

impl Ring {
    fn place(&self, part: &Part) -> Result<Place, WalError> {
        let (location, file) = self.locate(part.seq)?;
        let Part { seq, position, bytes } = *part;
        if u64::from(position) + u64::from(bytes) > u64::from(location.bytes) {
            let text = format!("block {seq} has {} bytes, {bytes} at {position} were asked for", location.bytes);
            return Err(WalError::Corrupt(text));
        }
        Ok(Place { file, position: location.position + FRAME_BYTES as u64 + u64::from(position), bytes })
    }
}

impl FileWal {
    /// [`BlockLog::read`](crate::wal::BlockLog::read), which waits for the disk in the call.
    pub fn read(&self, seq: u64) -> Result<Bytes, WalError> {
        let bytes = self.shared.ring.lock().locate(seq)?.0.bytes;
        let block = self.read_part(seq, 0, bytes)?;
        if !is_sound(&block) {
            return Err(WalError::Corrupt(format!("block {seq} of the WAL is damaged: its checksum does not hold")));
        }
        Ok(block)
    }

    /// [`BlockLog::read_part`](crate::wal::BlockLog::read_part), which waits for the disk in the call. For those who keep
    /// what they read: it takes no more memory than it has bytes.
    pub fn read_part(&self, seq: u64, position: u32, bytes: u32) -> Result<Bytes, WalError> {
        let place = self.shared.ring.lock().place(&Part { seq, position, bytes })?;
        let mut buffer = vec![0; bytes as usize];
        place.file.read_at(&mut buffer, place.position).map_err(|error| WalError::Io(format!("read: {error}")))?;
        self.still_there(&[Part { seq, position, bytes }])?;
        Ok(buffer.into())
    }

    /// [`BlockLog::read_parts`](crate::wal::BlockLog::read_parts), which waits for the disk in the call.
    pub fn read_parts(&self, parts: &[Part]) -> Result<Vec<Bytes>, WalError> {
        let (mut places, mut error) = (Vec::with_capacity(parts.len()), None);
        {
            let ring = self.shared.ring.lock();
            for part in parts {
                match ring.place(part) {
                    Ok(place) => places.push(place),
                    Err(missing) => {
                        error = Some(missing);
                        break;
                    }
                }
            }
        }
        announce(&places);
        let mut buffer = self.buffers.take(places.iter().map(|place| place.bytes as usize).sum());
        let (mut filled, mut lengths) = (0, Vec::with_capacity(places.len()));
        for place in &places {
            let end = filled + place.bytes as usize;
            let Some(room) = buffer.bytes_mut().get_mut(filled..end) else { break };
            if let Err(failed) = place.file.read_at(room, place.position) {
                error = Some(WalError::Io(format!("read: {failed}")));
                break;
            }
            filled = end;
            lengths.push(place.bytes as usize);
        }
        if let Some(error) = error.filter(|_| lengths.is_empty()) {
            return Err(error);
        }
        self.still_there(parts.get(..lengths.len()).unwrap_or_default())?;
        let mut rest = buffer.freeze(filled);
        Ok(lengths.into_iter().map(|length| rest.split_to(length)).collect())
    }

    /// A file is written again only after its blocks left the ring: still there means that what was read is the blocks'.
    fn still_there(&self, parts: &[Part]) -> Result<(), WalError> {
        let ring = self.shared.ring.lock();
        parts.iter().try_for_each(|part| ring.locate(part.seq).map(drop))
    }
}

/// Tells the kernel what is going to be read, where it would not find out by itself.
fn announce(places: &[Place]) {
    if places.windows(2).any(|pair| matches!(pair, [before, place] if !place.adjoins(before))) {
        places.iter().for_each(|place| place.file.will_read(place.position, u64::from(place.bytes)));
    }
}
