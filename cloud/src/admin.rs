//! The admin port: what the cloud tells about itself, as status and metrics, and how a person sees it.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::Arc;

use daemon::admin::{AdminPort, Observed, table};
use daemon::metrics::Metrics;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use serde::Serialize;
use shared::door::DoorStatus;
use shared::name::{EdgeId, Offset, StreamName, TimestampMs, TopicName};
use tokio::sync::watch;

use crate::archive::{Archive, ArchiveStatus, CacheStatus, Presence, PresenceStatus};
use crate::front::{Broker, FrontStatus};
use crate::groups::GroupsStatus;
use crate::ingest::Safety as _;
use crate::ingest::{Ingest, IngestStatus};
use crate::shard::{PartitionStatus, ROOM_BYTES, ShardStatus};
use crate::shards::{Member, Shards};
use crate::state::{CoordinatorSlot, Engine, State, StateLog as _, read_state};

/// Everything a running cloud node can be asked about.
#[derive(Clone)]
pub struct Node {
    /// This node's number.
    pub node_id: i32,
    /// Which system it belongs to.
    pub cluster_id: String,
    /// The log.
    pub shards: Arc<Shards>,
    /// What rests in the bucket, by shard.
    pub archives: BTreeMap<u32, Arc<Archive>>,
    /// The Kafka front.
    pub broker: Arc<Broker>,
    /// The link.
    pub ingest: Arc<Ingest>,
    /// True once the node is told to stop.
    pub stopping: watch::Receiver<bool>,
    /// The admin port itself.
    pub admin: AdminPort,
    /// Its heartbeat in the bucket; none where archiving is off.
    pub presence: Option<Arc<Presence>>,
}

#[derive(Serialize)]
struct Status {
    version: &'static str,
    node_id: i32,
    cluster_id: String,
    ready: Result<(), String>,
    ready_for_produce: Result<(), String>,
    heartbeat: Option<PresenceStatus>,
    shards: Vec<ShardRow>,
    kafka: FrontStatus,
    groups: GroupsStatus,
    link: IngestStatus,
    topics: Vec<TopicStatus>,
    edges: Vec<EdgeStatus>,
}

#[derive(Serialize)]
struct ShardRow {
    engine: Engine,
    #[serde(flatten)]
    shard: ShardStatus,
    /// Coordinator slots in it: what groups of these commit is durable when this shard answers.
    slots: Vec<u8>,
    archive: Option<ArchiveStatus>,
}

#[derive(Serialize)]
struct TopicStatus {
    name: String,
    engine: Engine,
    partitions: Vec<PartitionRow>,
}

#[derive(Serialize)]
struct PartitionRow {
    partition: u32,
    log_start: Offset,
    high_watermark: Offset,
    bytes: u64,
    archived: Offset,
}

#[derive(Serialize)]
struct EdgeStatus {
    id: EdgeId,
    seen_ms: TimestampMs,
    streams: Vec<StreamRow>,
}

#[derive(Serialize)]
struct StreamRow {
    stream: StreamName,
    incarnation: String,
    topic: Option<TopicName>,
    partition: u32,
    next: Offset,
    safe: Option<Offset>,
}

impl Node {
    fn edges(&self) -> Vec<EdgeStatus> {
        let mut edges: BTreeMap<EdgeId, EdgeStatus> = BTreeMap::new();
        let streams = self.shards.streams();
        let mut names = BTreeMap::new();
        self.shards.with_state(&mut |state| {
            for (id, edge) in state.edges() {
                let status = EdgeStatus { id: id.clone(), seen_ms: edge.seen_ms, streams: Vec::new() };
                edges.insert(id.clone(), status);
            }
            names.extend(state.topics().map(|topic| (topic.id, topic.name.clone())));
        });
        for (key, stream) in streams {
            let Some(edge) = edges.get_mut(&key.edge) else { continue };
            edge.streams.push(StreamRow {
                safe: self.shards.safe(&key),
                stream: key.stream,
                incarnation: key.incarnation.to_string(),
                topic: names.get(&stream.partition.topic).cloned(),
                partition: stream.partition.index,
                next: stream.next,
            });
        }
        edges.into_values().collect()
    }

    fn topics(&self) -> Vec<TopicStatus> {
        let mut topics: BTreeMap<String, TopicStatus> = BTreeMap::new();
        for member in self.shards.members() {
            for status in member.shard.partitions() {
                let PartitionStatus { topic, index, log_start, high_watermark, bytes, archived } = status;
                let row = PartitionRow { partition: index, log_start, high_watermark, bytes, archived };
                let new = |name| TopicStatus { name, engine: member.engine, partitions: Vec::new() };
                topics.entry(topic.clone()).or_insert_with(|| new(topic)).partitions.push(row);
            }
        }
        let mut topics: Vec<TopicStatus> = topics.into_values().collect();
        topics.iter_mut().for_each(|topic| topic.partitions.sort_by_key(|row| row.partition));
        topics
    }

    fn slots(&self, member: &Member) -> Vec<u8> {
        let here = |state: &State| {
            let slots = CoordinatorSlot::all().filter(|slot| state.slot_shard(*slot) == member.number);
            slots.map(CoordinatorSlot::number).collect()
        };
        read_state(&*self.shards, here)
    }

    fn shards(&self) -> Vec<ShardRow> {
        let row = |member: &Member| ShardRow {
            engine: member.engine,
            shard: member.shard.status(),
            slots: self.slots(member),
            archive: self.archives.get(&member.number).map(|archive| archive.status()),
        };
        self.shards.members().iter().map(row).collect()
    }
}

impl Observed for Node {
    fn ready(&self) -> Result<(), String> {
        if *self.stopping.borrow() {
            return Err("the node is stopping".to_owned());
        }
        for Member { number, engine, shard } in self.shards.members() {
            if let Some(why) = shard.status().stopped {
                return Err(format!("shard {number} ({engine}) has stopped: {why}"));
            }
        }
        Ok(())
    }

    fn ready_for(&self, what: &str) -> Option<Result<(), String>> {
        if what != "produce" {
            return None;
        }
        let room = |Member { number, engine, shard }: &Member| {
            let refused = |why| format!("shard {number} ({engine}) takes no records now: {why}");
            shard.produce_room(ROOM_BYTES).map_err(refused)
        };
        Some(self.ready().and_then(|()| self.shards.members().iter().try_for_each(room)))
    }

    fn status(&self) -> serde_json::Value {
        let status = Status {
            version: env!("CARGO_PKG_VERSION"),
            node_id: self.node_id,
            cluster_id: self.cluster_id.clone(),
            ready: self.ready(),
            ready_for_produce: self.ready_for("produce").unwrap_or(Ok(())),
            heartbeat: self.presence.as_ref().map(|presence| presence.status()),
            shards: self.shards(),
            kafka: self.broker.status(),
            groups: self.broker.groups.status(),
            link: self.ingest.status(),
            topics: self.topics(),
            edges: self.edges(),
        };
        serde_json::to_value(status).unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() }))
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({})", self.node_id)
    }
}

impl Collector for Node {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut metrics = Metrics::new(encoder);
        self.shard_metrics(&mut metrics)?;
        self.archive_metrics(&mut metrics)?;
        self.front_metrics(&mut metrics)?;
        self.door_metrics(&mut metrics)
    }
}

impl Node {
    fn door_metrics(&self, metrics: &mut Metrics<'_>) -> fmt::Result {
        let doors = [("kafka", self.broker.door()), ("link", self.ingest.door()), ("admin", self.admin.door.status())];
        let each = |count: fn(&DoorStatus) -> u64| doors.map(|(name, door)| (vec![("listener", name)], count(&door)));
        let now = each(|door| door.connections).map(|(labels, count)| (labels, count as f64));
        metrics.gauges("tributary_cloud_connections", "Connections by kind of listener", now)?;
        let help = "Connections closed at once: as many were open as are allowed";
        metrics.counters("tributary_cloud_connections_refused", help, each(|door| door.refused))?;
        let help = "Connections that never showed who they are, closed in favour of others";
        metrics.counters("tributary_cloud_connections_evicted", help, each(|door| door.evicted))?;
        let failed = [("link", self.ingest.failed_logins()), ("admin", self.admin.throttle.failed_total())];
        let failed = failed.map(|(name, count)| (vec![("listener", name)], count));
        metrics.counters("tributary_cloud_failed_logins", "Requests with a wrong or no token", failed)
    }

    fn shard_metrics(&self, metrics: &mut Metrics<'_>) -> fmt::Result {
        let ready = if self.ready().is_ok() { 1.0 } else { 0.0 };
        metrics.gauge("tributary_cloud_ready", "1 while clients can be served", ready)?;
        let shards = PerShard(self.shards.members().iter().map(|m| (labels(m), m.shard.status())).collect());
        shards.gauge(metrics, "tributary_cloud_leader_epoch", "The newest leader epoch", |s| s.leader_epoch.into())?;
        shards.gauge(metrics, "tributary_cloud_wal_bytes", "Bytes of blocks in the log", |s| s.wal.bytes as f64)?;
        let help = "1 while the next MiB of records would be taken";
        let takes = |s: &ShardStatus| if s.no_room.is_none() { 1.0 } else { 0.0 };
        shards.gauge(metrics, "tributary_cloud_produce_ready", help, takes)?;
        let help = "Part of the room for records that is taken; at 1 the next MiB is refused";
        shards.gauge(metrics, "tributary_cloud_wal_budget_ratio", help, |s| s.full_ratio)?;
        let refused = shards.0.iter().flat_map(|(labels, status)| {
            status.refused_batches.by_reason().map(|(reason, count)| {
                let mut labels = borrowed(labels);
                labels.push(("reason", reason));
                (labels, count)
            })
        });
        let help = "Batches refused although nothing was wrong with them";
        metrics.counters("tributary_cloud_produce_refused", help, refused)?;
        let free =
            shards.0.iter().filter_map(|(labels, status)| Some((borrowed(labels), status.disk_free_bytes? as f64)));
        metrics.gauges("tributary_cloud_disk_free_bytes", "What the log's disk has left", free)?;
        let waits = |s: &ShardStatus| s.in_flight_bytes as f64;
        shards.gauge(metrics, "tributary_cloud_in_flight_bytes", "Bytes that wait for durability", waits)?;
        shards.counter(metrics, "tributary_cloud_written_bytes", "Bytes of blocks made durable", |s| s.block_bytes)?;
        shards.counter(metrics, "tributary_cloud_batches", "Batches made durable", |s| s.batches)?;
        let help = "Commits of changes refused because too many wait for durability";
        shards.counter(metrics, "tributary_cloud_refused_changes", help, |s| s.refused_changes)?;
        let slots = PerShard(self.shards.members().iter().map(|m| (labels(m), self.slots(m).len())).collect());
        let help = "Age of the oldest block that is in no bucket yet";
        shards.gauge(metrics, "tributary_cloud_archive_lag_seconds", help, |s| s.unshipped_ms as f64 / 1e3)?;
        let help = "Bytes of blocks that are in no bucket yet";
        shards.gauge(metrics, "tributary_cloud_archive_waiting_bytes", help, |s| s.unshipped_bytes as f64)?;
        let help = "Coordinator slots whose groups' offsets are in the shard";
        slots.gauge(metrics, "tributary_cloud_coordinator_slots", help, |slots| *slots as f64)?;
        metrics.histograms(
            "tributary_cloud_commit_seconds",
            "Time an append to the log took",
            shards.0.iter().map(|(labels, status)| (borrowed(labels), &status.commit_seconds)),
        )
    }

    fn archive_metrics(&self, metrics: &mut Metrics<'_>) -> fmt::Result {
        let members = self.shards.members().iter();
        let archived = members.filter_map(|m| Some((labels(m), self.archives.get(&m.number)?.status())));
        let archives = PerShard(archived.collect());
        let claimed = |a: &ArchiveStatus| if a.state == "claimed" { 1.0 } else { 0.0 };
        let help = "1 while this node owns the shard in the bucket";
        archives.gauge(metrics, "tributary_cloud_archive_claimed", help, claimed)?;
        let confirmed = |a: &ArchiveStatus| a.confirmed_age_ms.map_or(f64::INFINITY, |age| age as f64 / 1e3);
        let help = "How long ago the bucket last said that the shard is this node's";
        archives.gauge(metrics, "tributary_cloud_archive_confirmed_age_seconds", help, confirmed)?;
        if let Some(age_ms) = self.presence.as_ref().and_then(|presence| presence.status().age_ms) {
            let help = "How long ago this node's heartbeat was written";
            metrics.gauge("tributary_cloud_heartbeat_age_seconds", help, age_ms as f64 / 1e3)?;
        }
        archives.gauge(metrics, "tributary_cloud_archive_segments", "Segment objects", |a| a.segments as f64)?;
        archives
            .gauge(metrics, "tributary_cloud_archive_segment_bytes", "Bytes of them", |a| a.segment_bytes as f64)?;
        let help = "Rounds that failed and are repeated";
        archives.counter(metrics, "tributary_cloud_archive_errors", help, |a| a.errors)?;
        let requests = archives.0.iter().flat_map(|(labels, a)| {
            let kinds = [
                ("put", a.puts),
                ("get", a.gets),
                ("list", a.lists),
                ("delete", a.deletes),
                ("failed", a.request_errors),
                ("repeated", a.retries),
                ("not_repeated", a.retries_refused),
            ];
            kinds.map(|(kind, count)| {
                let mut labels = borrowed(labels);
                labels.push(("request", kind));
                (labels, count)
            })
        });
        metrics.counters("tributary_cloud_archive_requests", "Requests to the object store", requests)?;
        archives.counter(metrics, "tributary_cloud_archive_written_bytes", "Bytes put", |a| a.put_bytes)?;
        archives.counter(metrics, "tributary_cloud_archive_read_bytes", "Bytes got", |a| a.get_bytes)?;
        let help = "Milliseconds that bodies waited for the bandwidth limit";
        archives.counter(metrics, "tributary_cloud_archive_paced_milliseconds", help, |a| a.paced_ms)?;
        let per_cache = |count: fn(&CacheStatus) -> [u64; 2]| {
            archives.0.iter().flat_map(move |(labels, a)| {
                ["memory", "disk"].into_iter().zip(count(&a.cache)).map(|(cache, count)| {
                    let mut labels = borrowed(labels);
                    labels.push(("cache", cache));
                    (labels, count)
                })
            })
        };
        let hits = per_cache(|cache| [cache.memory_hits, cache.disk_hits]);
        metrics.counters("tributary_cloud_archive_cache_hits", "Chunks of archived records found in a cache", hits)?;
        let misses = per_cache(|cache| [cache.memory_misses, cache.disk_misses]);
        metrics.counters("tributary_cloud_archive_cache_misses", "Chunks not found there", misses)?;
        let help = "Chunks fetched before they were wanted";
        archives.counter(metrics, "tributary_cloud_archive_read_ahead", help, |a| a.cache.ahead)?;
        // All shards share one disk cache.
        let disk = archives.0.first().map(|(_, archive)| &archive.cache);
        let bytes = disk.map_or(0.0, |disk| disk.disk_bytes as f64);
        metrics.gauge("tributary_cloud_archive_disk_cache_bytes", "Archived records kept on the local disk", bytes)?;
        let is_off = if disk.is_some_and(|disk| disk.disk_is_off) { 1.0 } else { 0.0 };
        metrics.gauge("tributary_cloud_archive_disk_cache_off", "1 since the disk refused to hold the cache", is_off)
    }

    fn front_metrics(&self, metrics: &mut Metrics<'_>) -> fmt::Result {
        let kafka = self.broker.status();
        metrics.gauge("tributary_cloud_kafka_connections", "Kafka connections", kafka.connections as f64)?;
        metrics.counter("tributary_cloud_kafka_requests", "Kafka requests", kafka.requests)?;
        metrics.counter("tributary_cloud_kafka_produced_bytes", "Bytes of batches produced", kafka.produced_bytes)?;
        metrics.counter("tributary_cloud_kafka_fetched_bytes", "Bytes of batches consumed", kafka.fetched_bytes)?;
        metrics.counter("tributary_cloud_kafka_refused_batches", "Batches refused", kafka.refused_batches)?;
        let link = self.ingest.status();
        metrics.gauge(
            "tributary_cloud_edges_connected",
            "Edges that said hello since the start",
            link.edges.len() as f64,
        )?;
        metrics.counter("tributary_cloud_link_records", "Records received from edges", link.records)?;
        metrics.counter("tributary_cloud_link_bytes", "Bytes of sealed batches received", link.bytes)?;
        metrics.counter("tributary_cloud_link_duplicates", "Batches that were stored already", link.duplicates)?;
        metrics.counter("tributary_cloud_link_rejected", "Records set aside in .rejected topics", link.rejected)?;
        metrics.counter("tributary_cloud_link_gaps", "Gaps that edges declared", link.gaps)?;
        metrics.counter("tributary_cloud_link_refused", "Link requests refused", link.refused)?;
        metrics.counter("tributary_cloud_link_takeovers", "Sessions taken over", link.takeovers)?;
        let renewed = link.new_incarnations;
        metrics.counter("tributary_cloud_link_new_incarnations", "Streams under a new incarnation", renewed)
    }
}

/// What tells one shard's series from another's.
type ShardLabels = [(&'static str, String); 2];

fn labels(member: &Member) -> ShardLabels {
    [("shard", member.number.to_string()), ("engine", member.engine.name().to_owned())]
}

fn borrowed(labels: &ShardLabels) -> Vec<(&'static str, &str)> {
    labels.iter().map(|(name, value)| (*name, value.as_str())).collect()
}

/// One status per shard, written as one series each.
struct PerShard<T>(Vec<(ShardLabels, T)>);

impl<T> PerShard<T> {
    fn gauge(&self, metrics: &mut Metrics<'_>, name: &str, help: &str, value: impl Fn(&T) -> f64) -> fmt::Result {
        metrics.gauges(name, help, self.0.iter().map(|(labels, status)| (borrowed(labels), value(status))))
    }

    fn counter(&self, metrics: &mut Metrics<'_>, name: &str, help: &str, value: impl Fn(&T) -> u64) -> fmt::Result {
        metrics.counters(name, help, self.0.iter().map(|(labels, status)| (borrowed(labels), value(status))))
    }
}

/// What `tributary-cloud status` prints.
pub fn render(status: &serde_json::Value) -> String {
    let text = |value: &serde_json::Value| match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let heading = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let mut out = String::new();
    let _ = writeln!(out, "node {}  cluster {}", text(&status["node_id"]), text(&status["cluster_id"]));
    if let Some(why) = status["ready"]["Err"].as_str() {
        let _ = writeln!(out, "NOT READY: {why}");
    } else if let Some(why) = status["ready_for_produce"]["Err"].as_str() {
        let _ = writeln!(out, "NOT READY FOR PRODUCE: {why}");
    }
    let mut rows = vec![heading(&[
        "SHARD",
        "ENGINE",
        "EPOCH",
        "SLOTS",
        "BLOCKS",
        "WAL BYTES",
        "ARCHIVE",
        "STATE",
        "CONFIRMED MS AGO",
        "LAG MS",
    ])];
    for shard in list(&status["shards"]) {
        let archive = &shard["archive"];
        let state = match (&archive["ships"], shard["engine"].as_str()) {
            (serde_json::Value::Bool(true), _) if !shard["holds_back"].is_null() => "not confirmed".to_owned(),
            (serde_json::Value::Bool(true), _) => text(&archive["state"]),
            (_, Some("memory")) => "nothing survives a restart".to_owned(),
            _ => "local: safe means durable".to_owned(),
        };
        rows.push(vec![
            text(&shard["shard"]),
            text(&shard["engine"]),
            text(&shard["epoch"]),
            list(&shard["slots"]).len().to_string(),
            text(&shard["next_seq"]),
            text(&shard["wal"]["bytes"]),
            text(&archive["archive"]),
            state,
            text(&archive["confirmed_age_ms"]),
            text(&shard["unshipped_ms"]),
        ]);
    }
    let _ = write!(out, "\n{}", table(&rows));
    let mut rows = vec![heading(&["TOPIC", "PARTITION", "LOG START", "HIGH WATERMARK", "BYTES", "ARCHIVED"])];
    for topic in list(&status["topics"]) {
        for row in list(&topic["partitions"]) {
            let fields = ["partition", "log_start", "high_watermark", "bytes", "archived"];
            let cells = fields.iter().map(|field| text(&row[*field]));
            rows.push(std::iter::once(text(&topic["name"])).chain(cells).collect());
        }
    }
    let _ = write!(out, "\n{}", table(&rows));
    let mut rows = vec![heading(&["EDGE", "STREAM", "TOPIC", "PARTITION", "NEXT", "SAFE", "INCARNATION"])];
    for edge in list(&status["edges"]) {
        for stream in list(&edge["streams"]) {
            let fields = ["stream", "topic", "partition", "next", "safe", "incarnation"];
            let cells = fields.iter().map(|field| text(&stream[*field]));
            rows.push(std::iter::once(text(&edge["id"])).chain(cells).collect());
        }
    }
    let _ = write!(out, "\n{}", table(&rows));
    out
}
