//! The segment index in memory: which runs a partition has, which page says so, and which pages changed.
//!
//! Pages follow each other in time: the last one takes new runs of whatever partitions until it is full, then the next
//! begins. So a round writes as many pages as its runs fill, however many partitions there are; a full page changes only
//! when a run leaves it, and old pages empty together. A partition's runs ascend within a page and from page to page.
//!
//! Pages are immutable here too and shared between copies of the index: a copy costs what the lists of pages cost.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use shared::name::{Offset, Partition, TimestampMs};

use super::{IndexPage, ManifestError, PagePointer, SegmentId};
use crate::envelope::HEAD_BYTES;
use crate::segment::{DIRECTORY_ENTRY_BYTES, Run, TRAILER_BYTES};

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

impl HeldRun {
    /// What the run takes in its object: batches, index and directory entry.
    pub fn bytes(&self) -> u64 {
        self.run.length + u64::from(self.run.index_length) + DIRECTORY_ENTRY_BYTES as u64
    }
}

/// How much of an object is still wanted, and what it is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Size of the object.
    pub bytes: u64,
    /// Bytes that the runs take that the index names, each with its index and directory entry.
    pub live: u64,
    /// Runs that the index names.
    pub runs: u32,
    /// When the newest block of its runs was appended.
    pub newest_ms: TimestampMs,
    /// One of the partitions that are or were in it.
    pub sample: Partition,
}

impl Usage {
    /// Whether most of the object is of no use any more.
    pub fn is_mostly_dead(&self) -> bool {
        (self.live + (HEAD_BYTES + TRAILER_BYTES) as u64) * 2 < self.bytes
    }
}

/// All runs of a shard. Copies share what is the same.
#[derive(Debug, Clone, Default)]
pub struct Index {
    pages: Vec<Slot>,
    /// The pages that name runs of a partition, ascending in offset.
    homes: Arc<HashMap<Partition, Vec<u32>>>,
    objects: Arc<HashMap<SegmentId, Usage>>,
}

/// A page and where it is stored; `None` when that is still to be done.
#[derive(Debug, Clone)]
struct Slot {
    pointer: Option<PagePointer>,
    page: Arc<Page>,
}

#[derive(Debug, Default)]
struct Page {
    /// Objects and their sizes.
    objects: Box<[(SegmentId, u64)]>,
    /// By partition and offset.
    runs: Box<[Packed]>,
}

/// A run in little space: a million of them are kept.
#[derive(Debug, Clone, Copy)]
struct Packed {
    partition: Partition,
    /// Place in the page's objects.
    object: u32,
    position: u32,
    length: u32,
    index_position: u32,
    index_length: u32,
    base: Offset,
    next: Offset,
    max_timestamp: TimestampMs,
    appended_ms: TimestampMs,
}

impl Index {
    /// Puts the pages of a root together.
    pub fn load(pages: impl IntoIterator<Item = (PagePointer, IndexPage)>) -> Result<Self, ManifestError> {
        let mut index = Self::default();
        for (pointer, stored) in pages {
            let mut found = Vec::new();
            let mut named = HashSet::new();
            for (partition, runs) in stored.partitions {
                if !named.insert(partition) {
                    return Err(ManifestError::Damaged("a page names a partition twice"));
                }
                let mut next = index.next(partition).unwrap_or(0);
                for (place, run) in runs {
                    let object = stored.objects.get(place as usize);
                    let &(object, object_bytes) = object.ok_or(ManifestError::Damaged("a run names no object"))?;
                    let end = run.index_position.checked_add(u64::from(run.index_length));
                    let inside = run.position.checked_add(run.length).is_some_and(|end| end <= run.index_position);
                    if !inside || end.is_none_or(|end| end > object_bytes) || run.base < next || run.next <= run.base {
                        return Err(ManifestError::Damaged("a run contradicts its object or its neighbour"));
                    }
                    next = run.next;
                    found.push((partition, HeldRun { object, object_bytes, run }));
                }
            }
            found.sort_unstable_by_key(|(partition, held)| (*partition, held.run.base));
            index.count_in(&found);
            let page = Arc::new(Page::new(&found)?);
            index.settle(index.pages.len(), &page);
            index.pages.push(Slot { pointer: Some(pointer), page });
        }
        Ok(index)
    }

    /// The partition's runs, ascending.
    pub fn runs(&self, partition: Partition) -> impl DoubleEndedIterator<Item = HeldRun> {
        self.pages_of(partition).flat_map(move |page| page.of(partition).iter().map(move |packed| page.held(packed)))
    }

    fn pages_of(&self, partition: Partition) -> impl DoubleEndedIterator<Item = &Page> {
        self.homes_of(partition).iter().filter_map(|number| self.page(*number))
    }

    fn homes_of(&self, partition: Partition) -> &[u32] {
        self.homes.get(&partition).map(Vec::as_slice).unwrap_or_default()
    }

    fn page(&self, number: u32) -> Option<&Page> {
        self.pages.get(number as usize).map(|slot| &*slot.page)
    }

    /// The run that holds `from`, or the first one after it.
    pub fn at_offset(&self, partition: Partition, from: Offset) -> Option<HeldRun> {
        let page = self.page(self.home_at(partition, from)?)?;
        let runs = page.of(partition);
        runs.get(runs.partition_point(|packed| packed.next <= from)).map(|packed| page.held(packed))
    }

    /// The page with the run that holds `from`, or the first one after it.
    fn home_at(&self, partition: Partition, from: Offset) -> Option<u32> {
        let homes = self.homes_of(partition);
        let ends_before = |number: &u32| {
            let page = self.page(*number);
            page.and_then(|page| page.of(partition).last()).is_none_or(|last| last.next <= from)
        };
        homes.get(homes.partition_point(ends_before)).copied()
    }

    /// The partition's first run.
    pub fn first(&self, partition: Partition) -> Option<HeldRun> {
        self.runs(partition).next()
    }

    /// The offset after the partition's last archived record.
    pub fn next(&self, partition: Partition) -> Option<Offset> {
        self.runs(partition).next_back().map(|held| held.run.next)
    }

    /// Partitions that have runs.
    pub fn partitions(&self) -> impl Iterator<Item = Partition> {
        self.homes.keys().copied()
    }

    /// Every object with what is wanted of it.
    pub fn usage(&self) -> &HashMap<SegmentId, Usage> {
        &self.objects
    }

    /// The runs that lie in `objects`, by partition and offset.
    pub fn runs_in(&self, objects: &BTreeSet<SegmentId>) -> Vec<(Partition, HeldRun)> {
        let mut found = Vec::new();
        for Slot { page, .. } in &self.pages {
            let wanted: Vec<bool> = page.objects.iter().map(|(object, _)| objects.contains(object)).collect();
            if wanted.contains(&true) {
                let runs = page.runs.iter().filter(|packed| wanted.get(packed.object as usize) == Some(&true));
                found.extend(runs.map(|packed| (packed.partition, page.held(packed))));
            }
        }
        found.sort_unstable_by_key(|(partition, held)| (*partition, held.run.base));
        found
    }

    /// Adds runs, each of them its partition's next one.
    pub fn extend(&mut self, mut new: Vec<(Partition, HeldRun)>) -> Result<(), ManifestError> {
        new.sort_by_key(|(partition, held)| (*partition, held.run.base));
        self.count_in(&new);
        let mut rest = new.as_slice();
        // The last page is after every other one: what is newer than everything can be there.
        if let Some(last) = self.pages.last_mut()
            && last.page.runs.len() < PAGE_RUNS_MAX
        {
            let room = PAGE_RUNS_MAX - last.page.runs.len();
            let (now, later) = rest.split_at(room.min(rest.len()));
            let mut runs = last.page.all();
            runs.extend_from_slice(now);
            *last = Slot::new(runs)?;
            let page = last.page.clone();
            self.settle(self.pages.len() - 1, &page);
            rest = later;
        }
        for chunk in rest.chunks(PAGE_RUNS_MAX) {
            let slot = Slot::new(chunk.to_vec())?;
            self.settle(self.pages.len(), &slot.page);
            self.pages.push(slot);
        }
        Ok(())
    }

    /// Takes runs out and puts others where they were: the same batches in other objects, or none.
    pub fn replace(
        &mut self,
        old: &[(Partition, HeldRun)],
        new: Vec<(Partition, HeldRun)>,
    ) -> Result<(), ManifestError> {
        let mut affected: BTreeSet<u32> = BTreeSet::new();
        for (partition, held) in old {
            affected.extend(self.home_at(*partition, held.run.base));
        }
        let (Some(first), Some(last)) = (affected.first().copied(), affected.last().copied()) else { return Ok(()) };
        self.count_out(old);
        self.count_in(&new);
        let gone: HashSet<(Partition, Offset)> =
            old.iter().map(|(partition, held)| (*partition, held.run.base)).collect();
        let kept = |page: &Page| {
            let mut runs = page.all();
            runs.retain(|(partition, held)| !gone.contains(&(*partition, held.run.base)));
            runs
        };
        if new.is_empty() {
            let affected = self.pages.iter_mut().enumerate().filter(|(at, _)| affected.contains(&(*at as u32)));
            for (_, slot) in affected {
                *slot = Slot::new(kept(&slot.page))?;
            }
        } else {
            // A new run may span what lies on several pages, with runs of its partition on pages between them: all are
            // laid out anew, or they would not ascend from page to page.
            let range = first as usize..last as usize + 1;
            let runs = self.pages[range.clone()].iter().flat_map(|slot| kept(&slot.page)).collect();
            let mut slots = Vec::new();
            for layer in layers(runs, old, new) {
                let pages = layer.len().div_ceil(PAGE_RUNS_MAX).max(1);
                for chunk in layer.chunks(layer.len().div_ceil(pages).max(1)) {
                    slots.push(Slot::new(chunk.to_vec())?);
                }
            }
            self.pages.splice(range, slots);
        }
        self.tidy()
    }

    /// Forgets empty pages, joins small ones, and says anew which pages a partition is on.
    fn tidy(&mut self) -> Result<(), ManifestError> {
        let mut pages: Vec<Slot> = Vec::with_capacity(self.pages.len());
        for slot in self.pages.drain(..).filter(|slot| !slot.page.runs.is_empty()) {
            match pages.last_mut() {
                Some(last) if last.page.runs.len() + slot.page.runs.len() <= PAGE_RUNS_MAX / 2 => {
                    let mut runs = last.page.all();
                    runs.extend(slot.page.all());
                    *last = Slot::new(runs)?;
                }
                _ => pages.push(slot),
            }
        }
        self.homes = Arc::default();
        for (number, slot) in pages.iter().enumerate() {
            self.settle(number, &slot.page);
        }
        self.pages = pages;
        Ok(())
    }

    /// Says that the partitions of `page` are on page `number`, the last one so far.
    fn settle(&mut self, number: usize, page: &Page) {
        let homes = Arc::make_mut(&mut self.homes);
        let number = number as u32;
        for same in page.runs.chunk_by(|a, b| a.partition == b.partition) {
            let Some(first) = same.first() else { continue };
            let homes = homes.entry(first.partition).or_default();
            if homes.last() != Some(&number) {
                homes.push(number);
            }
        }
    }

    fn count_in(&mut self, new: &[(Partition, HeldRun)]) {
        let objects = Arc::make_mut(&mut self.objects);
        for (partition, held) in new {
            let nothing =
                Usage { bytes: held.object_bytes, live: 0, runs: 0, newest_ms: TimestampMs::MIN, sample: *partition };
            let usage = objects.entry(held.object).or_insert(nothing);
            usage.live += held.bytes();
            usage.runs += 1;
            usage.newest_ms = usage.newest_ms.max(held.run.appended_ms);
        }
    }

    fn count_out(&mut self, old: &[(Partition, HeldRun)]) {
        let objects = Arc::make_mut(&mut self.objects);
        for (_, held) in old {
            let Some(usage) = objects.get_mut(&held.object) else { continue };
            usage.live = usage.live.saturating_sub(held.bytes());
            usage.runs = usage.runs.saturating_sub(1);
            if usage.runs == 0 {
                objects.remove(&held.object);
            }
        }
    }

    /// Every page: where it is stored, or what must be stored.
    pub fn pages(&self) -> impl Iterator<Item = Result<PagePointer, IndexPage>> {
        self.pages.iter().map(|slot| slot.pointer.ok_or_else(|| slot.page.encode()))
    }

    /// Says where each page is stored now, in the order of [`Index::pages`].
    pub fn stored(&mut self, pointers: &[PagePointer]) {
        for (slot, pointer) in self.pages.iter_mut().zip(pointers) {
            slot.pointer = Some(*pointer);
        }
    }

    /// How many runs there are.
    pub fn run_count(&self) -> usize {
        self.pages.iter().map(|slot| slot.page.runs.len()).sum()
    }

    /// What it takes in memory: the sizes of what it holds, and a byte of control for each place in a hash table.
    pub fn memory_bytes(&self) -> usize {
        let page = |slot: &Slot| {
            size_of::<Slot>() + size_of::<Page>() + size_of_val(&*slot.page.runs) + size_of_val(&*slot.page.objects)
        };
        let table = |places: usize, entry: usize| places * 8 / 7 * (entry + 1);
        let homes = self.homes.values().map(|numbers| numbers.capacity() * size_of::<u32>()).sum::<usize>();
        self.pages.iter().map(page).sum::<usize>()
            + homes
            + table(self.homes.capacity(), size_of::<(Partition, Vec<u32>)>())
            + table(self.objects.capacity(), size_of::<(SegmentId, Usage)>())
    }
}

/// Runs of adjacent pages and the new ones among them, for pages in three layers: what is before the time of the old
/// runs, what is within it, what is after it. Mixed, each change would touch the pages of the one before.
fn layers(
    kept: Vec<(Partition, HeldRun)>,
    old: &[(Partition, HeldRun)],
    new: Vec<(Partition, HeldRun)>,
) -> [Vec<(Partition, HeldRun)>; 3] {
    let times = || old.iter().map(|(_, held)| held.run.appended_ms);
    let (from, to) = (times().min().unwrap_or(0), times().max().unwrap_or(0));
    let kept = kept.into_iter().map(|(partition, held)| (partition, held, false));
    let new = new.into_iter().map(|(partition, held)| (partition, held, true));
    let mut runs: Vec<(Partition, HeldRun, bool)> = kept.chain(new).collect();
    runs.sort_unstable_by_key(|(partition, held, _)| (*partition, held.run.base));
    let mut layers = [Vec::new(), Vec::new(), Vec::new()];
    for same in runs.chunk_by(|a, b| a.0 == b.0) {
        let last_new = same.iter().rposition(|(_, _, new)| *new);
        let mut layer = 0;
        for (at, (partition, held, new)) in same.iter().enumerate() {
            let wanted = match held.run.appended_ms {
                _ if *new => 1,
                time if time < from => 0,
                time if time > to => 2,
                _ => 1,
            };
            // A partition's runs ascend from layer to layer, whatever the clock did.
            let most = if last_new.is_some_and(|last| at < last) { 1 } else { 2 };
            layer = wanted.clamp(layer, most);
            layers[layer].push((*partition, *held));
        }
    }
    layers
}

impl Slot {
    fn new(mut runs: Vec<(Partition, HeldRun)>) -> Result<Self, ManifestError> {
        runs.sort_unstable_by_key(|(partition, held)| (*partition, held.run.base));
        Ok(Self { pointer: None, page: Arc::new(Page::new(&runs)?) })
    }
}

impl Page {
    /// A page of `runs`, which are in order.
    fn new(runs: &[(Partition, HeldRun)]) -> Result<Self, ManifestError> {
        let mut objects = Vec::new();
        let mut places: HashMap<SegmentId, u32> = HashMap::new();
        let mut packed = Vec::with_capacity(runs.len());
        for (partition, held) in runs {
            let object = *places.entry(held.object).or_insert_with(|| {
                objects.push((held.object, held.object_bytes));
                objects.len() as u32 - 1
            });
            packed.push(Packed::new(*partition, object, &held.run)?);
        }
        Ok(Self { objects: objects.into(), runs: packed.into() })
    }

    fn of(&self, partition: Partition) -> &[Packed] {
        let start = self.runs.partition_point(|packed| packed.partition < partition);
        let rest = self.runs.get(start..).unwrap_or_default();
        rest.get(..rest.partition_point(|packed| packed.partition == partition)).unwrap_or_default()
    }

    fn held(&self, packed: &Packed) -> HeldRun {
        let (object, object_bytes) = self.objects[packed.object as usize];
        HeldRun { object, object_bytes, run: packed.run() }
    }

    fn all(&self) -> Vec<(Partition, HeldRun)> {
        self.runs.iter().map(|packed| (packed.partition, self.held(packed))).collect()
    }

    fn encode(&self) -> IndexPage {
        let partitions = self.runs.chunk_by(|a, b| a.partition == b.partition).filter_map(|same| {
            let runs = same.iter().map(|packed| (packed.object, packed.run())).collect();
            Some((same.first()?.partition, runs))
        });
        IndexPage { objects: self.objects.to_vec(), partitions: partitions.collect() }
    }
}

impl Packed {
    fn new(partition: Partition, object: u32, run: &Run) -> Result<Self, ManifestError> {
        let small = |number: u64| {
            u32::try_from(number).map_err(|_| ManifestError::Damaged("a run lies beyond 4 GiB of its object"))
        };
        Ok(Self {
            partition,
            object,
            position: small(run.position)?,
            length: small(run.length)?,
            index_position: small(run.index_position)?,
            index_length: run.index_length,
            base: run.base,
            next: run.next,
            max_timestamp: run.max_timestamp,
            appended_ms: run.appended_ms,
        })
    }

    fn run(&self) -> Run {
        Run {
            position: self.position.into(),
            length: self.length.into(),
            index_position: self.index_position.into(),
            index_length: self.index_length,
            base: self.base,
            next: self.next,
            max_timestamp: self.max_timestamp,
            appended_ms: self.appended_ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::name::TopicId;
    use std::collections::BTreeMap;

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
                Ok(pointer) => stored.push((pointer, index.pages[number].page.encode())),
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
        index.partitions().map(|p| (p, index.runs(p).collect())).collect()
    }

    /// One run each for partitions `which`, in object `object`.
    fn round(which: std::ops::Range<u32>, object: u64, base: Offset) -> Vec<(Partition, HeldRun)> {
        which.map(|n| (partition(n), held(object, base))).collect()
    }

    #[test]
    fn a_round_writes_as_many_pages_as_its_runs_fill() {
        let mut index = Index::default();
        for hour in 0..20u64 {
            index.extend(round(0..1000, hour, hour as i64 * 10)).unwrap();
            let (written, loaded) = publish(&mut index, hour);
            assert!(written <= 2, "{written} pages for 1000 runs");
            assert_eq!(all(&loaded), all(&index));
            assert_eq!(loaded.usage(), index.usage());
        }
        assert_eq!(index.pages().count(), 5, "20,000 runs, 4096 in each");
        assert_eq!(publish(&mut index, 30).0, 0);
    }

    #[test]
    fn a_long_history_is_not_written_again_and_stays_in_order() {
        let mut index = Index::default();
        for hundred in 0..50u64 {
            let rounds = (hundred * 100..hundred * 100 + 100).flat_map(|n| round(0..2, n, n as i64 * 10));
            index.extend(rounds.collect()).unwrap();
        }
        assert_eq!(publish(&mut index, 1).0, 3);
        index.extend(round(0..1, 10_000, 50_000)).unwrap();
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
            index.extend(round(1..3, base, base as i64)).unwrap();
        }
        publish(&mut index, 1);
        let gone: Vec<_> = index.runs(partition(1)).filter(|held| held.run.next <= 20).collect();
        index.replace(&gone.iter().map(|held| (partition(1), *held)).collect::<Vec<_>>(), Vec::new()).unwrap();
        let usage: BTreeMap<_, _> =
            index.usage().iter().map(|(id, usage)| (id.seq, (usage.live, usage.runs))).collect();
        assert_eq!(usage, BTreeMap::from([(0, (200, 1)), (10, (200, 1)), (30, (400, 2))]));
        let (written, loaded) = publish(&mut index, 2);
        assert_eq!((written, all(&loaded)), (1, all(&index)));
        assert_eq!(index.at_offset(partition(1), 0).unwrap().run.base, 30, "the hole is stepped over");
        let rest: Vec<_> =
            all(&index).into_iter().flat_map(|(p, runs)| runs.into_iter().map(move |r| (p, r))).collect();
        index.replace(&rest, Vec::new()).unwrap();
        assert_eq!((index.pages().count(), index.partitions().count(), index.usage().len()), (0, 0, 0));
    }

    #[test]
    fn runs_of_many_pages_become_one_in_place() {
        let mut index = Index::default();
        for hour in 0..9u64 {
            index.extend(round(0..2000, hour, hour as i64 * 10)).unwrap();
        }
        publish(&mut index, 1);
        let before = all(&index);
        // Hours 2 to 5 become one run for each partition but the last, whose run of hour 4 stays where it is.
        let sources: BTreeSet<SegmentId> = (2..6).map(|hour| held(hour, 0).object).collect();
        let mut old = index.runs_in(&sources);
        assert_eq!(old.len(), 8000);
        old.retain(|(p, held)| *p != partition(1999) || held.object.seq != 4);
        let merged = |object, from: u64, to: u64| {
            let held = held(object, from as i64 * 10);
            HeldRun { run: Run { next: to as i64 * 10, ..held.run }, ..held }
        };
        let mut new: Vec<_> = (0..1999).map(|n| (partition(n), merged(100, 2, 6))).collect();
        new.extend([(partition(1999), merged(100, 2, 4)), (partition(1999), merged(100, 5, 6))]);
        index.replace(&old, new).unwrap();
        let (_, loaded) = publish(&mut index, 2);
        assert_eq!(all(&loaded), all(&index));
        let spans = |index: &Index, n| index.runs(partition(n)).map(|h| (h.run.base, h.run.next)).collect::<Vec<_>>();
        for n in [0, 77, 1998] {
            assert_eq!(spans(&index, n), [(0, 10), (10, 20), (20, 60), (60, 70), (70, 80), (80, 90)]);
        }
        let last = [(0, 10), (10, 20), (20, 40), (40, 50), (50, 60), (60, 70), (70, 80), (80, 90)];
        assert_eq!(spans(&index, 1999), last);
        assert_eq!(index.at_offset(partition(5), 35).unwrap().object.seq, 100);
        assert_eq!(before[&partition(5)][8], all(&index)[&partition(5)][5], "what is not touched stays");
        assert_eq!(index.usage().len(), 7, "six objects are whole, of one a single run is left");
        assert_eq!(index.run_count(), index.usage().values().map(|usage| usage.runs as usize).sum::<usize>());
    }

    #[test]
    fn what_was_merged_lies_apart_from_what_came_since() {
        let at = |object, base: Offset| {
            let held = held(object, base);
            HeldRun { run: Run { appended_ms: base, ..held.run }, ..held }
        };
        let mut index = Index::default();
        let mut base = 0;
        let mut most = 0;
        let mut write = |index: &mut Index| {
            let pointer = PagePointer { seq: 0, number: 0, nonce: 0, bytes: 0, crc: 0 };
            most = most.max(index.pages().filter(Result::is_err).count());
            index.stored(&vec![pointer; index.pages.len()]);
        };
        for hour in 0..8u64 {
            for round in 0..6 {
                index.extend((0..5000).map(|n| (partition(n), at(hour * 10 + round, base))).collect()).unwrap();
                base += 10;
                write(&mut index);
                // The hour before is merged when the next one has begun.
                if round == 0 && hour > 0 {
                    let sources = (0..6).map(|round| at((hour - 1) * 10 + round, 0).object).collect();
                    let old = index.runs_in(&sources);
                    let merged = at(1000 + hour, base - 70);
                    let run = Run { next: base - 10, appended_ms: base - 20, ..merged.run };
                    let new = (0..5000).map(|n| (partition(n), HeldRun { run, ..merged })).collect();
                    index.replace(&old, new).unwrap();
                    write(&mut index);
                }
            }
        }
        assert!(most <= 6, "{most} pages at a time, whatever lies before them");
        assert!(all(&index).values().all(|runs| runs.is_sorted_by_key(|held| held.run.base) && runs.len() == 7 + 6));
        publish(&mut index, 1);
    }

    #[test]
    fn pages_that_became_small_are_joined() {
        let mut index = Index::default();
        for hour in 0..10u64 {
            index.extend(round(0..4096, hour, hour as i64 * 10)).unwrap();
        }
        assert_eq!(index.pages().count(), 10);
        let most: Vec<_> = all(&index)
            .into_iter()
            .filter(|(p, _)| p.index >= 100)
            .flat_map(|(p, runs)| runs.into_iter().map(move |run| (p, run)))
            .collect();
        index.replace(&most, Vec::new()).unwrap();
        assert_eq!((index.pages().count(), index.run_count()), (1, 1000));
        assert_eq!(publish(&mut index, 1).1.runs(partition(99)).count(), 10);
    }

    #[test]
    fn a_run_takes_about_eighty_bytes() {
        assert_eq!(size_of::<Packed>(), 72);
        let mut index = Index::default();
        for hour in 0..100u64 {
            index.extend(round(0..2000, hour, hour as i64 * 10)).unwrap();
        }
        let per_run = index.memory_bytes() / index.run_count();
        assert!((72..84).contains(&per_run), "{per_run}");
    }

    /// An archive of 1 TiB: 200 busy partitions in segments of 64 MiB, and 9,800 partitions of one record a minute for 90
    /// days, merged: a run for each day, each hour since midnight and each round since the last one.
    #[test]
    #[ignore = "for the figures in docs/benchmarks.md: a minute"]
    fn the_index_of_a_terabyte() {
        const MIB: u64 = 1 << 20;
        let mut index = Index::default();
        let mut number = 0;
        let mut object = |bytes: u64| {
            number += 1;
            (SegmentId { seq: number, epoch: 1, number: 0, nonce: number }, bytes)
        };
        let mut total = 0;
        let mut run =
            |(object, object_bytes): (SegmentId, u64), position: u64, length: u64, base: i64, records: i64| {
                total += length;
                let next = base + records;
                let (index_position, index_length) = (object_bytes - 1000, 500);
                let appended_ms = 1_700_000_000_000 + next * 60_000;
                let max_timestamp = appended_ms;
                let run =
                    Run { position, length, index_position, index_length, base, next, max_timestamp, appended_ms };
                HeldRun { object, object_bytes, run }
            };
        let topic = |n: u32| Partition { topic: TopicId([n as u8 / 50; 16]), index: n };
        let quiet_bytes = 170;
        let minutes: Vec<i64> = [vec![1440; 90], vec![60; 23], vec![10; 5]].concat();
        let mut base = 0;
        for (round, minutes) in minutes.into_iter().enumerate() {
            let mut new = Vec::new();
            // Their segments come evenly: 800 GiB in all.
            for busy in 0..(12_800 / 118) {
                let at = object(64 * MIB);
                let nth = (round * (12_800 / 118) + busy) as i64 / 200;
                new.push((
                    topic((round * (12_800 / 118) + busy) as u32 % 200),
                    run(at, 0, 63 * MIB, nth * 400_000, 400_000),
                ));
            }
            let length = minutes as u64 * quiet_bytes;
            let per_object = (63 * MIB / length).clamp(1, 9_800);
            let mut at = object(64 * MIB);
            for quiet in 0..9_800u64 {
                if quiet % per_object == 0 {
                    at = object(64 * MIB);
                }
                new.push((topic(200 + quiet as u32), run(at, quiet % per_object * length, length, base, minutes)));
            }
            base += minutes;
            index.extend(new).unwrap();
        }
        let pages: Vec<(PagePointer, bytes::Bytes)> = index
            .pages()
            .enumerate()
            .map(|(number, page)| {
                let (bytes, crc) = page.unwrap_err().encode();
                let bytes_len = bytes.len() as u64;
                (PagePointer { seq: 1, number: number as u32, nonce: 0, bytes: bytes_len, crc }, bytes)
            })
            .collect();
        let stored: usize = pages.iter().map(|(_, bytes)| bytes.len()).sum();
        let (runs, objects) = (index.run_count(), index.usage().len());
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
            statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
        };
        let before = resident();
        let start = std::time::Instant::now();
        let load =
            |(pointer, bytes): &(PagePointer, bytes::Bytes)| (*pointer, IndexPage::decode(bytes, pointer).unwrap());
        let loaded_index = Index::load(pages.iter().map(load)).unwrap();
        let loaded = start.elapsed();
        let memory = loaded_index.memory_bytes();
        println!(
            "{:.2} TiB in {objects} objects, {runs} runs of {} partitions",
            total as f64 / (1u64 << 40) as f64,
            index.partitions().count()
        );
        println!("stored: {} pages, {:.1} MB", pages.len(), stored as f64 / 1e6);
        println!(
            "in memory: {:.1} MB, {} bytes per run; the process grew by {:.1} MB",
            memory as f64 / 1e6,
            memory / runs,
            resident().saturating_sub(before) as f64 / 1e6
        );
        println!("loaded in {loaded:?}, decoding and checksums included");
        let start = std::time::Instant::now();
        let copy = loaded_index.clone();
        println!("a copy: {:?}", start.elapsed());
        let start = std::time::Instant::now();
        let found = (0..10_000).filter(|n| copy.at_offset(topic(*n), 100_000).is_some()).count();
        println!("10,000 lookups by offset: {:?}", start.elapsed());
        let start = std::time::Instant::now();
        let seen: usize = (0..10_000).map(|n| copy.runs(topic(n)).count()).sum();
        println!("every run of 10,000 partitions: {:?}", start.elapsed());
        assert_eq!((found, seen), (10_000, runs));
        assert!(memory < 110_000_000, "{memory}");
    }
}
