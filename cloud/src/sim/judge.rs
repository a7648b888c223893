//! The judge: what was acknowledged to whom, what anybody ever read, and whether it all agrees.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;
use shared::batch::Batch;
use shared::log::Read;
use shared::name::{Offset, Partition, TopicId};

use super::node::{MANY, Up, produced, streamed};
use super::world::{MEMORY, World};
use super::{fail, note};

/// Offsets left out when a shard was restored.
const SKIPPED: i64 = 1 << 32;

/// How often in a row that may be.
const SKIPS_MAX: i64 = 64;

/// Where gaps are listed that edges declare.
pub const GAPS: Partition = Partition { topic: TopicId([250; 16]), index: 0 };

/// Everything that was promised.
#[derive(Clone, Default)]
pub struct Judge(Arc<Mutex<Books>>);

#[derive(Default)]
struct Books {
    partitions: BTreeMap<Partition, Book>,
    /// Shards that may have lost what was not shipped.
    restored: BTreeMap<u32, u32>,
    /// Records that an edge said it sends again.
    twice: BTreeSet<u64>,
    /// Records that edges hold or have deleted as safe.
    held: BTreeSet<u64>,
}

#[derive(Default)]
struct Book {
    /// What was seen where, ever: never another record at the same offset.
    seen: BTreeMap<Offset, u64>,
    /// Acknowledged to the producer.
    acknowledged: BTreeMap<u64, Offset>,
    /// Acknowledged or seen, and possibly gone with a disk.
    excused: BTreeSet<u64>,
    /// Where the bucket ended when a disk was lost: of what follows, answers may still be under way.
    ends: Vec<Offset>,
    /// Lives of a memory shard below this are over, and what they acknowledged with them.
    begins: Offset,
    /// Offsets that were used after a copy of the disk was made that nobody could tell from the newest when it was put back.
    blind: Option<(Offset, Offset)>,
}

/// The number that a record's value begins with: unique in its world. Control records have none.
pub fn mark(value: &[u8]) -> Option<u64> {
    value.first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes))
}

fn batches(read: &Read) -> Vec<Batch> {
    let mut all = Vec::new();
    for slice in &read.batches {
        let mut slice = slice.clone();
        loop {
            match Batch::split_first(&mut slice) {
                Ok(Some(batch)) => all.push(batch),
                Ok(None) => break,
                Err(error) => {
                    fail(format!("a read returned what is no batch: {error}"));
                    break;
                }
            }
        }
    }
    all
}

impl Judge {
    /// A producer was told that its records lie there.
    pub fn acknowledged(&self, partition: Partition, marks: &[u64], base: Offset) {
        let mut books = self.0.lock();
        let book = books.partitions.entry(partition).or_default();
        for (mark, offset) in marks.iter().zip(base..) {
            book.acknowledged.insert(*mark, offset);
            book.see(partition, offset, *mark);
        }
    }

    /// A shard's disk is gone: what its bucket does not have may be lost.
    pub fn disk_lost(&self, world: &World, shard: u32) {
        let mut books = self.0.lock();
        for partition in [produced(shard), streamed(shard)] {
            let shipped = world.bucket().shipped(shard, partition);
            let book = books.partitions.entry(partition).or_default();
            let gone: Vec<u64> = book.seen.range(shipped..).map(|(_, mark)| *mark).collect();
            book.excused.extend(gone);
            book.ends.push(shipped);
        }
    }

    /// A file shard goes on with an older copy of its disk, which ends at `held`, and its bucket has nothing that the copy
    /// has not: what came after the copy is lost, and nobody can know.
    pub fn set_back(&self, shard: u32, held: &BTreeMap<Partition, Offset>) {
        let mut books = self.0.lock();
        for partition in [produced(shard), streamed(shard)] {
            let book = books.partitions.entry(partition).or_default();
            let from = held.get(&partition).copied().unwrap_or(0);
            // What was on its way then may still be heard of.
            let to = book.seen.last_key_value().map_or(from, |(last, _)| last + 1).max(from) + 1000;
            let gone: Vec<u64> = book.seen.range(from..).map(|(_, mark)| *mark).collect();
            book.excused.extend(gone);
            let (from, to) = book.blind.map_or((from, to), |blind| (blind.0.min(from), blind.1.max(to)));
            book.blind = Some((from, to));
        }
        if shard == MANY {
            // The catalogue, which has forgotten what it reserved for the memory shard.
            for partition in [produced(MEMORY), streamed(MEMORY)] {
                let book = books.partitions.entry(partition).or_default();
                let end = book.seen.last_key_value().map_or(0, |(last, _)| last + 1).max(book.begins);
                book.blind = Some((0, end + 1000));
                book.begins = 0;
                let gone: Vec<u64> = book.seen.values().copied().collect();
                book.excused.extend(gone);
            }
        }
        *books.restored.entry(shard).or_default() += 1;
    }

    /// A memory shard begins a new life at this offset.
    pub fn begins_anew(&self, shard: u32, at: Offset) {
        let mut books = self.0.lock();
        for partition in [produced(shard), streamed(shard)] {
            let book = books.partitions.entry(partition).or_default();
            if at < book.begins {
                fail(format!("{partition}: a new life begins at {at}, the one before at {}", book.begins));
            }
            book.begins = at;
        }
    }

    /// A shard has begun a new epoch with what its bucket had.
    pub fn restored(&self, shard: u32) {
        *self.0.lock().restored.entry(shard).or_default() += 1;
    }

    pub fn was_restored(&self, shard: u32) -> bool {
        self.0.lock().restored.contains_key(&shard)
    }

    /// A record is durable at an edge.
    pub fn held(&self, mark: u64) {
        self.0.lock().held.insert(mark);
    }

    /// Records went with an edge's disk before anybody else had them.
    pub fn let_go(&self, marks: impl IntoIterator<Item = u64>) {
        let mut books = self.0.lock();
        for mark in marks {
            books.held.remove(&mark);
        }
    }

    /// An edge reports that it sends records again under another incarnation.
    pub fn twice(&self, marks: impl IntoIterator<Item = u64>) {
        self.0.lock().twice.extend(marks);
    }

    /// Somebody read this. Returns the marks of the records, in order.
    pub fn read(&self, shard: u32, partition: Partition, from: Offset, read: &Read) -> Vec<(Offset, u64)> {
        let mut books = self.0.lock();
        let may_skip = books.restored.contains_key(&shard);
        let book = books.partitions.entry(partition).or_default();
        let (mut expected, mut found) = (from, Vec::new());
        for batch in batches(read) {
            let (base, next) = (batch.base_offset(), batch.last_offset() + 1);
            if base > expected && !(may_skip && base - expected <= SKIPS_MAX * SKIPPED) {
                fail(format!("{partition}: offsets {expected} .. {base} are missing, read from {from}"));
            }
            if next <= expected {
                fail(format!("{partition}: {base} .. {next} where {expected} was expected, read from {from}"));
            }
            expected = next;
            if next > read.bounds.high_watermark {
                fail(format!("{partition}: read to {next}, above {}", read.bounds.high_watermark));
            }
            if batch.is_control() {
                continue;
            }
            let records = match batch.records(1 << 20) {
                Ok(records) => records,
                Err(error) => {
                    fail(format!("{partition} {base}: {error}"));
                    continue;
                }
            };
            for record in records.flatten() {
                // Stored batches carry their offsets in the header; the edge's own lie in what it sealed.
                let offset = record.offset;
                match record.value.as_deref().and_then(mark) {
                    Some(mark) => {
                        book.see(partition, offset, mark);
                        found.push((offset, mark));
                    }
                    None => fail(format!("{partition} {offset}: a record that nobody wrote")),
                }
            }
        }
        if read.next != expected {
            fail(format!("{partition}: read from {from} says {} is next, not {expected}", read.next));
        }
        found
    }

    /// Everything of a partition, as a node that has just started gives it, against everything that was promised.
    pub async fn last_word(&self, world: &World, shard: u32, up: &Up, partition: Partition) {
        let Some(found) = self.read_all(world, shard, up, partition).await else { return };
        let books = self.0.lock();
        let empty = Book::default();
        let book = books.partitions.get(&partition).unwrap_or(&empty);
        let at: BTreeMap<Offset, u64> = found.iter().copied().collect();
        let mut times: BTreeMap<u64, u32> = BTreeMap::new();
        found.iter().for_each(|(_, mark)| *times.entry(*mark).or_default() += 1);
        let mut problems = Vec::new();
        let begins = if shard == MEMORY { up.log.bounds(partition).map_or(0, |bounds| bounds.log_start) } else { 0 };
        let is_excused = |offset: &Offset, mark: &u64| *offset < begins.max(book.begins) || book.excused.contains(mark);
        for (offset, mark) in &book.seen {
            if at.get(offset) != Some(mark) && !is_excused(offset, mark) {
                problems.push(format!("record {mark}, seen at {offset}, is not there: lost"));
            }
        }
        for (mark, offset) in &book.acknowledged {
            if at.get(offset) != Some(mark) && !is_excused(offset, mark) {
                problems.push(format!("record {mark}, acknowledged at {offset}, is not there: lost"));
            }
        }
        for (mark, times) in &times {
            if *times > 1 && !books.twice.contains(mark) {
                problems.push(format!("record {mark} is there {times} times"));
            }
        }
        drop(books);
        if let Some(problem) = problems.first() {
            fail(format!("{partition}: {problem} ({} problems)", problems.len()));
        }
    }

    async fn read_all(&self, world: &World, shard: u32, up: &Up, partition: Partition) -> Option<Vec<(Offset, u64)>> {
        use shared::log::ReadLimits;
        let begins = || up.log.bounds(partition).map_or(0, |bounds| bounds.log_start);
        let mut from = if shard == MEMORY { begins() } else { 0 };
        let mut found = Vec::new();
        loop {
            match up.log.read(partition, from, ReadLimits { bytes_max: 20_000 }).await {
                Ok(read) => {
                    found.extend(self.read(shard, partition, from, &read));
                    if read.next == from {
                        let end = read.bounds.high_watermark;
                        if end != from && !(self.was_restored(shard) && end - from <= SKIPS_MAX * SKIPPED) {
                            fail(format!("{partition}: nothing is read at {from}, the end is {end}"));
                        }
                        return Some(found);
                    }
                    from = read.next;
                }
                Err(error) => {
                    note(|| format!("last word on {partition}: {error}"));
                    fail(format!("{partition} cannot be read at {from}: {error}"));
                    return None;
                }
            }
            if world.is_over() {
                return None;
            }
        }
    }

    /// Every record that edges were to deliver is in one of the logs, and in one alone unless they said so.
    pub async fn edges(&self, world: &World, services: &[(u32, Up)]) {
        let mut there: BTreeMap<u64, u32> = BTreeMap::new();
        for (shard, up) in services {
            let Some(found) = self.read_all(world, *shard, up, streamed(*shard)).await else { return };
            found.iter().for_each(|(_, mark)| *there.entry(*mark).or_default() += 1);
        }
        let books = self.0.lock();
        let twice = there.iter().find(|(mark, times)| **times > 1 && !books.twice.contains(mark));
        let twice = twice.map(|(mark, times)| (*mark, *times));
        let missing: Vec<u64> = books.held.iter().filter(|mark| !there.contains_key(mark)).copied().collect();
        drop(books);
        if let Some(first) = missing.first() {
            fail(format!("record {first} was durable at an edge and is in no log ({} of them)", missing.len()));
        }
        if let Some((mark, times)) = twice {
            fail(format!("record {mark} is there {times} times, in several topics"));
        }
    }
}

impl Book {
    fn see(&mut self, partition: Partition, offset: Offset, mark: u64) {
        if self.ends.iter().any(|end| (*end..*end + SKIPPED / 2).contains(&offset)) {
            self.excused.insert(mark);
        }
        if self.blind.is_some_and(|(from, to)| (from..to).contains(&offset)) {
            self.excused.insert(mark);
            self.seen.insert(offset, mark);
            return;
        }
        let known = *self.seen.entry(offset).or_insert(mark);
        if known != mark {
            fail(format!("{partition}: offset {offset} had record {known} and has {mark}"));
        }
    }
}
