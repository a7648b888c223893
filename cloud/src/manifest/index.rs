//! The segment index in memory: which runs a partition has, which page says so, and which pages changed.
//!
//! A page takes new runs of up to 256 partitions until it is full; then it is closed and its partitions go on in a new
//! one, so that a long history is not written again for each new run. A closed page changes only when a run leaves it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use shared::name::{Offset, Partition};

use super::{IndexPage, ManifestError, PagePointer, SegmentId};
use crate::segment::Run;

/// Partitions that share a page.
const PAGE_PARTITIONS_MAX: usize = 256;
/// Runs after which a page takes no more: about 200 KB as stored.
const PAGE_RUNS_MAX: usize = 4096;

/// A run and the object it lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldRun {
    /// The object.
    pub object: SegmentId,
    /// Its size.
    pub object_bytes: u64,
    /// Where in it.
    pub run: Run,
}

/// How much of an object is still wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Size of the object.
    pub bytes: u64,
    /// Bytes of runs that the index names.
    pub live: u64,
}

/// All runs of a shard. Copies share the pages that are the same.
#[derive(Debug, Clone, Default)]
pub struct Index {
    pages: Vec<Arc<Page>>,
    /// The pages that name runs of a partition, ascending in offset.
    homes: HashMap<Partition, Vec<usize>>,
}

#[derive(Debug, Clone, Default)]
struct Page {
    /// Where it is stored, as it is now; `None` when it changed since.
    pointer: Option<PagePointer>,
    runs: BTreeMap<Partition, Vec<HeldRun>>,
    count: usize,
}

impl Index {
    /// Puts the pages of a root together.
    pub fn load(pages: impl IntoIterator<Item = (PagePointer, IndexPage)>) -> Result<Self, ManifestError> {
        let mut index = Self::default();
        for (pointer, stored) in pages {
            let mut page = Page { pointer: Some(pointer), ..Page::default() };
            let number = index.pages.len();
            for (partition, runs) in stored.partitions {
                let mut next = index.next(partition).unwrap_or(0);
                let mut held = Vec::with_capacity(runs.len().min(PAGE_RUNS_MAX));
                for (place, run) in runs {
                    let object = stored.objects.get(place as usize);
                    let &(object, object_bytes) = object.ok_or(ManifestError::Damaged("a run names no object"))?;
                    let end = run.index_position.checked_add(u64::from(run.index_length));
                    let inside = run.position.checked_add(run.length).is_some_and(|end| end <= run.index_position);
                    if !inside || end.is_none_or(|end| end > object_bytes) || run.base < next || run.next <= run.base {
                        return Err(ManifestError::Damaged("a run contradicts its object or its neighbour"));
                    }
                    next = run.next;
                    held.push(HeldRun { object, object_bytes, run });
                }
                page.count += held.len();
                if !held.is_empty() && page.runs.insert(partition, held).is_some() {
                    return Err(ManifestError::Damaged("a page names a partition twice"));
                }
            }
            for partition in page.runs.keys() {
                index.homes.entry(*partition).or_default().push(number);
            }
            index.pages.push(Arc::new(page));
        }
        Ok(index)
    }

    /// The partition's runs, ascending.
    pub fn runs(&self, partition: Partition) -> impl DoubleEndedIterator<Item = &HeldRun> {
        self.slices(partition).flatten()
    }

    fn slices(&self, partition: Partition) -> impl DoubleEndedIterator<Item = &Vec<HeldRun>> {
        let homes = self.homes.get(&partition).map(Vec::as_slice).unwrap_or_default();
        homes.iter().filter_map(move |page| self.pages.get(*page)?.runs.get(&partition))
    }

    /// The run that holds `from`, or the first one after it.
    pub fn at_offset(&self, partition: Partition, from: Offset) -> Option<HeldRun> {
        let page = self.slices(partition).find(|runs| runs.last().is_some_and(|last| last.run.next > from))?;
        page.get(page.partition_point(|held| held.run.next <= from)).copied()
    }

    /// The offset after the partition's last archived record.
    pub fn next(&self, partition: Partition) -> Option<Offset> {
        self.runs(partition).next_back().map(|held| held.run.next)
    }

    /// Partitions that have runs.
    pub fn partitions(&self) -> impl Iterator<Item = Partition> {
        self.homes.keys().copied()
    }

    /// Adds the partition's next run.
    pub fn add(&mut self, partition: Partition, held: HeldRun) {
        let number = self.page_for(partition);
        let page = Arc::make_mut(&mut self.pages[number]);
        page.pointer = None;
        page.count += 1;
        page.runs.entry(partition).or_default().push(held);
        let homes = self.homes.entry(partition).or_default();
        if homes.last() != Some(&number) {
            homes.push(number);
        }
    }

    /// The page that takes the partition's next run: never one before a page that has its runs, or they would no
    /// longer ascend.
    fn page_for(&mut self, partition: Partition) -> usize {
        let home = self.homes.get(&partition).and_then(|homes| homes.last()).copied();
        let takes =
            |page: &Page, known: bool| page.count < PAGE_RUNS_MAX && (known || page.runs.len() < PAGE_PARTITIONS_MAX);
        let first = match home {
            Some(home) if takes(&self.pages[home], true) => return home,
            Some(home) => home + 1,
            None => 0,
        };
        let open = (first..self.pages.len()).rev().find(|number| takes(&self.pages[*number], false));
        open.unwrap_or_else(|| {
            self.pages.push(Arc::default());
            self.pages.len() - 1
        })
    }

    /// Drops the runs that `keep` refuses.
    pub fn retain(&mut self, mut keep: impl FnMut(Partition, &HeldRun) -> bool) -> Vec<(Partition, HeldRun)> {
        let mut gone = Vec::new();
        for page in &mut self.pages {
            let before = gone.len();
            for (partition, runs) in &page.runs {
                gone.extend(runs.iter().filter(|held| !keep(*partition, held)).map(|held| (*partition, *held)));
            }
            let refused: HashSet<(Partition, Offset)> =
                gone[before..].iter().map(|(partition, held)| (*partition, held.run.base)).collect();
            if refused.is_empty() {
                continue;
            }
            let page = Arc::make_mut(page);
            page.runs.retain(|partition, runs| {
                runs.retain(|held| !refused.contains(&(*partition, held.run.base)));
                !runs.is_empty()
            });
            page.count -= refused.len();
            page.pointer = None;
        }
        if !gone.is_empty() {
            self.tidy();
        }
        gone
    }

    /// Puts the runs of `from` where `to` says: the same batches in another object.
    pub fn replace(&mut self, from: SegmentId, to: &BTreeMap<(Partition, Offset), HeldRun>) {
        for page in &mut self.pages {
            if !page.runs.values().flatten().any(|held| held.object == from) {
                continue;
            }
            let page = Arc::make_mut(page);
            for (partition, runs) in &mut page.runs {
                for held in runs.iter_mut().filter(|held| held.object == from) {
                    if let Some(new) = to.get(&(*partition, held.run.base)) {
                        *held = *new;
                        page.pointer = None;
                    }
                }
            }
        }
    }

    /// Forgets empty pages and says anew which pages a partition is on.
    fn tidy(&mut self) {
        self.pages.retain(|page| !page.runs.is_empty());
        self.homes.clear();
        for (number, page) in self.pages.iter().enumerate() {
            for partition in page.runs.keys() {
                self.homes.entry(*partition).or_default().push(number);
            }
        }
    }

    /// Every object with what is wanted of it.
    pub fn usage(&self) -> BTreeMap<SegmentId, Usage> {
        let mut usage: BTreeMap<SegmentId, Usage> = BTreeMap::new();
        for held in self.pages.iter().flat_map(|page| page.runs.values()).flatten() {
            let entry = usage.entry(held.object).or_default();
            entry.bytes = held.object_bytes;
            entry.live += held.run.length + u64::from(held.run.index_length);
        }
        usage
    }

    /// Every page: where it is stored, or what must be stored.
    pub fn pages(&self) -> impl Iterator<Item = Result<PagePointer, IndexPage>> {
        self.pages.iter().map(|page| page.pointer.ok_or_else(|| page.encode()))
    }

    /// Says where each page is stored now, in the order of [`Index::pages`].
    pub fn stored(&mut self, pointers: &[PagePointer]) {
        for (page, pointer) in self.pages.iter_mut().zip(pointers) {
            if page.pointer != Some(*pointer) {
                Arc::make_mut(page).pointer = Some(*pointer);
            }
        }
    }
}

impl Page {
    fn encode(&self) -> IndexPage {
        let mut stored = IndexPage::default();
        let mut places: HashMap<SegmentId, u32> = HashMap::new();
        for (partition, runs) in &self.runs {
            let mut out = Vec::with_capacity(runs.len());
            for held in runs {
                let place = *places.entry(held.object).or_insert_with(|| {
                    stored.objects.push((held.object, held.object_bytes));
                    stored.objects.len() as u32 - 1
                });
                out.push((place, held.run));
            }
            stored.partitions.push((*partition, out));
        }
        stored
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::name::TopicId;

    fn partition(index: u32) -> Partition {
        Partition { topic: TopicId([7; 16]), index }
    }

    fn held(object: u64, base: Offset) -> HeldRun {
        let object = SegmentId { seq: object, epoch: 1, number: 0, nonce: 0 };
        let run = Run {
            position: 0,
            length: 100,
            index_position: 100,
            index_length: 20,
            base,
            next: base + 10,
            max_timestamp: 0,
            appended_ms: 0,
        };
        HeldRun { object, object_bytes: 500, run }
    }

    /// Stores what changed, and loads everything again.
    fn publish(index: &mut Index, seq: u64) -> (usize, Index) {
        let mut stored = Vec::new();
        let mut written = 0;
        for (number, page) in index.pages().enumerate() {
            match page {
                Ok(pointer) => stored.push((pointer, index.pages[number].encode())),
                Err(page) => {
                    let (bytes, crc) = page.encode();
                    let bytes_len = bytes.len() as u64;
                    let pointer = PagePointer { seq, number: number as u32, nonce: 0, bytes: bytes_len, crc };
                    stored.push((pointer, IndexPage::decode(&bytes, &pointer).unwrap()));
                    written += 1;
                }
            }
        }
        index.stored(&stored.iter().map(|(pointer, _)| *pointer).collect::<Vec<_>>());
        (written, Index::load(stored).unwrap())
    }

    fn all(index: &Index) -> BTreeMap<Partition, Vec<HeldRun>> {
        index.partitions().map(|p| (p, index.runs(p).copied().collect())).collect()
    }

    #[test]
    fn only_pages_that_changed_are_written() {
        let mut index = Index::default();
        for n in 0..1000 {
            index.add(partition(n), held(1, 0));
        }
        let (written, loaded) = publish(&mut index, 1);
        assert_eq!(written, 4, "256 partitions share a page");
        assert_eq!(all(&loaded), all(&index));
        index.add(partition(3), held(2, 10));
        index.add(partition(4), held(2, 10));
        let (written, loaded) = publish(&mut index, 2);
        assert_eq!(written, 1);
        assert_eq!(all(&loaded), all(&index));
        assert_eq!(publish(&mut index, 3).0, 0);
    }

    #[test]
    fn a_long_history_is_not_written_again_and_stays_in_order() {
        let mut index = Index::default();
        for n in 0..10_000 {
            index.add(partition(n % 2), held(n.into(), i64::from(n / 2) * 10));
        }
        assert_eq!(publish(&mut index, 1).0, 3);
        index.add(partition(0), held(10_000, 50_000));
        let (written, loaded) = publish(&mut index, 2);
        assert_eq!(written, 1);
        for index in [&index, &loaded] {
            let bases: Vec<_> = index.runs(partition(0)).map(|held| held.run.base).collect();
            assert!(bases.is_sorted() && bases.len() == 5001);
            assert_eq!(index.at_offset(partition(0), 12_345).unwrap().run.base, 12_340);
            assert_eq!(index.at_offset(partition(0), 50_010), None);
            assert_eq!(index.next(partition(1)), Some(50_000));
        }
    }

    #[test]
    fn what_is_dropped_is_gone_from_its_page_and_its_object() {
        let mut index = Index::default();
        for base in [0, 10, 30] {
            index.add(partition(1), held(base, base as i64));
            index.add(partition(2), held(base, base as i64));
        }
        publish(&mut index, 1);
        let gone = index.retain(|p, held| p == partition(2) || held.run.next > 20);
        assert_eq!(gone.len(), 2);
        let usage: Vec<_> = index.usage().into_values().map(|usage| usage.live).collect();
        assert_eq!(usage, [120, 120, 240]);
        let (written, loaded) = publish(&mut index, 2);
        assert_eq!((written, all(&loaded)), (1, all(&index)));
        assert_eq!(index.at_offset(partition(1), 0).unwrap().run.base, 30, "the hole is stepped over");
        index.retain(|_, _| false);
        assert_eq!((index.pages().count(), index.partitions().count()), (0, 0));
    }

    #[test]
    fn runs_move_to_another_object_in_place() {
        let mut index = Index::default();
        for base in [0, 10, 20] {
            index.add(partition(1), held(base, base as i64));
        }
        publish(&mut index, 1);
        let new = held(99, 10);
        index.replace(held(10, 10).object, &BTreeMap::from([((partition(1), 10), new)]));
        assert_eq!(index.at_offset(partition(1), 15), Some(new));
        let bases: Vec<_> = index.runs(partition(1)).map(|held| held.run.base).collect();
        assert_eq!(bases, [0, 10, 20]);
        assert_eq!(publish(&mut index, 2).0, 1);
    }
}
