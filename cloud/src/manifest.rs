//! The manifest: a small root and immutable pages that name every archived object.
//!
//! ```text
//! <prefix>/cluster-id                                              text: which system this archive belongs to
//! <prefix>/cluster/nodes/{node id:010}                              heartbeats, see `archive::presence`
//! <prefix>/shards/{shard}/engine                                   text: file or object
//! <prefix>/shards/{shard}/manifest/{seq:020}                       roots: the one with the greatest seq is in force
//! <prefix>/shards/{shard}/pages/{seq:020}-{number:04}-{nonce:016x} index pages and state snapshots
//! <prefix>/shards/{shard}/segments/{seq:020}-{epoch:08}-{number:04}-{nonce:016x}
//! <prefix>/shards/{shard}/wal/{first_seq:020}                      blocks as the shard wrote them, concatenated; one each by the object engine
//!
//! root      envelope with magic TRBR, version 1
//! page      envelope with magic TRBP, version 1, kind 1 index or 2 snapshot
//! ```
//! Payloads of the [`envelope`](crate::envelope)s are postcard (LEB128 varints), but a snapshot's is the shard's own
//! encoding. Everything but heartbeats is written once, by `PutMode::Create`: a root
//! after the pages it names, a page after the segments it names. A new root names the pages that did not change by the
//! same pointers, so a publication writes what changed and no more.
//!
//! This module is pure: names, formats and the [`Index`] in memory.

mod index;

use bytes::Bytes;
use object_store::path::Path;
use serde::{Deserialize, Serialize};
use shared::name::Partition;

use crate::block::{EPOCH_MAX, SEQ_MAX};
use crate::envelope::{self, EnvelopeError, EnvelopeFormat};
use crate::segment::Run;

pub use index::{HeldRun, Index, Usage};

/// Largest root or page that is read: a bound on what a hostile bucket can make a start allocate.
pub const OBJECT_BYTES_MAX: u64 = 1 << 30;

const ROOT: EnvelopeFormat = EnvelopeFormat { magic: *b"TRBR", version: 1, kind: 0 };
const PAGE_INDEX: EnvelopeFormat = EnvelopeFormat { magic: *b"TRBP", version: 1, kind: 1 };
const PAGE_SNAPSHOT: EnvelopeFormat = EnvelopeFormat { kind: 2, ..PAGE_INDEX };

/// Why bytes are not a root or page.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Cut, flipped, not ours, or of another version.
    #[error("manifest cannot be read: {0}")]
    Envelope(#[from] EnvelopeError),
    /// It contradicts itself or what names it; the text says where.
    #[error("manifest is damaged: {0}")]
    Damaged(&'static str),
    /// Written by a newer Tributary, or damaged in a way its checksum does not show.
    #[error("manifest has a form this build does not know: use the tributary-cloud that wrote it, or a newer one")]
    Unknown,
}

/// What is in force: where state and segments are, and from which block on to replay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The system it belongs to.
    pub cluster_id: String,
    /// The shard.
    pub shard: u32,
    /// The epoch of the owner that wrote it.
    pub epoch: u32,
    /// Its number: the key.
    pub seq: u64,
    /// Random: tells two roots of one number apart when the outcome of a PUT is not known.
    pub nonce: u64,
    /// The first block that is not in the snapshot and not in segments: replay begins here.
    pub trim: u64,
    /// First block of the WAL object that holds block `trim`: where a replay begins to read, `trim` or below.
    pub wal: u64,
    /// CRC-32C over the stored bytes of block `trim - 1`: whether a local log is the one this was made from.
    pub trim_crc: Option<u32>,
    /// The state at `trim`; none before the first split.
    pub snapshot: Option<PagePointer>,
    /// The segment index, in order.
    pub pages: Vec<PagePointer>,
    /// Every claim of the shard in this bucket, oldest first. What they name is never deleted.
    pub fences: Vec<Fence>,
}

/// One claim. A deposed owner's next PUT meets one of these two objects and fails, however late it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// The epoch that was claimed.
    pub epoch: u32,
    /// The root that claimed it.
    pub manifest_seq: u64,
    /// Where the shipped WAL ended then: the object with this key is the claimant's first, or its predecessor's last.
    pub wal_seq: u64,
}

/// Names one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PagePointer {
    /// The root that first named it.
    pub seq: u64,
    /// Its number among that root's new pages.
    pub number: u32,
    /// Random.
    pub nonce: u64,
    /// Size of the object.
    pub bytes: u64,
    /// The checksum in its head.
    pub crc: u32,
}

/// Names one segment object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SegmentId {
    /// The trim of the publication that made it: what lies in it is below.
    pub seq: u64,
    /// The epoch of the owner that made it.
    pub epoch: u32,
    /// Its number within the publication.
    pub number: u32,
    /// Random.
    pub nonce: u64,
}

/// What an index page says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexPage {
    /// The objects its runs lie in, with their sizes.
    pub objects: Vec<(SegmentId, u64)>,
    /// Each partition's runs, ascending; `u32` is the object's place in `objects`.
    pub partitions: Vec<(Partition, Vec<(u32, Run)>)>,
}

impl Root {
    /// The object.
    pub fn encode(&self) -> Bytes {
        ROOT.seal(&encode(self))
    }

    /// Reads the object.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let root: Self = decode(ROOT.open(bytes)?)?;
        let fences = root.fences.iter();
        let (seqs, epochs): (Vec<_>, Vec<_>) =
            fences.map(|fence| (fence.manifest_seq.max(fence.wal_seq), fence.epoch)).unzip();
        let is_counted = root.epoch <= EPOCH_MAX && epochs.iter().all(|epoch| *epoch <= EPOCH_MAX);
        let is_numbered = [root.seq, root.trim, root.wal].iter().chain(&seqs).all(|seq| *seq <= SEQ_MAX);
        if !is_counted || !is_numbered {
            return Err(ManifestError::Damaged("a number or an epoch is greater than any can be"));
        }
        Ok(root)
    }
}

impl IndexPage {
    /// The object and the checksum in its head.
    pub fn encode(&self) -> (Bytes, u32) {
        sealed(PAGE_INDEX.seal(&encode(self)))
    }

    /// Reads the object that `pointer` names.
    pub fn decode(bytes: &Bytes, pointer: &PagePointer) -> Result<Self, ManifestError> {
        decode(page_payload(bytes, pointer, PAGE_INDEX)?)
    }
}

/// A snapshot page: the object and the checksum in its head.
pub fn encode_snapshot(state: &[u8]) -> (Bytes, u32) {
    sealed(PAGE_SNAPSHOT.seal(state))
}

/// The state in the snapshot page that `pointer` names.
pub fn decode_snapshot(bytes: &Bytes, pointer: &PagePointer) -> Result<Bytes, ManifestError> {
    Ok(bytes.slice_ref(page_payload(bytes, pointer, PAGE_SNAPSHOT)?))
}

/// Whether `bytes` are the whole page that `pointer` names.
pub fn is_page(bytes: &Bytes, pointer: &PagePointer) -> bool {
    page_payload(bytes, pointer, PAGE_INDEX).is_ok() || page_payload(bytes, pointer, PAGE_SNAPSHOT).is_ok()
}

fn page_payload<'a>(bytes: &'a [u8], pointer: &PagePointer, format: EnvelopeFormat) -> Result<&'a [u8], ManifestError> {
    let payload = format.open(bytes)?;
    if bytes.len() as u64 != pointer.bytes || envelope::crc(bytes) != pointer.crc {
        return Err(ManifestError::Damaged("page is not the one its root names"));
    }
    Ok(payload)
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("plain data always encodes into memory")
}

/// A payload, all of it.
pub(crate) fn decode<T: for<'de> Deserialize<'de>>(payload: &[u8]) -> Result<T, ManifestError> {
    match postcard::take_from_bytes(payload) {
        Ok((value, [])) => Ok(value),
        _ => Err(ManifestError::Unknown),
    }
}

fn sealed(object: Bytes) -> (Bytes, u32) {
    let crc = envelope::crc(&object);
    (object, crc)
}

/// The keys of one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    prefix: Path,
    shard: u32,
}

impl Keys {
    /// Keys under `prefix`.
    pub fn new(prefix: Path, shard: u32) -> Self {
        Self { prefix, shard }
    }

    /// The shard they belong to.
    pub fn shard(&self) -> u32 {
        self.shard
    }

    fn under(&self, kind: &str) -> Path {
        self.prefix.clone().join("shards").join(self.shard.to_string()).join(kind)
    }

    /// Which system the archive belongs to.
    pub fn cluster_id(&self) -> Path {
        self.prefix.clone().join("cluster-id")
    }

    /// Which engine writes the shard.
    pub fn engine(&self) -> Path {
        self.under("engine")
    }

    /// Where start-up probes write.
    pub fn probes(&self) -> Path {
        self.prefix.clone().join("probe")
    }

    /// All roots.
    pub fn roots(&self) -> Path {
        self.under("manifest")
    }

    /// One root.
    pub fn root(&self, seq: u64) -> Path {
        self.roots().join(format!("{seq:020}"))
    }

    /// All shipped WAL objects.
    pub fn wals(&self) -> Path {
        self.under("wal")
    }

    /// The WAL object whose first block is `first_seq`.
    pub fn wal(&self, first_seq: u64) -> Path {
        self.wals().join(format!("{first_seq:020}"))
    }

    /// All pages.
    pub fn pages(&self) -> Path {
        self.under("pages")
    }

    /// One page.
    pub fn page(&self, pointer: &PagePointer) -> Path {
        let PagePointer { seq, number, nonce, .. } = pointer;
        self.pages().join(format!("{seq:020}-{number:04}-{nonce:016x}"))
    }

    /// All segments.
    pub fn segments(&self) -> Path {
        self.under("segments")
    }

    /// One segment.
    pub fn segment(&self, id: &SegmentId) -> Path {
        let SegmentId { seq, epoch, number, nonce } = id;
        self.segments().join(format!("{seq:020}-{epoch:08}-{number:04}-{nonce:016x}"))
    }
}

/// Whether a key is a segment's.
pub fn is_segment(key: &Path) -> bool {
    key.as_ref().rsplit('/').nth(1) == Some("segments")
}

/// Epoch of the owner that wrote the segment with this key.
pub fn epoch_of_segment(key: &Path) -> Option<u32> {
    key.filename().and_then(|name| name.split('-').nth(1)).and_then(|epoch| epoch.parse().ok())
}

/// The root that first named the page with this key.
pub fn sequence_of_page(key: &Path) -> Option<u64> {
    key.filename().and_then(|name| name.split('-').next()).and_then(|seq| seq.parse().ok())
}

/// The number that a root's or WAL object's key ends with.
pub fn sequence_of(key: &Path) -> Option<u64> {
    key.filename().filter(|name| name.len() == 20).and_then(|name| name.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use shared::name::TopicId;

    fn root() -> Root {
        Root {
            cluster_id: "c-1".into(),
            shard: 0,
            epoch: 3,
            seq: 9,
            nonce: 0x1122,
            trim: 300,
            wal: 290,
            trim_crc: Some(5),
            snapshot: Some(PagePointer { seq: 9, number: 0, nonce: 1, bytes: 20, crc: 7 }),
            pages: vec![PagePointer { seq: 8, number: 1, nonce: 2, bytes: 30, crc: 8 }],
            fences: vec![Fence { epoch: 3, manifest_seq: 7, wal_seq: 250 }],
        }
    }

    fn page() -> IndexPage {
        let run = Run {
            position: 0,
            length: 70,
            index_position: 70,
            index_length: 60,
            base: 7,
            next: 8,
            max_timestamp: 70,
            appended_ms: 99,
        };
        let id = SegmentId { seq: 300, epoch: 3, number: 1, nonce: 4 };
        IndexPage {
            objects: vec![(id, 254)],
            partitions: vec![(Partition { topic: TopicId([1; 16]), index: 2 }, vec![(0, run)])],
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn golden_root() {
        let bytes = root().encode();
        assert_eq!(
            hex(&bytes),
            "54524252000100000000002032cf150a03632d31000309a222ac02a2020105010900011407010801021e08010307fa01"
        );
        assert_eq!(Root::decode(&bytes), Ok(root()));
    }

    #[test]
    fn a_number_after_which_none_can_come_is_refused() {
        let fence =
            |epoch, manifest_seq, wal_seq| Root { fences: vec![Fence { epoch, manifest_seq, wal_seq }], ..root() };
        for wrong in [
            Root { epoch: u32::MAX, ..root() },
            Root { epoch: EPOCH_MAX + 1, ..root() },
            Root { seq: u64::MAX, ..root() },
            Root { seq: SEQ_MAX + 1, ..root() },
            Root { trim: u64::MAX, ..root() },
            Root { wal: u64::MAX, ..root() },
            fence(u32::MAX, 1, 1),
            fence(1, u64::MAX, 1),
            fence(1, 1, u64::MAX),
        ] {
            let refused = Root::decode(&wrong.encode());
            assert!(matches!(refused, Err(ManifestError::Damaged(text)) if text.contains("greater")), "{wrong:?}");
        }
    }

    #[test]
    fn golden_pages() {
        let (bytes, crc) = page().encode();
        assert_eq!(
            hex(&bytes),
            "545242500001000100000026de0559ab01ac02030104fe0101010101010101010101010101010101010201000046463c0e108c01c601"
        );
        let pointer = PagePointer { seq: 1, number: 0, nonce: 0, bytes: bytes.len() as u64, crc };
        assert_eq!(IndexPage::decode(&bytes, &pointer), Ok(page()));
        let other_kind = ManifestError::Envelope(EnvelopeError::Kind { expected: 2, found: 1 });
        assert_eq!(decode_snapshot(&bytes, &pointer), Err(other_kind));
        let other = PagePointer { crc: crc ^ 1, ..pointer };
        assert!(IndexPage::decode(&bytes, &other).is_err(), "a whole page, but not the one that was named");

        let (bytes, crc) = encode_snapshot(b"state");
        assert_eq!(hex(&bytes), "545242500001000200000005c66d7a3c7374617465");
        let pointer = PagePointer { bytes: bytes.len() as u64, crc, ..pointer };
        assert_eq!(decode_snapshot(&bytes, &pointer), Ok(Bytes::from("state")));
    }

    #[test]
    fn golden_keys() {
        let keys = Keys::new(Path::from("a/b"), 0);
        assert_eq!(keys.root(7).as_ref(), "a/b/shards/0/manifest/00000000000000000007");
        assert_eq!(keys.wal(u64::MAX).as_ref(), "a/b/shards/0/wal/18446744073709551615");
        assert_eq!(sequence_of(&keys.wal(u64::MAX)), Some(u64::MAX));
        let id = SegmentId { seq: 300, epoch: 3, number: 1, nonce: 4 };
        assert_eq!(
            keys.segment(&id).as_ref(),
            "a/b/shards/0/segments/00000000000000000300-00000003-0001-0000000000000004"
        );
        assert_eq!(sequence_of(&keys.segment(&id)), None);
        assert!(is_segment(&keys.segment(&id)));
        assert!(!is_segment(&keys.wal(1)) && !is_segment(&Path::from("segments")));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100), crc in any::<u32>()) {
            let _ = Root::decode(&bytes);
            // Bytes that pass the envelope, too.
            let _ = Root::decode(&ROOT.seal(&bytes));
            let page = PAGE_INDEX.seal(&bytes);
            let pointer = PagePointer { seq: 0, number: 0, nonce: 0, bytes: page.len() as u64, crc };
            let pointer = PagePointer { crc: sealed(page.clone()).1, ..pointer };
            if let Ok(page) = IndexPage::decode(&page, &pointer) {
                let _ = Index::load([(pointer, page)]);
            }
            let _ = decode_snapshot(&bytes.into(), &pointer);
        }

        #[test]
        fn a_flipped_bit_is_found(bit in any::<proptest::sample::Index>()) {
            let mut bytes = root().encode().to_vec();
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Root::decode(&bytes).is_err());
        }
    }
}
