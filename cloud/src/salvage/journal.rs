//! What was sent already: a small file in the data directory, replaced after each acknowledgement, so that the command can be
//! run again after any stop.
//!
//! Between an acknowledgement and its line here a stop leaves one batch per partition that is sent again: with the same
//! producer id and sequence, by which the broker knows it.
//!
//! A data directory can be deposed again with another log, whose blocks have the numbers of those that were sent. So a place
//! is a block's number with its checksum: blocks bear a random number, and one that is the same has all before it in common.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const FILE: &str = "salvage.json";
const VERSION: u32 = 2;

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct JournalFile {
    version: u32,
    cluster_id: String,
    producer_id: i64,
    producer_epoch: i16,
    /// By `topic id/partition`.
    partitions: BTreeMap<String, SentUpTo>,
}

/// How far a partition is sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SentUpTo {
    /// Whose log the block is in.
    pub shard: u32,
    /// CRC-32C over the block's stored bytes: whether it is this log that was sent.
    pub block_crc: u32,
    /// The block of the last batch that was dealt with.
    pub block: u64,
    /// Batches of that block that were.
    pub batches: u32,
    /// The sequence number of the next batch.
    pub sequence: i32,
}

/// The journal of one data directory.
#[derive(Debug)]
pub struct SalvageJournal {
    path: PathBuf,
    written: JournalFile,
}

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk.
    #[error("{path}: {reason}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// It cannot be read.
    #[error(
        "{0} is damaged, so what was sent already is not known: move it away to send everything, some of it a second time"
    )]
    Damaged(String),
}

impl SalvageJournal {
    /// Reads the journal of a data directory; `None` if nothing was ever sent from it to this system.
    pub fn read(data_dir: &Path, cluster_id: &str) -> Result<Option<Self>, JournalError> {
        let path = data_dir.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error(&path, &error)),
        };
        let written: Option<JournalFile> = serde_json::from_slice(&bytes).ok();
        let written = written.filter(|written| written.version == VERSION);
        let written = written.ok_or_else(|| JournalError::Damaged(path.display().to_string()))?;
        Ok((written.cluster_id == cluster_id).then_some(Self { path, written }))
    }

    /// Begins one, under a new producer id.
    pub fn begin(data_dir: &Path, cluster_id: &str, producer: (i64, i16)) -> Result<Self, JournalError> {
        let (producer_id, producer_epoch) = producer;
        let cluster_id = cluster_id.to_owned();
        let written =
            JournalFile { version: VERSION, cluster_id, producer_id, producer_epoch, partitions: BTreeMap::new() };
        let journal = Self { path: data_dir.join(FILE), written };
        journal.write()?;
        Ok(journal)
    }

    /// The producer that batches are sent as.
    pub fn producer(&self) -> (i64, i16) {
        (self.written.producer_id, self.written.producer_epoch)
    }

    /// How far a partition is.
    pub fn sent(&self, partition: &str) -> SentUpTo {
        self.written.partitions.get(partition).copied().unwrap_or_default()
    }

    /// Forgets places in other logs of a shard than the one that is here: one that was set aside since, and whose numbers this
    /// one uses again. `crc_of` tells the CRC of a block that is here. The producer goes on with its sequence numbers.
    pub fn keep_places_in(&mut self, shard: u32, crc_of: impl Fn(u64) -> Option<u32>) {
        for sent in self.written.partitions.values_mut().filter(|sent| sent.shard == shard) {
            if crc_of(sent.block) != Some(sent.block_crc) {
                *sent = SentUpTo { sequence: sent.sequence, ..SentUpTo::default() };
            }
        }
    }

    /// Notes how far a partition is, durably.
    pub fn note(&mut self, partition: &str, sent: SentUpTo) -> Result<(), JournalError> {
        self.written.partitions.insert(partition.to_owned(), sent);
        self.write()
    }

    fn write(&self) -> Result<(), JournalError> {
        let new = self.path.with_extension("json.new");
        let written = || -> std::io::Result<()> {
            let mut options = std::fs::OpenOptions::new();
            let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec(&self.written)?)?;
            file.sync_all()?;
            std::fs::rename(&new, &self.path)?;
            let parent = self.path.parent().unwrap_or(Path::new("."));
            std::fs::File::open(parent)?.sync_all()
        };
        written().map_err(|error| io_error(&self.path, &error))
    }
}

fn io_error(path: &Path, error: &std::io::Error) -> JournalError {
    JournalError::Io { path: path.display().to_string(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_known_after_a_stop_and_only_for_its_system() {
        let dir = tempfile::tempdir().unwrap();
        assert!(SalvageJournal::read(dir.path(), "c-1").unwrap().is_none());
        let mut journal = SalvageJournal::begin(dir.path(), "c-1", (1000, 0)).unwrap();
        let sent = SentUpTo { shard: 0, block_crc: 9, block: 7, batches: 2, sequence: 30 };
        journal.note("t/0", sent).unwrap();
        let again = SalvageJournal::read(dir.path(), "c-1").unwrap().unwrap();
        assert_eq!((again.producer(), again.sent("t/0"), again.sent("t/1")), ((1000, 0), sent, SentUpTo::default()));
        assert!(SalvageJournal::read(dir.path(), "c-2").unwrap().is_none());
        std::fs::write(dir.path().join(FILE), b"{").unwrap();
        assert!(matches!(SalvageJournal::read(dir.path(), "c-1"), Err(JournalError::Damaged(_))));
    }

    #[test]
    fn places_in_a_log_that_was_set_aside_do_not_count_for_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = SalvageJournal::begin(dir.path(), "c-1", (1000, 0)).unwrap();
        let sent = SentUpTo { shard: 0, block_crc: 9, block: 150, batches: 2, sequence: 30 };
        journal.note("t/0", sent).unwrap();
        let other = SentUpTo { shard: 3, ..sent };
        journal.note("t/1", other).unwrap();
        // The same log, however much longer.
        journal.keep_places_in(0, |seq| (seq < 200).then_some(9));
        assert_eq!(journal.sent("t/0"), sent);
        // Another one that is shorter, or that has another block there.
        for block in [None, Some(8)] {
            let mut journal = SalvageJournal::read(dir.path(), "c-1").unwrap().unwrap();
            journal.keep_places_in(0, |_| block);
            assert_eq!(journal.sent("t/0"), SentUpTo { sequence: 30, ..SentUpTo::default() });
            assert_eq!((journal.sent("t/1"), journal.producer()), (other, (1000, 0)));
        }
    }
}
