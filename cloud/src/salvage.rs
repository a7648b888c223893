//! `tributary-cloud salvage`: sends what a deposed node alone has to the node that has its shards now.
//!
//! A node with a log on its disk acknowledges what it ships up to `archive.max_lag` later. When another node takes its shards
//! over, the last of that is on its disk alone. This command finds those blocks (see [`crate::archive::Departure`]), takes
//! the batches of Kafka clients out of them, and produces them to the same topics and partitions of the new owner, in order,
//! under a producer id of its own: run again, it goes on where it was, and nothing is stored twice.
//!
//! The node must be stopped. Its log is opened as a start opens it, and nothing is written to the archive.

mod batches;
mod client;
mod journal;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use clap::Args;
use daemon::admin::table;
use daemon::settings::SettingsArgs;
use kafka_wire::ErrorCode;
use shared::batch::Batch;
use shared::name::{Offset, Partition};
use tokio::time::Instant;

use crate::archive::{
    Archive, ArchiveSettings, DataDirLock, Departure, LocalBlocks as _, Presence, PresenceSettings, Store,
    cluster_id_in,
};
use crate::block::Block;
use crate::config::CloudConfig;
use crate::shard::{LocalWal, fold};
use crate::state::{Change, GroupChange, Groups, State, TopicChange};
use crate::wal::disk::Directory;
use crate::wal::file::{FileWal, FileWalSettings};
use batches::{BatchContent, BatchOrigin, batches, produced_by, sequence_after};
use client::{ClientError, KafkaClient, KafkaTarget};
use journal::{SalvageJournal, SentUpTo};

/// How long one batch is tried again, if the broker says that it may succeed later.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(500);
/// How often it says how far it is.
const PROGRESS: Duration = Duration::from_secs(2);

/// Everything was sent.
const DONE: i32 = 0;
/// Something was not.
const LEFT: i32 = 1;

/// What to send, and where to.
#[derive(Debug, Args)]
pub struct SalvageArgs {
    /// Settings of the node that was deposed.
    #[command(flatten)]
    pub settings: SettingsArgs,
    /// A Kafka listener of the node that has the shards now.
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    /// Connects with TLS and trusts the certificates in this PEM file.
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Only says what would be sent.
    #[arg(long)]
    dry_run: bool,
}

/// A stopped shard: its log, and where it left the bucket's history.
struct StoppedShard {
    number: u32,
    wal: FileWal,
    departure: Departure,
}

/// A block of a stopped shard's log.
#[derive(Clone, Copy)]
struct BlockPlace {
    shard: u32,
    seq: u64,
    crc: u32,
}

/// What became of a partition's batches.
#[derive(Debug, Default)]
struct SalvageRow {
    batches: u64,
    sent: u64,
    sent_records: u64,
    /// SentUpTo by an earlier run, or by its own client.
    there: u64,
    edges: u64,
    untold: u64,
    left: u64,
    why: Option<String>,
}

/// What is told at the end besides partitions.
#[derive(Debug, Default)]
struct SalvageWords {
    commits: u64,
    groups: BTreeSet<String>,
    created: BTreeSet<String>,
    deleted: u64,
}

/// Runs the command on the terminal; returns the exit code.
pub async fn run(
    args: &SalvageArgs,
    config: &CloudConfig,
    environment: Vec<(String, String)>,
    out: &mut dyn Write,
) -> anyhow::Result<i32> {
    let data_dir = std::path::absolute(&config.data_dir)?;
    ensure!(
        data_dir.is_dir(),
        "data_dir = \"{}\" is not there: name the deposed node's with --config or --data-dir",
        data_dir.display()
    );
    let lock = DataDirLock::acquire(&data_dir)?;
    let cluster_id =
        cluster_id_in(&data_dir)?.context("this data directory belongs to no system: nothing was ever stored here")?;
    let url = config.archive_url().map_err(|text| anyhow!(text))?;
    let url = url.context("[archive] url = \"off\": no other node can have taken this one's shards over")?;
    let options = config.archive.store_options(environment);
    let mut stopped = Vec::new();
    for (number, directory) in wal_directories(&data_dir)? {
        let wal = open_wal(config, &directory)?;
        let open = || Store::open_existing(&url, &options, config.archive.requests());
        let mirror = Store::directory(&data_dir.join("manifest"), config.archive.requests())?;
        let presence = Some(Presence::with_store(open()?, looking_as(config, &lock, &data_dir)));
        let settings =
            ArchiveSettings { data_dir: data_dir.clone(), shard: number, presence, ..ArchiveSettings::default() };
        let archive = Archive::looking(settings, open()?, Some(mirror), cluster_id.clone());
        let departure = archive.departure(&LocalWal(&wal)).await.with_context(|| format!("shard {number}"))?;
        match departure {
            Some(departure) => stopped.push(StoppedShard { number, wal, departure }),
            None => writeln!(
                out,
                "shard {number}: no other node has claimed it; what is here is shipped when this node is started"
            )?,
        }
    }
    ensure!(
        !stopped.is_empty(),
        "no other node has claimed a shard of this data directory: start this node again, nothing is to be sent"
    );
    let client = KafkaClient::new(KafkaTarget { address: args.to.clone(), ca_file: args.ca_file.clone() });
    let mut salvage = Salvage {
        client,
        data_dir,
        cluster_id,
        journal: None,
        dry_run: args.dry_run,
        rows: BTreeMap::new(),
        words: SalvageWords::default(),
        scanned: BTreeMap::new(),
        told: Instant::now(),
    };
    salvage.greet().await?;
    for shard in &stopped {
        let Departure { first, certain, next, epoch, .. } = shard.departure;
        match next.saturating_sub(first) {
            0 => writeln!(
                out,
                "shard {}: another node has it, epoch {epoch}; all of it is in the archive",
                shard.number
            )?,
            blocks => writeln!(
                out,
                "shard {}: another node has it, epoch {epoch}; {blocks} blocks, {first} to {}, are here alone",
                shard.number,
                next - 1
            )?,
        }
        if certain > first {
            writeln!(
                out,
                "shard {}: whether the new owner has blocks {first} to {} cannot be told, as they are in segments by now if it \
                 has; they are sent, and what no idempotent client wrote of them may be there twice",
                shard.number,
                certain - 1
            )?;
        }
        salvage.shard(shard).await.with_context(|| format!("shard {}", shard.number))?;
    }
    salvage.report(out)
}

/// As whom it looks whether another owner lives. It never beats.
fn looking_as(config: &CloudConfig, lock: &DataDirLock, data_dir: &Path) -> PresenceSettings {
    PresenceSettings {
        node_id: config.node_id,
        identity: lock.identity(),
        kafka: Vec::new(),
        link_url: None,
        host: String::new(),
        data_dir: data_dir.display().to_string(),
        take_over: false,
    }
}

/// The file shards of a data directory.
fn wal_directories(data_dir: &Path) -> anyhow::Result<Vec<(u32, PathBuf)>> {
    let mut found = Vec::new();
    let first = data_dir.join("wal");
    if first.is_dir() {
        found.push((0, first));
    }
    let shards = data_dir.join("shards");
    if shards.is_dir() {
        for entry in std::fs::read_dir(&shards).with_context(|| shards.display().to_string())? {
            let entry = entry?;
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            found.extend(number.map(|number| (number, entry.path().join("wal"))).filter(|(_, path)| path.is_dir()));
        }
    }
    found.sort_unstable();
    ensure!(
        !found.is_empty(),
        "{} holds no log of a file shard: what object shards acknowledged is in the bucket",
        data_dir.display()
    );
    Ok(found)
}

fn open_wal(config: &CloudConfig, directory: &Path) -> anyhow::Result<FileWal> {
    let settings = FileWalSettings {
        file_bytes: config.wal.file_bytes.0,
        bytes_max: config.wal.bytes_max.0,
        background: false,
        ..FileWalSettings::default()
    };
    Ok(FileWal::open(Box::new(Directory::open(directory)?), settings, crate::archive::random())?)
}

struct Salvage {
    client: KafkaClient,
    data_dir: PathBuf,
    cluster_id: String,
    journal: Option<SalvageJournal>,
    dry_run: bool,
    rows: BTreeMap<(String, u32), SalvageRow>,
    words: SalvageWords,
    /// What clients have sent to the new owner since, by partition.
    scanned: BTreeMap<Partition, BTreeSet<BatchContent>>,
    told: Instant,
}

impl Salvage {
    /// Makes sure that it is the right system that is sent to.
    async fn greet(&mut self) -> anyhow::Result<()> {
        let there = self.client.cluster_id().await?.unwrap_or_default();
        ensure!(
            there == self.cluster_id,
            "the broker at --to belongs to system {there:?}, this data directory to {:?}: name the node that has taken this one's shards over",
            self.cluster_id
        );
        self.journal = SalvageJournal::read(&self.data_dir, &self.cluster_id)?;
        if self.journal.is_none() && !self.dry_run {
            let producer = self.client.producer_id().await?;
            self.journal = Some(SalvageJournal::begin(&self.data_dir, &self.cluster_id, producer)?);
        }
        Ok(())
    }

    /// Goes through a shard's blocks: those of the common history make its state, those after it are sent.
    async fn shard(&mut self, shard: &StoppedShard) -> anyhow::Result<()> {
        let Departure { snapshot, first, next, .. } = &shard.departure;
        let (mut state, from) = match snapshot {
            Some(snapshot) => (State::decode(&snapshot.state)?, snapshot.next_seq),
            None => (State::default(), 0),
        };
        let local = LocalWal(&shard.wal);
        if let Some(journal) = &mut self.journal {
            journal.keep_places_in(shard.number, |seq| local.read(seq).ok().map(|block| crc32c::crc32c(&block)));
        }
        // Where the new owner goes on, by partition.
        let mut ends: Option<BTreeMap<Partition, Offset>> = None;
        for seq in from..*next {
            let bytes = local.read(seq)?;
            let at = BlockPlace { shard: shard.number, seq, crc: crc32c::crc32c(&bytes) };
            let block = Block::parse(bytes).map_err(|error| anyhow!("block {seq}: {error}"))?;
            if seq >= *first {
                if ends.is_none() {
                    ends =
                        Some(state.partitions().map(|(partition, state)| (*partition, state.high_watermark)).collect());
                }
                let found = batches(&state, &block)?;
                self.hear(&mut state, &block)?;
                self.block(&state, at, found, ends.as_ref().unwrap_or(&BTreeMap::new())).await?;
                self.tell(shard.number, seq, *next);
            } else {
                fold(&mut state, &block).map_err(|error| anyhow!("block {seq}: {error}"))?;
            }
        }
        Ok(())
    }

    /// Folds a block in that only this node has, and notes what of it is not sent.
    fn hear(&mut self, state: &mut State, block: &Block) -> anyhow::Result<()> {
        for change in fold(state, block)? {
            match change {
                Change::Guest(change) => {
                    if let Some(GroupChange::OffsetCommitted { group, .. }) = change.read::<Groups>() {
                        self.words.commits += 1;
                        self.words.groups.insert(group);
                    }
                }
                Change::Topics(TopicChange::Created { topic, .. }) => {
                    self.words.created.insert(topic.name.to_string());
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn block(
        &mut self,
        state: &State,
        place: BlockPlace,
        found: BTreeMap<Partition, Vec<(Batch, BatchOrigin)>>,
        ends: &BTreeMap<Partition, Offset>,
    ) -> anyhow::Result<()> {
        for (partition, batches) in found {
            let Some(topic) = state.topic(partition.topic).map(|topic| topic.name.to_string()) else {
                self.words.deleted += batches.len() as u64;
                continue;
            };
            let end = ends.get(&partition).copied().unwrap_or(0);
            for (at, (batch, writer)) in (1u32..).zip(batches) {
                let row = self.rows.entry((topic.clone(), partition.index)).or_default();
                match writer {
                    BatchOrigin::Broker => continue,
                    BatchOrigin::Edge => {
                        row.edges += 1;
                        continue;
                    }
                    BatchOrigin::Untold => row.untold += 1,
                    BatchOrigin::Client => {}
                }
                row.batches += 1;
                if row.why.is_some() {
                    // What comes after one that could not be sent would be out of order.
                    row.left += 1;
                    continue;
                }
                if let Err(why) = self.batch(&topic, partition, (place, at), &batch, end).await? {
                    let row = self.rows.entry((topic.clone(), partition.index)).or_default();
                    row.left += 1;
                    row.why = Some(why);
                }
            }
        }
        Ok(())
    }

    /// Sends one batch, unless it is there. The inner error says why it cannot be.
    async fn batch(
        &mut self,
        topic: &str,
        partition: Partition,
        (place, at): (BlockPlace, u32),
        batch: &Batch,
        end: Offset,
    ) -> anyhow::Result<Result<(), String>> {
        let (key, index) = (partition.to_string(), partition.index as i32);
        let sent = self.journal.as_ref().map(|journal| journal.sent(&key)).unwrap_or_default();
        let is_noted = (place.seq, at) <= (sent.block, sent.batches);
        let is_there = match BatchContent::of(batch).filter(|_| !is_noted) {
            Some(content) => match self.scanned(topic, partition, end).await? {
                Ok(scanned) => scanned.contains(&content),
                Err(why) => return Ok(Err(why)),
            },
            None => false,
        };
        let records = u64::from(batch.record_count().unsigned_abs());
        let row = self.rows.entry((topic.to_owned(), partition.index)).or_default();
        if is_noted || is_there {
            row.there += 1;
        } else if self.dry_run {
            row.left += 1;
            return Ok(Ok(()));
        }
        let mut next = sent;
        if !is_noted && !is_there {
            let producer = self.journal.as_ref().context("a journal was begun")?.producer();
            let bytes = produced_by(batch, producer, sent.sequence);
            if let Err(why) = self.produce(topic, index, bytes).await? {
                return Ok(Err(why));
            }
            let row = self.rows.entry((topic.to_owned(), partition.index)).or_default();
            row.sent += 1;
            row.sent_records += records;
            next.sequence = sequence_after(sent.sequence, batch);
        }
        if !is_noted && let Some(journal) = &mut self.journal {
            let BlockPlace { shard, seq, crc } = place;
            journal.note(&key, SentUpTo { shard, block_crc: crc, block: seq, batches: at, ..next })?;
        }
        Ok(Ok(()))
    }

    /// Sends one batch until it is durable. The inner error is one that trying again does not mend.
    async fn produce(&mut self, topic: &str, index: i32, bytes: bytes::Bytes) -> anyhow::Result<Result<(), String>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let why = match self.client.produce(topic, index, bytes.clone()).await {
                Ok((ErrorCode::NONE, _)) => return Ok(Ok(())),
                Ok((ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, _)) => {
                    let text = "the new owner has no such partition: make the topic there, with as many partitions, and run this again";
                    return Ok(Err(text.into()));
                }
                Ok((code, message)) if !is_retriable(code) => {
                    return Ok(Err(format!("refused with {code}: {}", message.unwrap_or_default())));
                }
                Ok((code, message)) => format!("{code}: {}", message.unwrap_or_default()),
                // The same bytes again: the broker knows them if they came through.
                Err(error @ ClientError::Connection { .. }) => error.to_string(),
                Err(error) => return Err(error.into()),
            };
            ensure!(
                Instant::now() < deadline,
                "{topic}-{index} could not be sent within {PATIENCE:?}: {why}. Run this again, it goes on where it was"
            );
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// What idempotent clients have sent to a partition since the new owner has it: a client that got no answer here sends the
    /// same batch there.
    async fn scanned(
        &mut self,
        topic: &str,
        partition: Partition,
        from: Offset,
    ) -> anyhow::Result<Result<&BTreeSet<BatchContent>, String>> {
        if !self.scanned.contains_key(&partition) {
            let (mut found, mut next) = (BTreeSet::new(), from);
            loop {
                let fetched = self.client.fetch(topic, partition.index as i32, next).await?;
                match fetched.code {
                    ErrorCode::NONE => {}
                    ErrorCode::OFFSET_OUT_OF_RANGE if fetched.log_start > next => {
                        next = fetched.log_start;
                        continue;
                    }
                    // It has nothing that this node has not.
                    ErrorCode::OFFSET_OUT_OF_RANGE => break,
                    ErrorCode::UNKNOWN_TOPIC_OR_PARTITION => {
                        let text = "the new owner has no such partition: make the topic there, with as many partitions, and run this again";
                        return Ok(Err(text.into()));
                    }
                    code => return Ok(Err(format!("what is there already could not be read: {code}"))),
                }
                let mut records = fetched.records;
                let before = next;
                while let Ok(Some(batch)) = Batch::split_first(&mut records) {
                    next = next.max(batch.last_offset().saturating_add(1));
                    found.extend(BatchContent::of(&batch));
                }
                if next == before || next >= fetched.high_watermark {
                    break;
                }
            }
            self.scanned.insert(partition, found);
        }
        self.scanned.get(&partition).map(Ok).context("it was just scanned")
    }

    fn tell(&mut self, shard: u32, seq: u64, next: u64) {
        if self.told.elapsed() >= PROGRESS {
            self.told = Instant::now();
            let sent: u64 = self.rows.values().map(|row| row.sent_records).sum();
            eprintln!("shard {shard}: block {seq} of {next}, {sent} records sent");
        }
    }

    fn report(self, out: &mut dyn Write) -> anyhow::Result<i32> {
        let head =
            ["TOPIC", "PARTITION", "BATCHES", "SENT", "RECORDS", "THERE ALREADY", "NOT SENT", "OF GATEWAYS", "WHY"];
        let mut rows: Vec<Vec<String>> = vec![head.map(str::to_owned).to_vec()];
        let (mut left, mut edges, mut untold) = (0, 0, 0);
        for ((topic, index), row) in &self.rows {
            (left, edges, untold) = (left + row.left, edges + row.edges, untold + row.untold);
            let counts = [row.batches, row.sent, row.sent_records, row.there, row.left, row.edges];
            let cells = [topic.clone(), index.to_string()].into_iter().chain(counts.map(|count| count.to_string()));
            rows.push(cells.chain([row.why.clone().unwrap_or_default()]).collect());
        }
        writeln!(out, "{}", table(&rows))?;
        if edges > 0 {
            writeln!(
                out,
                "{edges} batches came from gateways and are not sent: none of them was safe, so each gateway still has them and sends them again. Not so for streams with engine = \"memory\" whose gateway was restarted since, or on_full = \"drop-oldest\""
            )?;
        }
        if untold > 0 {
            writeln!(
                out,
                "{untold} batches lie between a gateway's and cannot be told from them: they count as clients', and may be there twice"
            )?;
        }
        if self.words.commits > 0 {
            let groups: Vec<&str> = self.words.groups.iter().map(String::as_str).collect();
            writeln!(
                out,
                "{} offset commits are here alone and are not sent; these groups begin further back and read some records again: {}",
                self.words.commits,
                groups.join(", ")
            )?;
        }
        if !self.words.created.is_empty() {
            let created: Vec<&str> = self.words.created.iter().map(String::as_str).collect();
            writeln!(out, "topics that were made here alone: {}", created.join(", "))?;
        }
        if self.words.deleted > 0 {
            writeln!(
                out,
                "{} batches were of topics that this node had deleted, and are not sent",
                self.words.deleted
            )?;
        }
        if self.dry_run {
            writeln!(out, "nothing was sent (--dry-run)")?;
        }
        Ok(if left == 0 { DONE } else { LEFT })
    }
}

/// Whether the same request may succeed later.
fn is_retriable(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::REQUEST_TIMED_OUT
            | ErrorCode::NOT_LEADER_OR_FOLLOWER
            | ErrorCode::NOT_ENOUGH_REPLICAS
            | ErrorCode::NOT_ENOUGH_REPLICAS_AFTER_APPEND
            | ErrorCode::LEADER_NOT_AVAILABLE
            | ErrorCode::KAFKA_STORAGE_ERROR
    )
}
