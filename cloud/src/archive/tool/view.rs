//! What an archive says: of each shard the root in force, its index, its state, and what lies there.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use object_store::path::Path;
use shared::name::{Partition, TopicId};

use super::{Finding, ToolError};
use crate::archive::{Store, StoreError};
use crate::manifest::{self, HeldRun, IndexPage, Keys, OBJECT_BYTES_MAX, PagePointer, Root, sequence_of};
use crate::state::State;

/// How often a view is taken again because a node published meanwhile.
const ATTEMPTS: usize = 8;

/// An archive.
pub(super) struct View {
    /// The system it belongs to, as its roots say.
    pub cluster_id: Option<String>,
    /// Its shards that have a root, by number.
    pub shards: Vec<ShardView>,
}

/// A shard in it.
pub(super) struct ShardView {
    pub keys: Keys,
    pub root: Root,
    pub root_bytes: Bytes,
    /// Each partition's runs, ascending.
    pub runs: BTreeMap<Partition, Vec<HeldRun>>,
    /// The state at the root's trim; empty without a snapshot.
    pub state: State,
    /// What lies there: sizes by key.
    pub objects: BTreeMap<Path, u64>,
}

impl View {
    /// Reads roots, pages and snapshots. What does not hold goes to `findings`; what it would have named is left out.
    pub async fn load(store: &Store, findings: &mut Vec<Finding>) -> Result<Self, ToolError> {
        for _ in 0..ATTEMPTS {
            let mut found = Vec::new();
            let view = Self::load_once(store, &mut found).await?;
            // A node may have published while we read, and cleared away what we were about to read.
            if found.is_empty() || !view.is_outdated(store).await? {
                findings.append(&mut found);
                return Ok(view);
            }
        }
        Err(ToolError::Restless(store.describe()))
    }

    /// As [`View::load`], for those who need it whole.
    pub async fn load_whole(store: &Store) -> Result<Self, ToolError> {
        let mut findings = Vec::new();
        let view = Self::load(store, &mut findings).await?;
        match findings.is_empty() {
            true => Ok(view),
            false => Err(ToolError::Damaged(findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("\n"))),
        }
    }

    async fn load_once(store: &Store, findings: &mut Vec<Finding>) -> Result<Self, ToolError> {
        let base = store.prefix().clone().join("shards");
        let mut listed: BTreeMap<u32, BTreeMap<Path, u64>> = BTreeMap::new();
        for object in store.list(&base).await? {
            let number = object.location.prefix_match(&base).and_then(|mut parts| parts.next()?.as_ref().parse().ok());
            if let Some(number) = number {
                listed.entry(number).or_default().insert(object.location, object.size);
            }
        }
        let mut shards = Vec::new();
        let mut any = false;
        for (number, objects) in listed {
            let keys = Keys::new(store.prefix().clone(), number);
            let Some(seq) = newest_root(&keys, objects.keys()) else {
                findings
                    .push(Finding::new(keys.roots(), "there is no root: nothing says what this shard's objects are"));
                continue;
            };
            any = true;
            shards.extend(ShardView::load(store, number, keys, seq, objects, findings).await?);
        }
        if !any {
            return Err(ToolError::Nothing(store.describe()));
        }
        let cluster_id = check_cluster_ids(store, &shards, findings).await?;
        Ok(Self { cluster_id, shards })
    }

    /// Whether a newer root is in force.
    pub async fn is_outdated(&self, store: &Store) -> Result<bool, ToolError> {
        for shard in &self.shards {
            let roots = store.list(&shard.keys.roots()).await?;
            if newest_root(&shard.keys, roots.iter().map(|object| &object.location)) != Some(shard.root.seq) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Topics by name, of all shards. A later name of the same id does not count.
    pub fn topics(&self) -> BTreeMap<TopicId, String> {
        let mut topics = BTreeMap::new();
        for topic in self.shards.iter().flat_map(|shard| shard.state.topics()) {
            topics.entry(topic.id).or_insert_with(|| topic.name.to_string());
        }
        topics
    }
}

impl ShardView {
    async fn load(
        store: &Store,
        number: u32,
        keys: Keys,
        seq: u64,
        objects: BTreeMap<Path, u64>,
        findings: &mut Vec<Finding>,
    ) -> Result<Option<Self>, ToolError> {
        let key = keys.root(seq);
        let Some(root_bytes) = fetch(store, &key, OBJECT_BYTES_MAX, findings).await? else { return Ok(None) };
        let root = match Root::decode(&root_bytes) {
            Ok(root) => root,
            Err(error) => {
                findings.push(Finding::new(&key, format!("{error}; what it names is not looked at")));
                return Ok(None);
            }
        };
        if root.seq != seq || root.shard != number || root.wal > root.trim {
            findings.push(Finding::new(&key, "it contradicts its own name"));
            return Ok(None);
        }
        let mut shard = Self { keys, root, root_bytes, runs: BTreeMap::new(), state: State::default(), objects };
        shard.load_pages(store, findings).await?;
        shard.load_snapshot(store, findings).await?;
        Ok(Some(shard))
    }

    async fn load_pages(&mut self, store: &Store, findings: &mut Vec<Finding>) -> Result<(), ToolError> {
        for pointer in self.root.pages.clone() {
            let key = self.keys.page(&pointer);
            let Some(bytes) = self.page(store, &pointer, findings).await? else { continue };
            match IndexPage::decode(&bytes, &pointer) {
                Ok(page) => self.add_page(&key, page, findings),
                Err(error) => findings.push(Finding::new(&key, error)),
            }
        }
        for (partition, runs) in &mut self.runs {
            runs.sort_by_key(|held| held.run.base);
            for pair in runs.windows(2) {
                if let [before, held] = pair
                    && held.run.base < before.run.next
                {
                    let what = format!(
                        "runs of {partition} overlap: {}..{} and {}..{}",
                        before.run.base, before.run.next, held.run.base, held.run.next
                    );
                    findings.push(Finding::new(self.keys.segment(&held.object), what));
                }
            }
        }
        Ok(())
    }

    fn add_page(&mut self, key: &Path, page: IndexPage, findings: &mut Vec<Finding>) {
        for (partition, runs) in page.partitions {
            for (place, run) in runs {
                let Some(&(object, object_bytes)) = page.objects.get(place as usize) else {
                    findings.push(Finding::new(key, format!("a run of {partition} names no object")));
                    continue;
                };
                let data_end = run.position.checked_add(run.length);
                let index_end = run.index_position.checked_add(u64::from(run.index_length));
                let inside = data_end.is_some_and(|end| end <= run.index_position)
                    && index_end.is_some_and(|end| end <= object_bytes);
                if !inside || run.next <= run.base {
                    findings.push(Finding::new(key, format!("a run of {partition} contradicts its object or itself")));
                    continue;
                }
                self.runs.entry(partition).or_default().push(HeldRun { object, object_bytes, run });
            }
        }
    }

    async fn load_snapshot(&mut self, store: &Store, findings: &mut Vec<Finding>) -> Result<(), ToolError> {
        let Some(pointer) = self.root.snapshot else { return Ok(()) };
        let key = self.keys.page(&pointer);
        let Some(bytes) = self.page(store, &pointer, findings).await? else { return Ok(()) };
        let state = manifest::decode_snapshot(&bytes, &pointer).map_err(|error| error.to_string());
        match state.and_then(|bytes| State::decode(&bytes).map_err(|error| error.to_string())) {
            Ok(state) => self.state = state,
            Err(error) => findings.push(Finding::new(&key, error)),
        }
        Ok(())
    }

    async fn page(
        &self,
        store: &Store,
        pointer: &PagePointer,
        findings: &mut Vec<Finding>,
    ) -> Result<Option<Bytes>, ToolError> {
        let key = self.keys.page(pointer);
        match self.objects.get(&key) {
            None => findings.push(Finding::missing(&key)),
            Some(size) if *size != pointer.bytes => findings.push(Finding::new(&key, wrong_size(*size, pointer.bytes))),
            Some(_) => return fetch(store, &key, pointer.bytes, findings).await,
        }
        Ok(None)
    }

    /// The segments that the manifest names, with their sizes and runs.
    pub fn segments(&self) -> BTreeMap<Path, (u64, Vec<(Partition, crate::segment::Run)>)> {
        let mut segments: BTreeMap<Path, (u64, Vec<_>)> = BTreeMap::new();
        for (partition, held) in
            self.runs.iter().flat_map(|(partition, runs)| runs.iter().map(|held| (*partition, held)))
        {
            let entry = segments.entry(self.keys.segment(&held.object)).or_default();
            entry.0 = held.object_bytes;
            entry.1.push((partition, held.run));
        }
        segments
    }

    /// Pages that the root names.
    pub fn pages(&self) -> impl Iterator<Item = &PagePointer> {
        self.root.pages.iter().chain(&self.root.snapshot)
    }

    /// First blocks of the shipped WAL's objects from the root's on, ascending.
    pub fn wals(&self) -> Vec<u64> {
        self.sequences(&self.keys.wals()).filter(|seq| *seq >= self.root.wal).collect()
    }

    fn sequences(&self, under: &Path) -> impl Iterator<Item = u64> {
        let keys = self.objects.keys().filter(move |key| key.prefix_matches(under));
        keys.filter_map(sequence_of).collect::<BTreeSet<u64>>().into_iter()
    }

    /// Claims whose objects below the chain are there: WAL objects that are kept as fences.
    pub fn fence_wals(&self) -> BTreeSet<u64> {
        self.root.fences.iter().map(|fence| fence.wal_seq).filter(|seq| *seq < self.root.wal).collect()
    }

    /// Older roots that are kept as fences.
    pub fn fence_roots(&self) -> BTreeSet<u64> {
        self.root.fences.iter().map(|fence| fence.manifest_seq).filter(|seq| *seq < self.root.seq).collect()
    }

    /// Everything that the root names or that is kept for it.
    pub fn named(&self) -> BTreeSet<Path> {
        let keys = &self.keys;
        let mut named: BTreeSet<Path> = self.segments().into_keys().collect();
        named.extend(self.pages().map(|pointer| keys.page(pointer)));
        named.extend(self.wals().into_iter().chain(self.fence_wals()).map(|seq| keys.wal(seq)));
        named.extend(self.fence_roots().into_iter().chain([self.root.seq]).map(|seq| keys.root(seq)));
        // Written when a node first has the shard; one that could not reach the archive then writes it later.
        named.extend(Some(keys.engine()).filter(|key| self.objects.contains_key(key)));
        named
    }
}

/// What to say of an object of another size.
pub(super) fn wrong_size(found: u64, expected: u64) -> String {
    format!("it has {found} bytes, its manifest says {expected}")
}

fn newest_root<'a>(keys: &Keys, objects: impl Iterator<Item = &'a Path>) -> Option<u64> {
    let roots = keys.roots();
    objects.filter(|key| key.prefix_matches(&roots)).filter_map(sequence_of).max()
}

/// An object; one that is gone is a finding.
pub(super) async fn fetch(
    store: &Store,
    key: &Path,
    bytes_max: u64,
    findings: &mut Vec<Finding>,
) -> Result<Option<Bytes>, ToolError> {
    match store.get(key, bytes_max).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(StoreError::Missing(_)) => {
            findings.push(Finding::missing(key));
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Roots and the archive's own object must name one system.
async fn check_cluster_ids(
    store: &Store,
    shards: &[ShardView],
    findings: &mut Vec<Finding>,
) -> Result<Option<String>, ToolError> {
    let ours = shards.first().map(|shard| shard.root.cluster_id.clone());
    for shard in shards {
        if Some(&shard.root.cluster_id) != ours.as_ref() {
            let what = format!("it belongs to system {}, other shards do not", shard.root.cluster_id);
            findings.push(Finding::new(shard.keys.root(shard.root.seq), what));
        }
    }
    let key = Keys::new(store.prefix().clone(), 0).cluster_id();
    let Some(bytes) = fetch(store, &key, 64, findings).await? else { return Ok(ours) };
    if let Some(ours) = ours.as_ref().filter(|ours| bytes[..] != *format!("{ours}\n").as_bytes()) {
        let there = String::from_utf8_lossy(&bytes);
        findings.push(Finding::new(&key, format!("it names system {:?}, the roots {ours:?}", there.trim_end())));
    }
    Ok(ours)
}
