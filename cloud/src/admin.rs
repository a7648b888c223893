//! The admin port: what the cloud tells about itself, as status and metrics, and how a person sees it.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::Arc;

use daemon::admin::{Observed, table};
use daemon::metrics::Metrics;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use serde::Serialize;
use shared::name::{EdgeId, Offset, StreamName, TimestampMs, TopicName};

use crate::archive::{Archive, ArchiveStatus};
use crate::front::{Broker, FrontStatus};
use crate::groups::GroupsStatus;
use crate::ingest::{Ingest, IngestStatus};
use crate::shard::{PartitionStatus, Shard, ShardStatus};
use crate::state::StateLog as _;

/// Everything a running cloud node can be asked about.
#[derive(Clone)]
pub struct Node {
    /// This node's number.
    pub node_id: i32,
    /// The log.
    pub shard: Arc<Shard>,
    /// What rests in the bucket.
    pub archive: Arc<Archive>,
    /// The Kafka front.
    pub broker: Arc<Broker>,
    /// The link.
    pub ingest: Arc<Ingest>,
}

#[derive(Serialize)]
struct Status {
    version: &'static str,
    node_id: i32,
    cluster_id: String,
    ready: Result<(), String>,
    shard: ShardStatus,
    archive: ArchiveStatus,
    kafka: FrontStatus,
    groups: GroupsStatus,
    link: IngestStatus,
    topics: Vec<TopicStatus>,
    edges: Vec<EdgeStatus>,
}

#[derive(Serialize)]
struct TopicStatus {
    name: String,
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
        let mut streams = Vec::new();
        self.shard.with_state(&mut |state| {
            for (id, edge) in state.edges() {
                let status = EdgeStatus { id: id.clone(), seen_ms: edge.seen_ms, streams: Vec::new() };
                edges.insert(id.clone(), status);
            }
            for (key, stream) in state.streams() {
                let topic = state.topic(stream.partition.topic).map(|topic| topic.name.clone());
                streams.push((key.clone(), *stream, topic));
            }
        });
        for (key, stream, topic) in streams {
            let Some(edge) = edges.get_mut(&key.edge) else { continue };
            edge.streams.push(StreamRow {
                safe: self.shard.safe(&key),
                stream: key.stream,
                incarnation: key.incarnation.to_string(),
                topic,
                partition: stream.partition.index,
                next: stream.next,
            });
        }
        edges.into_values().collect()
    }

    fn topics(&self) -> Vec<TopicStatus> {
        let mut topics: Vec<TopicStatus> = Vec::new();
        for PartitionStatus { topic, index, log_start, high_watermark, bytes, archived } in self.shard.partitions() {
            let row = PartitionRow { partition: index, log_start, high_watermark, bytes, archived };
            match topics.last_mut().filter(|last| last.name == topic) {
                Some(last) => last.partitions.push(row),
                None => topics.push(TopicStatus { name: topic, partitions: vec![row] }),
            }
        }
        topics
    }
}

impl Observed for Node {
    fn ready(&self) -> Result<(), String> {
        let status = self.shard.status();
        match status.stopped {
            Some(why) => Err(format!("the log takes nothing more: {why}")),
            None if status.wal.bytes >= status.wal.bytes_max => {
                Err(format!("the log is full ({} bytes): is the archive reachable?", status.wal.bytes))
            }
            None => Ok(()),
        }
    }

    fn status(&self) -> serde_json::Value {
        let status = Status {
            version: env!("CARGO_PKG_VERSION"),
            node_id: self.node_id,
            cluster_id: self.archive.cluster_id().to_owned(),
            ready: self.ready(),
            shard: self.shard.status(),
            archive: self.archive.status(),
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
        self.front_metrics(&mut metrics)
    }
}

impl Node {
    fn shard_metrics(&self, metrics: &mut Metrics<'_>) -> fmt::Result {
        let shard = self.shard.status();
        let ready = if self.ready().is_ok() { 1.0 } else { 0.0 };
        metrics.gauge("tributary_cloud_ready", "1 while records can be stored", ready)?;
        metrics.gauge("tributary_cloud_leader_epoch", "The newest leader epoch", f64::from(shard.leader_epoch))?;
        metrics.gauge("tributary_cloud_wal_bytes", "Bytes of blocks in the local log", shard.wal.bytes as f64)?;
        let ratio = shard.wal.bytes as f64 / shard.wal.bytes_max.max(1) as f64;
        metrics.gauge("tributary_cloud_wal_budget_ratio", "Part of the local log's bound that is taken", ratio)?;
        let in_flight = shard.in_flight_bytes as f64;
        metrics.gauge("tributary_cloud_in_flight_bytes", "Bytes that wait for durability", in_flight)?;
        metrics.counter("tributary_cloud_written_bytes", "Bytes of blocks made durable", shard.block_bytes)?;
        metrics.counter("tributary_cloud_batches", "Batches made durable", shard.batches)?;
        metrics.histogram(
            "tributary_cloud_commit_seconds",
            "Time an append to the local log took",
            &shard.commit_seconds,
        )?;
        metrics.counter("tributary_cloud_refused_full", "Appends refused for lack of room", shard.refused_full)
    }

    fn archive_metrics(&self, metrics: &mut Metrics<'_>) -> fmt::Result {
        let archive = self.archive.status();
        let lag = archive.lag_ms as f64 / 1e3;
        metrics.gauge("tributary_cloud_archive_lag_seconds", "How far the bucket is behind the log", lag)?;
        let claimed = if archive.state == "claimed" { 1.0 } else { 0.0 };
        metrics.gauge("tributary_cloud_archive_claimed", "1 while this node owns the shard in the bucket", claimed)?;
        metrics.gauge("tributary_cloud_archive_segments", "Segment objects", archive.segments as f64)?;
        metrics.gauge("tributary_cloud_archive_segment_bytes", "Bytes of them", archive.segment_bytes as f64)?;
        metrics.counter("tributary_cloud_archive_errors", "Rounds that failed and are repeated", archive.errors)?;
        let requests = [
            ("put", archive.puts),
            ("get", archive.gets),
            ("list", archive.lists),
            ("delete", archive.deletes),
            ("failed", archive.request_errors),
        ];
        let requests = requests.map(|(kind, count)| (vec![("request", kind)], count));
        metrics.counters("tributary_cloud_archive_requests", "Requests to the object store", requests)?;
        metrics.counter("tributary_cloud_archive_written_bytes", "Bytes put", archive.put_bytes)?;
        metrics.counter("tributary_cloud_archive_read_bytes", "Bytes got", archive.get_bytes)?;
        let cache = archive.cache;
        let tiers = |memory, disk| [(vec![("cache", "memory")], memory), (vec![("cache", "disk")], disk)];
        let (hits, misses) = (tiers(cache.memory_hits, cache.disk_hits), tiers(cache.memory_misses, cache.disk_misses));
        metrics.counters("tributary_cloud_archive_cache_hits", "Chunks of archived records found in a cache", hits)?;
        metrics.counters("tributary_cloud_archive_cache_misses", "Chunks not found there", misses)?;
        metrics.counter("tributary_cloud_archive_read_ahead", "Chunks fetched before they were wanted", cache.ahead)?;
        let bytes = cache.disk_bytes as f64;
        metrics.gauge("tributary_cloud_archive_disk_cache_bytes", "Archived records kept on the local disk", bytes)?;
        let is_off = if cache.disk_is_off { 1.0 } else { 0.0 };
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
    let archive = &status["archive"];
    let _ = writeln!(
        out,
        "node {}  cluster {}  log {} blocks, {} bytes  archive {} ({}, lag {} ms)",
        text(&status["node_id"]),
        text(&status["cluster_id"]),
        text(&status["shard"]["next_seq"]),
        text(&status["shard"]["wal"]["bytes"]),
        text(&archive["archive"]),
        if archive["ships"] == true { text(&archive["state"]) } else { "local: safe means durable".to_owned() },
        text(&archive["lag_ms"]),
    );
    if let Some(why) = status["ready"]["Err"].as_str() {
        let _ = writeln!(out, "NOT READY: {why}");
    }
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
