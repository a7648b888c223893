//! The sweep: finds what was written and never named, or is no longer named and was never deleted.
//!
//! What bears an earlier owner's name goes at once, after the grace. What bears our own goes when two sweeps in a row
//! found it unnamed: a sweep and a round never run at the same time, so this is not what a round under way has written.
//! Names that a later owner could have made are never touched: whoever has deposed us unnoticed loses nothing.

use std::collections::{BTreeSet, HashSet};

use object_store::path::Path;
use tracing::info;

use super::Splitter;
use crate::archive::ArchiveError;
use crate::manifest::{PagePointer, epoch_of_segment, sequence_of, sequence_of_page};
use crate::planted::{Bug, planted};

/// Objects that one sweep takes away or suspects at most; the next one finds the rest.
const FOUND_MAX: usize = 10_000;

/// What a sweep found.
#[derive(Default)]
struct Found {
    gone: Vec<Path>,
    suspects: BTreeSet<Path>,
}

impl Found {
    /// An object that nothing names: `theirs` if an earlier owner made it.
    fn unnamed(&mut self, object: Path, theirs: bool, suspected: &BTreeSet<Path>) {
        if self.gone.len() + self.suspects.len() >= FOUND_MAX {
            return;
        }
        if theirs || suspected.contains(&object) {
            self.gone.push(object);
        } else {
            self.suspects.insert(object);
        }
    }
}

impl Splitter<'_> {
    pub(super) async fn sweep(&mut self) -> Result<(), ArchiveError> {
        let (keys, store) = (&self.archive.keys, &self.archive.store);
        let (root, claim_seq, suspected) = (&self.root, self.claim_seq, &self.suspects);
        let buried: HashSet<&Path> = self.garbage.iter().map(|(_, key)| key).collect();
        let mut found = Found::default();

        let named: HashSet<Path> = self.index.usage().keys().map(|id| keys.segment(id)).collect();
        let segment = |object: Path| {
            let epoch = epoch_of_segment(&object).filter(|epoch| *epoch <= root.epoch);
            if let Some(epoch) = epoch.filter(|_| !named.contains(&object) && !buried.contains(&object)) {
                found.unnamed(object, epoch < root.epoch, suspected);
            }
        };
        store.scan(&keys.segments(), segment).await?;

        let pointers = || root.pages.iter().chain(&root.snapshot);
        let named: HashSet<Path> = pointers().map(|pointer: &PagePointer| keys.page(pointer)).collect();
        let page = |object: Path| {
            // A later owner's first pages bear numbers above its claim, which is above our root.
            let seq = sequence_of_page(&object).filter(|seq| *seq <= root.seq);
            if let Some(seq) = seq.filter(|_| !named.contains(&object) && !buried.contains(&object)) {
                found.unnamed(object, seq < claim_seq, suspected);
            }
        };
        store.scan(&keys.pages(), page).await?;

        let fenced = |seq: u64| root.fences.iter().any(|fence| fence.manifest_seq == seq);
        let old_root = |object: Path| {
            let seq = sequence_of(&object).filter(|seq| *seq < root.seq && !fenced(*seq));
            if let Some(seq) = seq.filter(|_| !buried.contains(&object)) {
                found.unnamed(object, seq < claim_seq, suspected);
            }
        };
        store.scan(&keys.roots(), old_root).await?;

        let fenced = |seq: u64| !planted(Bug::FencesCollected) && root.fences.iter().any(|fence| fence.wal_seq == seq);
        let mut wals = BTreeSet::new();
        let wal = |object: Path| match sequence_of(&object) {
            Some(seq) if seq >= root.wal => {
                wals.insert(seq);
            }
            // Below the manifest's own WAL object nothing is ever made again.
            Some(seq) if !fenced(seq) && !buried.contains(&object) => found.unnamed(object, true, suspected),
            _ => {}
        };
        store.scan(&keys.wals(), wal).await?;

        self.archive.wals.lock().append(&mut wals);
        if !found.gone.is_empty() {
            info!(objects = found.gone.len(), "found objects that no manifest names");
        }
        self.suspects = found.suspects;
        self.bury(found.gone);
        Ok(())
    }
}
