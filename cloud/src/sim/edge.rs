//! An edge: a durable log of streams, and the real sender that drives it over the link.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use shared::batch::{BatchBuilder, Compression};
use shared::link::frame::{self, AppendReply, HelloReply, PollReply};
use shared::link::sender::{
    Body, Failure, Output, Report, Row, Rows, Sender, SenderSettings, Step, StreamInfo, seal_body,
};
use shared::log::{BoxFuture, Chain};
use shared::name::{EdgeId, Incarnation, Offset, StreamName};
use tokio::sync::{Semaphore, mpsc};

use super::judge::mark;
use super::node::{Node, Up, stream_topic};
use super::scheduler::Owner;
use super::world::{MEMORY, World};
use super::{chance, draw, fail, note, now_ms, planted, random};
use crate::ingest::{Grants, IngestError};
use crate::planted::Bug;

/// Rows of a stream that wait, at most.
const ROWS_MAX: usize = 200;

/// A gateway and its disk.
pub struct Edge {
    pub owner: Owner,
    pub id: EdgeId,
    /// Shards of the node that it sends to, where its streams may go.
    pub shards: Vec<u32>,
    /// What the process knows: rows are durable, and cursors may be ahead of what is.
    pub disk: Mutex<EdgeDisk>,
    /// What the last commit left.
    durable: Mutex<EdgeDisk>,
    /// Commits fail: the disk is full or read-only.
    trouble: AtomicBool,
}

/// A database of streams.
#[derive(Clone, Default)]
pub struct EdgeDisk(BTreeMap<StreamName, Stream>);

#[derive(Clone)]
struct Stream {
    shard: u32,
    incarnation: Incarnation,
    rows: Vec<Row>,
    first: Offset,
    next: Offset,
    confirmed: Offset,
    safe: Offset,
    renewed_at: Offset,
    chain: Chain,
}

impl EdgeDisk {
    fn new(shards: &[u32], streams: u64) -> Self {
        let stream = || Stream {
            shard: shards[draw(shards.len() as u64) as usize],
            incarnation: incarnation(),
            rows: Vec::new(),
            first: 0,
            next: 0,
            confirmed: 0,
            safe: 0,
            renewed_at: 0,
            chain: Chain(random().unwrap_or(0)),
        };
        let name = |n| StreamName::parse(&format!("stream-{n}")).expect("a name");
        Self((0..streams).map(|n| (name(n), stream())).collect())
    }

    /// All that is written so far is confirmed.
    pub fn is_delivered(&self) -> bool {
        self.0.values().all(|stream| stream.confirmed == stream.next || stream.first == stream.next)
    }

    /// Marks of the records that are held.
    pub fn marks(&self) -> Vec<u64> {
        self.0.values().flat_map(|stream| marks_from(&stream.rows, 0)).collect()
    }

    /// No more is written: a long outage need not be filled with records.
    fn is_full(&self) -> bool {
        self.0.values().any(|stream| stream.rows.len() > ROWS_MAX)
    }

    fn is_crowded(&self) -> bool {
        self.0.values().any(|stream| stream.rows.len() > ROWS_MAX / 2)
    }

    /// Streams' rules name other topics from the next start on. Returns the records that only a shard which keeps nothing
    /// may have.
    fn move_streams(&mut self, shards: &[u32]) -> Vec<u64> {
        let mut left = Vec::new();
        for stream in self.0.values_mut() {
            if stream.shard == MEMORY {
                left.extend(marks_from(&stream.rows, 0));
            }
            let keeps = chance(700);
            let others: Vec<u32> =
                shards.iter().copied().filter(|to| *to != stream.shard && !(keeps && *to == MEMORY)).collect();
            stream.shard = others.get(draw(others.len().max(1) as u64) as usize).copied().unwrap_or(stream.shard);
        }
        left
    }

    /// Where its streams end.
    pub fn ends(&self) -> Vec<Offset> {
        self.0.values().map(|stream| stream.next).collect()
    }

    /// Whether more of a stream is confirmed than `ends` says.
    pub fn has_more_confirmed(&self, ends: &[Offset]) -> bool {
        self.0.values().zip(ends).any(|(stream, end)| stream.confirmed > *end)
    }

    fn write(&mut self, name: &StreamName, marks: &[u64]) {
        let Some(stream) = self.0.get_mut(name) else { return };
        let mut builder = BatchBuilder::default();
        for mark in marks {
            let mut value = mark.to_be_bytes().to_vec();
            value.resize(8 + draw(60) as usize, b'.');
            builder.push(1_700_000_000_000, Some(b"key"), Some(&value), &[]);
        }
        let batch = builder.finish(stream.next, Compression::None);
        stream.next += marks.len() as Offset;
        let mixed = (stream.chain.0 ^ u64::from(batch.crc())).wrapping_mul(0x100_0000_01b3);
        stream.chain = Chain(mixed.rotate_left(17));
        stream.rows.push(Row { batch, chain: stream.chain });
    }

    /// Deletes whole rows of what is safe.
    fn trim(&mut self) {
        for stream in self.0.values_mut() {
            let safe = stream.safe;
            let gone = stream.rows.iter().take_while(|row| row.batch.last_offset() < safe).count();
            if let Some(last) = stream.rows.drain(..gone).next_back() {
                stream.first = last.batch.last_offset() + 1;
            }
        }
    }
}

fn incarnation() -> Incarnation {
    Incarnation(std::array::from_fn(|_| random().unwrap_or(0) as u8))
}

fn marks_from(rows: &[Row], from: Offset) -> Vec<u64> {
    let rows = rows.iter().filter(|row| row.batch.last_offset() >= from);
    let records = rows.flat_map(|row| row.batch.records(1 << 20).into_iter().flatten().flatten());
    records.filter_map(|record| mark(&record.value?)).collect()
}

impl Rows for EdgeDisk {
    fn streams(&self) -> Vec<StreamInfo> {
        let info = |(name, stream): (&StreamName, &Stream)| StreamInfo {
            name: name.clone(),
            topic: stream_topic(stream.shard),
            incarnation: stream.incarnation,
            first: stream.first,
            next: stream.next,
            confirmed: stream.confirmed,
            safe: stream.safe,
            renewed_at: stream.renewed_at,
            dropped: None,
        };
        self.0.iter().map(info).collect()
    }

    fn read(&self, stream: &StreamName, from: Offset, bytes_max: usize) -> Result<Vec<Row>, String> {
        let (mut left, mut out) = (bytes_max, Vec::new());
        let rows = self.0.get(stream).map_or(&[][..], |stream| &stream.rows);
        for row in &rows[rows.partition_point(|row| row.batch.last_offset() < from)..] {
            if !out.is_empty() && row.batch.len() > left {
                break;
            }
            left = left.saturating_sub(row.batch.len());
            out.push(row.clone());
        }
        Ok(out)
    }

    fn chain_at(&self, stream: &StreamName, next: Offset) -> Option<Chain> {
        let rows = &self.0.get(stream)?.rows;
        let row = rows.get(rows.partition_point(|row| row.batch.last_offset() + 1 < next))?;
        (row.batch.last_offset() + 1 == next).then_some(row.chain)
    }
}

enum News {
    Hello(Result<HelloReply, Failure>),
    Append(Result<AppendReply, Failure>),
    Poll(u32, Result<PollReply, Failure>),
    Sealed(Box<Body>),
    Renewed(StreamName),
    Written,
}

impl Edge {
    pub fn new(owner: Owner, node: &Node) -> Self {
        let id = EdgeId::parse(&format!("gateway-{owner}")).expect("a name");
        let shards: Vec<u32> = node.shards.iter().map(|shard| shard.id).collect();
        let disk = EdgeDisk::new(&shards, 1 + draw(2));
        let durable = Mutex::new(disk.clone());
        Self { owner, id, shards, disk: Mutex::new(disk), durable, trouble: AtomicBool::new(false) }
    }

    /// Its disk is full or read-only from here on, or no longer.
    pub fn set_trouble(&self, trouble: bool) {
        self.trouble.store(trouble, Ordering::Relaxed);
    }

    /// Makes durable what the process knows. False: the disk does not take it.
    fn commit(&self, disk: &EdgeDisk) -> bool {
        let well = !self.trouble.load(Ordering::Relaxed);
        if well {
            *self.durable.lock() = disk.clone();
        }
        well
    }

    /// A copy of what is durable.
    pub fn image(&self) -> EdgeDisk {
        self.durable.lock().clone()
    }

    /// Kills the process and starts it again: on this disk, or on an older copy.
    pub fn restart(self: &Arc<Self>, world: &World, image: Option<EdgeDisk>, moves: bool) {
        world.processes().kill(self.owner);
        let mut disk = self.disk.lock();
        let found = image.is_some();
        let mut kept = image.unwrap_or_else(|| self.image());
        if found {
            note(|| format!("{}: goes on with an older copy of its disk", self.id));
            let marks = kept.marks();
            world.judge().let_go(disk.marks().into_iter().filter(|mark| !marks.contains(mark)));
        }
        if moves {
            note(|| format!("{}: streams go to other topics", self.id));
            world.judge().let_go(kept.move_streams(&self.shards));
        }
        if planted(Bug::RenewalForgotten) {
            kept.0.values_mut().for_each(|stream| stream.renewed_at = 0);
        }
        *disk = kept.clone();
        *self.durable.lock() = kept;
        drop(disk);
        world.processes().spawn(self.owner, self.clone().run(world.clone()));
    }

    /// Whether its streams can move to another shard.
    pub fn may_move(&self) -> bool {
        self.shards.len() > 1
    }

    /// One life of the process: sends until it is killed.
    pub async fn run(self: Arc<Self>, world: World) {
        let boot = std::array::from_fn(|_| random().unwrap_or(0) as u8);
        let settings = SenderSettings {
            compression: [Compression::None, Compression::Lz4][draw(2) as usize],
            batch_bytes: [600, 1 << 20][draw(2) as usize],
            parked_retry_ms: 3000,
            ..SenderSettings::default()
        };
        let mut sender = Sender::new(settings, self.id.clone(), boot, random().unwrap_or(0));
        let (tell, mut told) = mpsc::unbounded_channel();
        let devices = self.clone().devices(world.clone(), tell.clone());
        world.processes().spawn(self.owner, devices);
        let mut guess = 0;
        loop {
            self.outputs(&world, &mut sender, &tell, &mut guess);
            let step = sender.step(now_ms(), &*self.disk.lock());
            match step {
                Step::Hello(body) => self.hello(&world, &tell, guess, body),
                Step::Append(body) => self.append(&world, &tell, guess, body),
                Step::Poll { number, body, wait_secs } => self.poll(&world, &tell, guess, number, body, wait_secs),
                Step::Seal(order) => {
                    let body = Box::new(seal_body(&order, &*self.disk.lock()));
                    let tell = tell.clone();
                    world.processes().spawn(self.owner, async move {
                        tokio::time::sleep(Duration::from_millis(draw(20))).await;
                        let _ = tell.send(News::Sealed(body));
                    });
                }
                Step::Wait(until) => {
                    let pause = until.map_or(3_600_000, |until| until.saturating_sub(now_ms()).max(1));
                    if let Ok(Some(news)) = tokio::time::timeout(Duration::from_millis(pause), told.recv()).await {
                        self.hear(&mut sender, news);
                    }
                }
            }
        }
    }

    fn hear(&self, sender: &mut Sender, news: News) {
        let (now, mut disk) = (now_ms(), self.disk.lock());
        match news {
            News::Hello(reply) => sender.hello_done(now, reply, &*disk),
            News::Append(reply) => sender.append_done(now, reply, &*disk),
            News::Poll(number, reply) => sender.poll_done(now, number, reply),
            News::Sealed(body) => sender.sealed(now, *body),
            News::Renewed(name) => {
                if let Some(stream) = disk.0.get_mut(&name) {
                    let from = stream.safe.max(stream.first);
                    (stream.incarnation, stream.confirmed, stream.renewed_at) = (incarnation(), from, from);
                }
                let done = if self.commit(&disk) { Ok(()) } else { Err("the disk is full".to_owned()) };
                sender.renewed(now, &name, done);
            }
            News::Written => {}
        }
    }

    /// What devices publish, and what is deleted.
    async fn devices(self: Arc<Self>, world: World, tell: mpsc::UnboundedSender<News>) {
        let pace = 200 + draw(3000);
        loop {
            tokio::time::sleep(Duration::from_millis(draw(pace))).await;
            let mut disk = self.disk.lock();
            if self.trouble.load(Ordering::Relaxed) {
                // Devices are not answered, and nothing is deleted: that is a commit too.
                continue;
            }
            if world.writes() && !disk.is_full() {
                let names: Vec<StreamName> = disk.0.keys().cloned().collect();
                let name = &names[draw(names.len() as u64) as usize];
                let marks: Vec<u64> = (0..1 + draw(4)).map(|_| world.mark()).collect();
                disk.write(name, &marks);
                marks.iter().for_each(|mark| world.judge().held(*mark));
            }
            // What is safe is kept as long as there is room.
            if chance(100) || disk.is_crowded() {
                disk.trim();
            }
            self.commit(&disk);
            drop(disk);
            let _ = tell.send(News::Written);
        }
    }

    fn outputs(&self, world: &World, sender: &mut Sender, tell: &mpsc::UnboundedSender<News>, guess: &mut usize) {
        while let Some(output) = sender.output() {
            let mut disk = self.disk.lock();
            match output {
                Output::Confirmed { stream, next } => {
                    let Some(stream) = disk.0.get_mut(&stream) else { continue };
                    if next > stream.next {
                        fail(format!("{}: {next} is confirmed, {} were written", self.id, stream.next));
                    }
                    world.count(|tally| tally.confirmed += (next - stream.confirmed).max(0) as u64);
                    stream.confirmed = stream.confirmed.max(next);
                }
                Output::Safe { stream, next } => {
                    let Some(stream) = disk.0.get_mut(&stream) else { continue };
                    if next > stream.next {
                        fail(format!("{}: {next} is safe, {} were written", self.id, stream.next));
                    }
                    stream.safe = stream.safe.max(next);
                    if stream.shard == MEMORY {
                        // Safe as far as that goes: it may be lost from here on.
                        let gone = stream.rows.iter().take_while(|row| row.batch.last_offset() < next);
                        world.judge().let_go(marks_from(&gone.cloned().collect::<Vec<_>>(), 0));
                    }
                }
                Output::Renew { stream } => {
                    let tell = tell.clone();
                    world.count(|tally| tally.renewed += 1);
                    world.processes().spawn(self.owner, async move {
                        tokio::time::sleep(Duration::from_millis(3)).await;
                        let _ = tell.send(News::Renewed(stream));
                    });
                }
                Output::Park { .. } | Output::GapDeclared { .. } => {}
                Output::Report(report) => {
                    note(|| format!("{}: {report:?}", self.id));
                    match report {
                        Report::SentTwice { stream, from, .. } => {
                            let rows = disk.0.get(&stream).map_or(&[][..], |stream| &stream.rows);
                            world.judge().twice(marks_from(rows, from));
                        }
                        Report::Down { .. } => *guess = draw(2) as usize,
                        _ => {}
                    }
                }
            }
        }
    }

    /// Sends a request and tells what came of it.
    fn send<T: Send + 'static>(
        &self,
        world: &World,
        guess: usize,
        patience: Duration,
        work: impl Fn(Up) -> BoxFuture<'static, Result<T, IngestError>> + Send + Sync + 'static,
        done: impl FnOnce(Result<T, Failure>) + Send + 'static,
    ) {
        let Some(node) = world.node_of(self.shards[0], guess) else { return };
        let (world, owner) = (world.clone(), self.owner);
        world.clone().processes().spawn(owner, async move {
            let answer = world.ask(owner, node, patience, Arc::new(work)).await;
            done(match answer {
                None => Err(Failure::Unreachable("no answer".into())),
                Some(Ok(reply)) => Ok(reply),
                Some(Err(IngestError::Unavailable(text))) => Err(Failure::Busy { text, wait_ms: 500 }),
                Some(Err(IngestError::Auth(error))) => Err(Failure::Refused(error.to_string())),
                Some(Err(IngestError::Hello(error))) => Err(Failure::Unreachable(error.to_string())),
            });
        });
    }

    fn hello(&self, world: &World, tell: &mpsc::UnboundedSender<News>, guess: usize, body: Bytes) {
        let work = move |up: Up| -> BoxFuture<'static, _> {
            let hello: frame::Hello = frame::decode(&body).expect("our own bytes");
            Box::pin(async move { up.ingest.hello(&Grants::default().caller(None)?, hello).await })
        };
        let tell = tell.clone();
        self.send(world, guess, Duration::from_secs(5), work, move |reply| drop(tell.send(News::Hello(reply))));
    }

    fn append(&self, world: &World, tell: &mpsc::UnboundedSender<News>, guess: usize, body: Bytes) {
        let work = move |up: Up| -> BoxFuture<'static, _> {
            let (append, batches) = frame::decode_append(&body).expect("our own bytes");
            Box::pin(async move {
                let room = Arc::new(Semaphore::new(1)).acquire_owned().await;
                let room = room.map_err(|error| IngestError::Unavailable(error.to_string()))?;
                up.ingest.append(&Grants::default().caller(None)?, append, batches, room).await
            })
        };
        let tell = tell.clone();
        let patience = Duration::from_secs(2 + draw(20));
        self.send(world, guess, patience, work, move |reply| drop(tell.send(News::Append(reply))));
    }

    fn poll(
        &self,
        world: &World,
        tell: &mpsc::UnboundedSender<News>,
        guess: usize,
        number: u32,
        body: Bytes,
        wait_secs: u16,
    ) {
        let work = move |up: Up| -> BoxFuture<'static, _> {
            let poll: frame::Poll = frame::decode(&body).expect("our own bytes");
            Box::pin(async move { up.ingest.poll(&Grants::default().caller(None)?, poll).await })
        };
        let tell = tell.clone();
        let patience = Duration::from_secs(u64::from(wait_secs) + 5);
        self.send(world, guess, patience, work, move |reply| drop(tell.send(News::Poll(number, reply))));
    }
}
