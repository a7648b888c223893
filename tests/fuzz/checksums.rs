//! Sets right the checksums of what looks like record batches, so that a fuzzer tries more than the checksum.

use bytes::Bytes;

use super::{Batch, BatchError};

/// Sets the checksum of everything that has the place and length of a batch.
pub fn set_checksums(bytes: &mut [u8]) {
    let mut at = 0;
    while let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) {
        let length = rest.get(8..12).and_then(|length| length.try_into().ok()).map_or(0, u32::from_be_bytes);
        let magic = rest.get(16) == Some(&2);
        let Some(batch) = rest.get_mut(..12 + length as usize).filter(|batch| magic && batch.len() > 21) else {
            at += 1;
            continue;
        };
        match Batch::parse(Bytes::copy_from_slice(batch)) {
            Err(BatchError::Crc { found, .. }) => {
                if let Some(place) = batch.get_mut(17..21) {
                    place.copy_from_slice(&found.to_be_bytes());
                }
                at += batch.len();
            }
            Ok(_) => at += batch.len(),
            Err(_) => at += 1,
        }
    }
}
