//! What a start reads of a shard in the bucket: segment index, state, and the blocks after it.
//!
//! Objects do not change. So they are read many at a time, and what was read is kept when a start must look again, because
//! whoever had the shard wrote meanwhile.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tracing::info;

use super::claim::View;
use super::{Archive, ArchiveError, Snapshot, StoreError, StoredBlock};
use crate::block::{Block, claim_mark_epoch};
use crate::manifest::{self, Index, IndexPage, OBJECT_BYTES_MAX, PagePointer, Root};

/// GETs under way at once: enough to hide the store's latency, few enough to hold what they bring in memory.
pub(super) const READS_MAX: usize = 16;
/// How often a long read says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// What has been read of a shard so far.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    index: Option<(Vec<PagePointer>, Index)>,
    snapshot: Option<(PagePointer, Snapshot)>,
    /// Blocks of the WAL, adjoining.
    blocks: Vec<StoredBlock>,
}

impl Loaded {
    /// The segment index of the root that was loaded last.
    pub fn index(&self) -> Index {
        self.index.as_ref().map(|(_, index)| index.clone()).unwrap_or_default()
    }

    /// The state of the root that was loaded last.
    pub fn snapshot(&self) -> Option<Snapshot> {
        self.snapshot.as_ref().map(|(_, snapshot)| snapshot.clone())
    }

    /// Blocks of the WAL, adjoining.
    pub fn blocks(&self) -> &[StoredBlock] {
        &self.blocks
    }

    /// The same, for good.
    pub fn take_blocks(&mut self) -> Vec<StoredBlock> {
        std::mem::take(&mut self.blocks)
    }

    /// The block after those read; `None` before the first.
    pub fn next(&self) -> Option<u64> {
        self.blocks.last().map(|block| block.seq + 1)
    }

    /// How many objects of a view's WAL are to be read still.
    pub fn behind(&self, view: &View) -> usize {
        self.missing(view).count()
    }

    fn missing<'a>(&self, view: &'a View) -> impl Iterator<Item = u64> + 'a {
        let from = self.next().filter(|_| self.begins_at(view.root.wal)).unwrap_or(view.root.wal);
        let have = view.last.first().map(|block| block.seq);
        view.wals.iter().copied().filter(move |first| *first >= from && Some(*first) != have)
    }

    fn begins_at(&self, seq: u64) -> bool {
        self.blocks.first().is_some_and(|block| block.seq <= seq) && self.next().is_some_and(|next| next > seq)
    }
}

impl Archive {
    /// Brings what was loaded to what the bucket has of the shard; false if an owner that has published since has cleared
    /// it away.
    pub(super) async fn load(&self, view: &View, loaded: &mut Loaded) -> Result<bool, ArchiveError> {
        if !self.load_state(&view.root, loaded).await? {
            return Ok(false);
        }
        let read = self.load_chain(view, loaded).await;
        self.unless_cleared(&view.root, read).await
    }

    /// The same without the WAL.
    pub(super) async fn load_state(&self, root: &Root, loaded: &mut Loaded) -> Result<bool, ArchiveError> {
        let read = async {
            if loaded.index.as_ref().is_none_or(|(pages, _)| *pages != root.pages) {
                loaded.index = Some((root.pages.clone(), self.load_index(root).await?));
            }
            let known = loaded.snapshot.as_ref().map(|(pointer, snapshot)| (*pointer, snapshot.next_seq));
            if known != root.snapshot.map(|pointer| (pointer, root.trim)) {
                loaded.snapshot = root.snapshot.zip(self.load_snapshot(root).await?);
            }
            Ok(())
        };
        let read = read.await;
        self.unless_cleared(root, read).await
    }

    /// False where an object that `root` names is gone because an owner has published since.
    async fn unless_cleared(&self, root: &Root, loaded: Result<(), ArchiveError>) -> Result<bool, ArchiveError> {
        match loaded {
            Err(ArchiveError::Store(StoreError::Missing(_))) if !self.is_newest(root.seq).await? => Ok(false),
            loaded => loaded.map(|()| true),
        }
    }

    /// Shipped blocks from the root's WAL object on, to the view's end. What came before an error is kept.
    async fn load_chain(&self, view: &View, loaded: &mut Loaded) -> Result<(), ArchiveError> {
        if !self.ships {
            return Ok(());
        }
        if loaded.begins_at(view.root.wal) {
            loaded.blocks.retain(|block| block.seq >= view.root.wal);
        } else {
            loaded.blocks.clear();
        }
        let wanted: Vec<u64> = loaded.missing(view).collect();
        let (count, mut told) = (wanted.len(), Instant::now());
        let reads = stream::iter(wanted).map(|first| self.wal_object(first)).buffered(READS_MAX);
        let mut objects = reads.chain(stream::iter((!view.last.is_empty()).then(|| Ok(view.last.clone())))).enumerate();
        while let Some((done, object)) = objects.next().await {
            let object = object?;
            let at = loaded.next().unwrap_or(view.root.wal);
            // One that begins within another was left by an owner that was deposed.
            if object.first().is_some_and(|block| block.seq == at) {
                loaded.blocks.extend(object);
            }
            if told.elapsed() >= PROGRESS_INTERVAL {
                told = Instant::now();
                info!(shard = self.settings.shard, done, of = count, "reading the log from the archive");
            }
        }
        match loaded.next().unwrap_or(view.root.wal) {
            at if at < view.next => Err(StoreError::Missing(self.keys.wal(at)).into()),
            _ => Ok(()),
        }
    }

    /// The blocks of a view's WAL; `None` if an owner that has published since has cleared some of them away.
    pub(super) async fn chain(&self, view: &View) -> Result<Option<Vec<StoredBlock>>, ArchiveError> {
        let mut loaded = Loaded::default();
        let read = self.load_chain(view, &mut loaded).await;
        Ok(self.unless_cleared(&view.root, read).await?.then(|| loaded.take_blocks()))
    }

    /// The blocks of one shipped WAL object, checked.
    pub(super) async fn wal_object(&self, first: u64) -> Result<Vec<StoredBlock>, ArchiveError> {
        Ok(self.marked_wal_object(first).await?.0)
    }

    /// The same, and the epoch of the claim that it was the first object after.
    pub(super) async fn marked_wal_object(&self, first: u64) -> Result<(Vec<StoredBlock>, Option<u32>), ArchiveError> {
        let key = self.keys.wal(first);
        let damaged = |reason: String| ArchiveError::Damaged { key: key.to_string(), reason };
        let mut bytes = self.store.get(&key, OBJECT_BYTES_MAX).await?;
        let mut blocks = Vec::new();
        let (mut next, mut mark) = (first, None);
        while let Some(block) = Block::split_first(&mut bytes).map_err(|error| damaged(error.to_string()))? {
            if block.header().seq != next || block.header().shard != self.settings.shard {
                return Err(damaged(format!("block {} where {next} was expected", block.header().seq)));
            }
            blocks.push(StoredBlock { seq: next, bytes: block.bytes().clone() });
            next += 1;
            mark = claim_mark_epoch(&bytes);
        }
        if blocks.is_empty() { Err(damaged("it holds no block".into())) } else { Ok((blocks, mark)) }
    }

    /// The segment index a root names.
    pub(super) async fn load_index(&self, root: &Root) -> Result<Index, ArchiveError> {
        let load = |pointer: PagePointer| async move {
            let bytes = self.load_page(&pointer).await?;
            let page = IndexPage::decode(&bytes, &pointer).map_err(|error| self.damaged_page(&pointer, &error))?;
            Ok::<_, ArchiveError>((pointer, page))
        };
        let loading = stream::iter(root.pages.clone()).map(load).buffered(READS_MAX);
        let pages: Vec<_> = loading.try_collect().await?;
        let damaged = |error: manifest::ManifestError| ArchiveError::Damaged {
            key: self.keys.root(root.seq).to_string(),
            reason: error.to_string(),
        };
        Index::load(pages).map_err(damaged)
    }

    pub(super) async fn load_snapshot(&self, root: &Root) -> Result<Option<Snapshot>, ArchiveError> {
        let Some(pointer) = &root.snapshot else { return Ok(None) };
        let bytes = self.load_page(pointer).await?;
        let state = manifest::decode_snapshot(&bytes, pointer).map_err(|error| self.damaged_page(pointer, &error))?;
        Ok(Some(Snapshot { next_seq: root.trim, state }))
    }

    fn damaged_page(&self, pointer: &PagePointer, error: &manifest::ManifestError) -> ArchiveError {
        ArchiveError::Damaged { key: self.keys.page(pointer).to_string(), reason: error.to_string() }
    }

    /// A page: the local copy if it is whole, the bucket's otherwise.
    pub(super) async fn load_page(&self, pointer: &PagePointer) -> Result<Bytes, ArchiveError> {
        if let Some(mirror) = &self.mirror
            && let Ok(bytes) = mirror.get(&self.mirror_keys().page(pointer), pointer.bytes).await
            && manifest::is_page(&bytes, pointer)
        {
            return Ok(bytes);
        }
        Ok(self.store.get(&self.keys.page(pointer), pointer.bytes).await?)
    }
}
