//! Sends what can be read of a database that was set aside, under its own incarnation.
//!
//! The file is only read. What was read is offered to the cloud by the uplink that also serves a running broker, so the
//! same rules hold: a batch goes in once, what the cloud has is answered `have`, what is missing in between is declared
//! as a gap. Before it starts, the cloud is asked where each stream stands. Where its position lies in a hole of ours,
//! nothing can be compared there, and sending goes on behind it; where it holds other records than these, the stream
//! goes on under an incarnation derived from its own, the same one each time, so that running it again sends nothing twice.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shared::link::Position;
use shared::link::frame::{HelloStreamReply, Limits, STREAMS_MAX};
use shared::link::sender::{Row, Rows, StreamInfo};
use shared::log::{BoxFuture, Chain};
use shared::name::{Incarnation, Offset, StreamName, TopicName};
use tokio::sync::watch;
use tracing::warn;

use crate::redb_log::chain_after;
use crate::redb_log::scan::{Held, Scan, current};
use crate::uplink::{ClientError, Greeter, StreamSource, Uplink, UplinkSettings, UplinkStatus};

/// Page cache for redb's own look at the file.
const CACHE_BYTES: usize = 16 << 20;
/// Incarnations tried for a stream whose records differ from the cloud's.
const LIVES_MAX: u32 = 4;
/// How long a file that is to be removed waits for the cloud's bucket, once the cloud has everything.
const SAFE_WAIT: Duration = Duration::from_secs(120);
/// Ranges of lost records that a report names.
const RANGES_MAX: usize = 20;

/// Why nothing was sent.
#[derive(Debug, thiserror::Error)]
pub enum SalvageError {
    /// The file cannot be read.
    #[error("{}: {error}: give a file that this user may read; nothing was changed", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The uplink cannot be set up.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The cloud does not answer as it should.
    #[error("the cloud at {url} does not answer: {error}; nothing was sent, run this again when it does")]
    Cloud {
        /// Where it was asked.
        url: String,
        /// What came instead.
        error: String,
    },
}

/// What was read of a database, as the uplink sees it.
pub struct Salvage {
    scan: Scan,
    streams: Mutex<BTreeMap<StreamName, Stream>>,
    /// Why redb does not open the file; its pages were read one by one then.
    pub refused: Option<String>,
    /// Streams of which records were found but not their name: id, and how many records.
    pub nameless: Vec<(u32, u64)>,
    /// It is not done before all is in the bucket, or [`SAFE_WAIT`] is over.
    wait_safe: bool,
}

struct Stream {
    topic: TopicName,
    incarnation: Incarnation,
    lives: u32,
    held: Arc<Vec<Held>>,
    /// What is offered begins here: what lies before it is the cloud's already, or was given up on.
    first: Offset,
    /// What the database began with.
    origin: Offset,
    /// Offset after the last record that was read.
    next: Offset,
    /// Offset after the last record that the database says there was, and the chain value there.
    end: Position,
    confirmed: Offset,
    safe: Offset,
    /// Below this the cloud has in its bucket what it was sent.
    made_safe: Offset,
    renewed_at: Offset,
    dropped: Option<(Offset, Offset)>,
    /// The cloud's own position, where ours is lost but what follows shows that it fits.
    accepted: Option<Position>,
    /// Where the cloud stood before anything was sent.
    begun: Offset,
    parked: Option<String>,
}

/// What became of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamReport {
    /// Its name.
    pub name: StreamName,
    /// Its topic.
    pub topic: TopicName,
    /// Records that were read.
    pub read: u64,
    /// Of them, those the cloud had before.
    pub already: u64,
    /// Of them, those the cloud has taken now.
    pub sent: u64,
    /// Records that could not be read and that the cloud does not have.
    pub lost: u64,
    /// Where they lay (end exclusive), the first few.
    pub lost_at: Vec<(Offset, Offset)>,
    /// The cloud holds other records under the database's incarnation: these went under another one, and what was sent
    /// before may be there twice.
    pub renewed: bool,
    /// Why it was not sent, or not wholly.
    pub parked: Option<String>,
    /// All that was read is in the cloud's bucket.
    pub safe: bool,
}

impl StreamReport {
    /// Records that were read and have not reached the cloud.
    pub fn unsent(&self) -> u64 {
        self.read.saturating_sub(self.already).saturating_sub(self.sent)
    }
}

impl std::fmt::Debug for Salvage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Salvage").field("refused", &self.refused).finish_non_exhaustive()
    }
}

impl Salvage {
    /// Reads the file at `path`. `progress` is told how many bytes of how many are done.
    pub fn read(path: &Path, progress: impl FnMut(u64, u64)) -> Result<Self, SalvageError> {
        let io = |error| SalvageError::Io { path: path.to_owned(), error };
        let file = Arc::new(File::open(path).map_err(io)?);
        let (shown, refused) = match current(&file, CACHE_BYTES) {
            Ok(current) => (Some(current), None),
            Err(why) => (None, Some(why.to_string())),
        };
        let scan = Scan::read(file, shown, progress).map_err(io)?;
        let (mut streams, mut nameless) = (BTreeMap::new(), Vec::new());
        for id in scan.streams() {
            let Some(record) = scan.record(id) else {
                let records = scan.assemble(id, 0).iter().map(|held| span(held.from, held.piece.next)).sum();
                nameless.push((id, records));
                continue;
            };
            let held = scan.assemble(id, record.first);
            let first = held.first().map_or(record.next, |held| held.from);
            let next = held.last().map_or(first, |held| held.piece.next);
            let end = Position { next: record.next, chain: record.next_chain };
            let stream = Stream {
                topic: record.topic,
                incarnation: record.incarnation,
                lives: 0,
                held: Arc::new(held),
                first,
                origin: record.first,
                next,
                end,
                confirmed: record.confirmed.min(next),
                safe: record.safe.min(next),
                made_safe: record.safe.min(next),
                // Once something of the incarnation was in the bucket, its beginning says nothing any more.
                renewed_at: if record.safe > record.renewed_at { 0 } else { record.renewed_at.min(next) },
                dropped: record.gap,
                accepted: None,
                begun: 0,
                parked: None,
            };
            streams.insert(record.name, stream);
        }
        Ok(Self { scan, streams: Mutex::new(streams), refused, nameless, wait_safe: false })
    }

    /// Has [`Salvage::send`] wait until what was sent is in the cloud's bucket: the file is to be removed.
    pub fn wait_until_safe(&mut self) {
        self.wait_safe = true;
    }

    /// Why the file must stay, as far as the records go; empty: all it ever held is in the cloud's bucket.
    pub fn why_kept(&self) -> Vec<String> {
        let mut why = Vec::new();
        if let Some(refused) = &self.refused {
            why.push(format!(
                "the database engine does not open it ({refused}), so nobody can tell whether records at a stream's end are lost"
            ));
        }
        let (pages, batches) = self.damage();
        if pages + batches > 0 {
            why.push(format!("{pages} pages could not be read and {batches} batches do not hold"));
        }
        for (stream, records) in &self.nameless {
            why.push(format!("the name of stream number {stream} is lost, and with it {records} records"));
        }
        for one in self.report() {
            let name = &one.name;
            match &one.parked {
                Some(parked) => why.push(format!("stream {name} is parked: {parked}")),
                None if one.unsent() > 0 => {
                    why.push(format!("{} records of stream {name} were not sent", one.unsent()))
                }
                None if !one.safe => {
                    why.push(format!(
                        "records of stream {name} are in the cloud, but not in its bucket yet: run this again"
                    ));
                }
                None => {}
            }
            if one.lost > 0 {
                why.push(format!("{} records of stream {name} could not be read", one.lost));
            }
        }
        why
    }

    /// Pages that the disk did not give, and batches that did not hold.
    pub fn damage(&self) -> (u64, u64) {
        (self.scan.pages_unreadable, self.scan.entries_damaged)
    }

    /// What is known of each stream now.
    pub fn report(&self) -> Vec<StreamReport> {
        self.streams.lock().iter().map(|(name, stream)| stream.report(name)).collect()
    }

    /// Sends everything, until it is confirmed, parked, or `stop` turns true. Tells `progress` every second.
    pub async fn send(
        self: &Arc<Self>,
        settings: UplinkSettings,
        mut stop: watch::Receiver<bool>,
        mut progress: impl FnMut(&[StreamReport], &UplinkStatus),
    ) -> Result<Vec<StreamReport>, SalvageError> {
        self.meet(&settings).await?;
        let (end, ending) = watch::channel(false);
        let uplink = Uplink::start(settings, self.clone(), ending)?;
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        let mut ticks = 0u64;
        let mut sent_at: Option<tokio::time::Instant> = None;
        while !*stop.borrow() {
            if self.is_sent() {
                let since = *sent_at.get_or_insert_with(tokio::time::Instant::now);
                if !self.wait_safe || self.is_safe() || since.elapsed() > SAFE_WAIT {
                    break;
                }
            }
            tokio::select! {
                _ = tick.tick() => {
                    ticks += 1;
                    if ticks.is_multiple_of(10) {
                        progress(&self.report(), &uplink.status());
                    }
                }
                changed = stop.changed() => if changed.is_err() { break },
            }
        }
        end.send_replace(true);
        uplink.ended().await;
        Ok(self.report())
    }

    /// Asks the cloud where the streams stand, and takes that up; again for those that got another incarnation by it.
    async fn meet(&self, settings: &UplinkSettings) -> Result<(), SalvageError> {
        let mut greeter = Greeter::new(settings)?;
        for _ in 0..LIVES_MAX {
            let infos: Vec<StreamInfo> = self.infos().into_iter().take(STREAMS_MAX).collect();
            let reply = greeter.hello(infos).await;
            let reply =
                reply.map_err(|error| SalvageError::Cloud { url: shared::config::redacted(&settings.url), error })?;
            let mut again = false;
            let mut streams = self.streams.lock();
            for HelloStreamReply { name, position, .. } in reply.streams {
                let Some(stream) = streams.get_mut(&name) else { continue };
                if !stream.take_up(&self.scan, position) {
                    warn!(stream = %name, "the cloud holds other records; these go on under another incarnation");
                    stream.renew();
                    again = true;
                }
            }
            drop(streams);
            if !again {
                return Ok(());
            }
        }
        Ok(())
    }

    fn is_sent(&self) -> bool {
        self.streams.lock().values().all(|stream| stream.confirmed >= stream.next || stream.parked.is_some())
    }

    fn is_safe(&self) -> bool {
        self.streams.lock().values().all(|stream| stream.made_safe >= stream.next || stream.parked.is_some())
    }

    fn infos(&self) -> Vec<StreamInfo> {
        let info = |(name, stream): (&StreamName, &Stream)| StreamInfo {
            name: name.clone(),
            topic: stream.topic.clone(),
            incarnation: stream.incarnation,
            first: stream.first,
            next: stream.next,
            confirmed: stream.confirmed,
            safe: stream.safe,
            renewed_at: stream.renewed_at,
            dropped: stream.dropped.filter(|gap| gap.1 == stream.first),
        };
        self.streams.lock().iter().map(info).collect()
    }
}

impl Stream {
    /// Goes on from where the cloud stands. False: it holds other records than these.
    fn take_up(&mut self, scan: &Scan, position: Option<Position>) -> bool {
        let Some(at) = position else {
            // What lies below its beginning is there under the incarnation before.
            self.begun = self.renewed_at;
            return true;
        };
        self.begun = at.next;
        if at.next <= self.first {
            return true;
        }
        let follows = self.entry_from(scan, at.next);
        let fits = follows.as_ref().is_some_and(|(_, batch, chain)| chain_after(at.chain, batch) == *chain);
        if let Some(known) = self.chain_at(scan, at.next) {
            // The value itself may be what was damaged: what follows was made from the true one.
            self.accepted = (fits && known != at.chain).then_some(at);
            return fits || known == at.chain;
        }
        match follows {
            // Within a batch: the sender compares.
            Some((from, ..)) if from < at.next => return true,
            Some((from, ..)) if from == at.next && !fits => return false,
            // Ours is lost there. It was once as the cloud has it, or the records of this incarnation went two ways
            // without a trace here; what is held behind it is sent either way.
            Some(_) => {}
            // Behind all that was read. This database must have had it.
            None if at.next > self.end.next || (at.next == self.end.next && at.chain != self.end.chain) => {
                return false;
            }
            None => {}
        }
        self.first = follows.map_or(at.next, |(from, ..)| from);
        self.next = self.next.max(self.first);
        self.confirmed = self.confirmed.max(at.next).min(self.next);
        true
    }

    fn renew(&mut self) {
        self.lives += 1;
        self.incarnation = derived(self.incarnation);
        // What is safe is in the bucket under the incarnation before.
        self.first = self.first.max(self.safe);
        (self.confirmed, self.renewed_at, self.begun, self.accepted) = (self.first, self.first, 0, None);
        self.made_safe = self.first;
    }

    /// The first batch that ends behind `offset`: where it begins, the batch and its chain value.
    fn entry_from(&self, scan: &Scan, offset: Offset) -> Option<(Offset, shared::batch::Batch, Chain)> {
        let index = self.held.partition_point(|held| held.piece.next <= offset);
        let held = self.held.get(index)?;
        let entry = scan.entries(&held.piece).ok()?.into_iter().find(|entry| entry.next() > offset.max(held.from))?;
        Some((entry.batch.base_offset(), entry.batch, entry.chain))
    }

    fn chain_at(&self, scan: &Scan, next: Offset) -> Option<Chain> {
        if let Some(accepted) = self.accepted.filter(|accepted| accepted.next == next) {
            return Some(accepted.chain);
        }
        let held = self.held.get(self.held.partition_point(|held| held.piece.next < next))?;
        if held.piece.next == next {
            return Some(held.piece.chain);
        }
        scan.entries(&held.piece).ok()?.into_iter().find(|entry| entry.next() == next).map(|entry| entry.chain)
    }

    fn records(&self, from: Offset, to: Offset) -> u64 {
        self.held.iter().map(|held| span(held.from.max(from), held.piece.next.min(to))).sum()
    }

    fn report(&self, name: &StreamName) -> StreamReport {
        let begun = if self.lives > 0 { self.begun.max(self.first) } else { self.begun };
        let (mut lost, mut lost_at, mut at) = (0, Vec::new(), self.origin.max(begun));
        let held = self.held.iter().map(|held| (held.from, held.piece.next));
        for (from, next) in held.chain([(self.end.next, self.end.next)]) {
            if from > at {
                lost += span(at, from);
                if lost_at.len() < RANGES_MAX {
                    lost_at.push((at, from));
                }
            }
            at = at.max(next);
        }
        StreamReport {
            name: name.clone(),
            topic: self.topic.clone(),
            read: self.records(Offset::MIN, Offset::MAX),
            already: self.records(Offset::MIN, begun),
            sent: self.records(begun, self.confirmed),
            lost,
            lost_at,
            renewed: self.lives > 0,
            parked: self.parked.clone(),
            safe: self.made_safe >= self.next,
        }
    }
}

impl Rows for Salvage {
    fn streams(&self) -> Vec<StreamInfo> {
        self.infos()
    }

    fn read(&self, stream: &StreamName, from: Offset, bytes_max: usize) -> Result<Vec<Row>, String> {
        let (held, first) = {
            let streams = self.streams.lock();
            let found = streams.get(stream).ok_or("no such stream")?;
            (found.held.clone(), found.first)
        };
        let from = from.max(first);
        let begin = held.partition_point(|held| held.piece.next <= from);
        let (mut rows, mut bytes): (Vec<Row>, usize) = (Vec::new(), 0);
        for one in held.get(begin..).unwrap_or_default() {
            let entries = self.scan.entries(&one.piece);
            for entry in entries.map_err(|error| format!("the file cannot be read any more: {error}"))? {
                // What lies before `from` in the piece was taken from the one before it.
                if entry.next() <= from.max(one.from) {
                    continue;
                }
                bytes += entry.batch.len();
                if !rows.is_empty() && bytes > bytes_max {
                    return Ok(rows);
                }
                rows.push(Row { batch: entry.batch, chain: entry.chain });
            }
        }
        Ok(rows)
    }

    fn chain_at(&self, stream: &StreamName, next: Offset) -> Option<Chain> {
        self.streams.lock().get(stream)?.chain_at(&self.scan, next)
    }
}

impl StreamSource for Salvage {
    fn set_confirmed(&self, stream: &StreamName, next: Offset) {
        if let Some(stream) = self.streams.lock().get_mut(stream) {
            stream.confirmed = stream.confirmed.max(next.min(stream.next));
        }
    }

    fn set_safe(&self, stream: &StreamName, next: Offset) {
        if let Some(stream) = self.streams.lock().get_mut(stream) {
            stream.made_safe = stream.made_safe.max(next.min(stream.next));
        }
    }

    fn renew_incarnation(&self, stream: &StreamName) -> BoxFuture<'static, Result<Incarnation, String>> {
        let renewed = match self.streams.lock().get_mut(stream) {
            Some(stream) if stream.lives < LIVES_MAX => {
                stream.renew();
                Ok(stream.incarnation)
            }
            Some(_) => Err("the cloud holds other records under every incarnation that was tried".to_owned()),
            None => Err("no such stream".to_owned()),
        };
        Box::pin(std::future::ready(renewed))
    }

    fn park(&self, stream: &StreamName, reason: Option<String>) {
        if let Some(stream) = self.streams.lock().get_mut(stream) {
            stream.parked = reason;
        }
    }

    fn gap_declared(&self, stream: &StreamName, _: Offset) {
        if let Some(stream) = self.streams.lock().get_mut(stream) {
            stream.dropped = None;
        }
    }

    fn wait(&self, _: &StreamName, _: Offset) -> BoxFuture<'static, ()> {
        // There will never be more, and asking again would not change that.
        Box::pin(std::future::pending())
    }

    fn learn_limits(&self, _: Limits) {}
}

fn span(from: Offset, to: Offset) -> u64 {
    to.saturating_sub(from).max(0).unsigned_abs()
}

/// Another incarnation, always the same for the same one: a second run finds what the first has sent.
fn derived(from: Incarnation) -> Incarnation {
    let mixed = (u128::from_be_bytes(from.0) ^ 0x5a17_a6ed).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    Incarnation((mixed ^ (mixed >> 64)).to_be_bytes())
}

/// What `salvage` prints of its streams.
pub fn render(reports: &[StreamReport]) -> String {
    let heading = ["STREAM", "TOPIC", "READ", "ALREADY THERE", "SENT", "NOT SENT", "LOST", "STATE"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for one in reports {
        let state = match &one.parked {
            Some(why) => format!("PARKED: {why}"),
            None if one.unsent() > 0 => "NOT DONE".to_owned(),
            None if one.renewed => "ok, under another incarnation: the cloud held other records".to_owned(),
            None => "ok".to_owned(),
        };
        let counts = [one.read, one.already, one.sent, one.unsent(), one.lost].map(|count| count.to_string());
        let mut row = vec![one.name.to_string(), one.topic.to_string()];
        row.extend(counts);
        row.push(state);
        rows.push(row);
    }
    let mut text = daemon::admin::table(&rows);
    for one in reports.iter().filter(|one| one.lost > 0) {
        let ranges: Vec<String> = one.lost_at.iter().map(|(from, to)| format!("{from}-{}", to - 1)).collect();
        let more = if one.lost_at.len() == RANGES_MAX { " and more" } else { "" };
        let _ = writeln!(text, "lost of {}: offsets {}{more}", one.name, ranges.join(", "));
    }
    text
}

#[cfg(test)]
pub(crate) mod cloud;
#[cfg(test)]
mod tests;
