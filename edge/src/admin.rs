//! The admin port: what the edge tells about itself, as status, metrics and records, and how a person sees it.

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use daemon::admin::{AdminClient, AdminPort, Observed, table};
use daemon::metrics::Metrics;
use mqtt::front::{Front, MEMORY_USES, Stats};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use serde::{Deserialize, Serialize};
use shared::batch::Record;
use shared::limits::BATCH_UNPACKED_BYTES_MAX;
use shared::name::{EdgeId, Offset, StreamName};
use tokio::sync::watch;

use crate::store::{EdgeStore, StoreStatus, StreamError, StreamStatus};
use crate::uplink::{Uplink, UplinkStatus};

/// Most bytes of batches that one records request reads.
const RECORDS_BYTES_MAX: usize = 256 * 1024;
/// How long a records request waits for the next record.
const RECORDS_WAIT: Duration = Duration::from_secs(20);
/// How long its answer may take.
pub const TAIL_PATIENCE: Duration = Duration::from_secs(40);

/// Everything a running edge can be asked about.
#[derive(Clone)]
pub struct Gateway {
    /// Its identity.
    pub id: EdgeId,
    /// What it keeps.
    pub store: Arc<EdgeStore>,
    /// The MQTT front.
    pub front: Arc<Front>,
    /// The link, if there is one.
    pub uplink: Option<Arc<Uplink>>,
    /// True once the process is told to stop.
    pub stopping: watch::Receiver<bool>,
    /// The admin port itself.
    pub admin: AdminPort,
}

#[derive(Serialize)]
struct Status {
    version: &'static str,
    id: EdgeId,
    ready: Result<(), String>,
    ready_for_publish: Result<(), String>,
    link: Option<UplinkStatus>,
    streams: Vec<StreamStatus>,
    store: StoreStatus,
    mqtt: Stats,
}

impl Observed for Gateway {
    fn ready(&self) -> Result<(), String> {
        if *self.stopping.borrow() {
            return Err("the gateway is stopping".to_owned());
        }
        match self.store.status().failed {
            true => Err("the store has failed: the process must start again".to_owned()),
            false => Ok(()),
        }
    }

    fn ready_for(&self, what: &str) -> Option<Result<(), String>> {
        (what == "publish").then(|| self.ready().and_then(|()| self.store.status().no_room.map_or(Ok(()), Err)))
    }

    fn status(&self) -> serde_json::Value {
        let mut store = self.store.status();
        let status = Status {
            version: env!("CARGO_PKG_VERSION"),
            id: self.id.clone(),
            ready: self.ready(),
            ready_for_publish: self.ready_for("publish").unwrap_or(Ok(())),
            link: self.uplink.as_ref().map(|uplink| uplink.status()),
            streams: std::mem::take(&mut store.streams),
            store,
            mqtt: self.front.stats(),
        };
        serde_json::to_value(status).unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() }))
    }
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gateway({})", self.id)
    }
}

impl Collector for Gateway {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut metrics = Metrics::new(encoder);
        self.store_metrics(&mut metrics)?;
        self.link_metrics(&mut metrics)?;
        self.front_metrics(&mut metrics)
    }
}

impl Gateway {
    fn store_metrics(&self, metrics: &mut Metrics<'_>) -> fmt::Result {
        let store = self.store.status();
        let ready = if self.ready().is_ok() { 1.0 } else { 0.0 };
        metrics.gauge("tributary_edge_ready", "1 while clients can be served", ready)?;
        let takes = if store.no_room.is_none() { 1.0 } else { 0.0 };
        metrics.gauge("tributary_edge_publish_ready", "1 while the next MiB of records would be stored", takes)?;
        if let Some(free) = store.disk_free_bytes {
            metrics.gauge("tributary_edge_disk_free_bytes", "What the disk has left", free as f64)?;
        }
        let mut per_stream = |name, help, value: fn(&StreamStatus) -> f64| {
            let values = store.streams.iter().map(|stream| (vec![("stream", stream.name.as_str())], value(stream)));
            metrics.gauges(name, help, values)
        };
        per_stream("tributary_edge_stream_next_offset", "Offset after the last record", |s| s.next as f64)?;
        per_stream("tributary_edge_stream_bytes", "Bytes kept", |s| s.bytes as f64)?;
        per_stream("tributary_edge_stream_unsent_bytes", "Bytes the cloud has not", |s| s.unsent_bytes as f64)?;
        per_stream("tributary_edge_stream_unsafe_records", "Records not in the bucket", |s| (s.next - s.safe) as f64)?;
        per_stream("tributary_edge_stream_oldest_unsent_seconds", "Age of the oldest record the cloud has not", |s| {
            s.oldest_unsent_seconds
        })?;
        per_stream("tributary_edge_stream_parked", "1 while it is not forwarded", |s| {
            if s.parked.is_some() { 1.0 } else { 0.0 }
        })?;
        let dropped = |stream: &StreamStatus| stream.dropped_records_total;
        let dropped = store.streams.iter().map(|stream| (vec![("stream", stream.name.as_str())], dropped(stream)));
        metrics.counters("tributary_edge_stream_dropped_records", "Records dropped for want of room", dropped)?;
        metrics.histogram("tributary_edge_commit_seconds", "Time a commit took", &store.commit_seconds)?;
        metrics.histogram("tributary_edge_commit_messages", "Messages a commit stored", &store.commit_messages)?;
        let ratio = store.disk_budget_ratio;
        metrics.gauge(
            "tributary_edge_disk_budget_ratio",
            "Part of the room for records that is taken; at 1 on_full decides",
            ratio,
        )?;
        metrics.gauge("tributary_edge_disk_used_bytes", "Size of the database", store.disk_used_bytes as f64)?;
        metrics.gauge("tributary_edge_disk_dead_bytes", "Freed pages in it", store.disk_dead_bytes as f64)?;
        metrics.gauge("tributary_edge_held_acks", "Messages whose PUBACK waits", store.held_acks as f64)?;
        let aside = store.set_aside.len() as f64;
        metrics.gauge("tributary_edge_databases_set_aside", "Damaged databases that wait for salvage", aside)?;
        let aside = store.set_aside.iter().map(|one| one.bytes).sum::<u64>() as f64;
        metrics.gauge("tributary_edge_databases_set_aside_bytes", "What they take on the disk", aside)?;
        metrics.gauge("tributary_edge_session_bytes", "What kept sessions take", store.session_bytes as f64)?;
        let bound = store.session_bytes_max as f64;
        metrics.gauge("tributary_edge_session_bytes_max", "Bound of it", bound)?;
        metrics.counter("tributary_edge_written_bytes", "Bytes written to the database", store.written_bytes_total)?;
        metrics.counter("tributary_edge_syncs", "Syncs asked of the disk", store.syncs_total)
    }

    fn link_metrics(&self, metrics: &mut Metrics<'_>) -> fmt::Result {
        let Some(link) = self.uplink.as_ref().map(|uplink| uplink.status()) else { return Ok(()) };
        let up = if link.up { 1.0 } else { 0.0 };
        metrics.gauge("tributary_edge_uplink_up", "1 while the cloud answers", up)?;
        let behind = link.behind_records as f64;
        metrics.gauge("tributary_edge_uplink_behind_records", "Records the cloud has not confirmed", behind)?;
        metrics.counter("tributary_edge_uplink_sent_bytes", "Bytes of bodies that were answered", link.bytes)?;
        metrics.counter("tributary_edge_uplink_failures", "Requests that came to nothing", link.failures)?;
        let twice = link.sent_twice;
        metrics.counter("tributary_edge_uplink_sent_twice", "Streams sent again under a new incarnation", twice)?;
        metrics.counter("tributary_edge_uplink_rejected", "Records set aside in .rejected topics", link.rejected)?;
        metrics.counter("tributary_edge_uplink_gaps", "Gaps told to the cloud", link.gaps_declared)?;
        metrics.counter("tributary_edge_uplink_superseded", "Times another gateway took this id", link.superseded)
    }

    fn front_metrics(&self, metrics: &mut Metrics<'_>) -> fmt::Result {
        let mqtt = self.front.stats();
        metrics.gauge("tributary_edge_mqtt_connections", "Connections", mqtt.connections as f64)?;
        metrics.gauge("tributary_edge_mqtt_sessions", "Sessions", mqtt.sessions as f64)?;
        metrics.gauge("tributary_edge_mqtt_retained_messages", "Retained messages", mqtt.retained_messages as f64)?;
        metrics.counter("tributary_edge_mqtt_received_messages", "PUBLISHes taken", mqtt.received_messages_total)?;
        metrics.counter("tributary_edge_mqtt_sent_messages", "PUBLISHes delivered", mqtt.sent_messages_total)?;
        let dropped = [
            ("slow", mqtt.dropped_slow_total),
            ("queue-full", mqtt.dropped_queue_full_total),
            ("too-large", mqtt.dropped_too_large_total),
            ("expired", mqtt.expired_total),
        ];
        let dropped = dropped.map(|(why, count)| (vec![("reason", why)], count));
        metrics.counters("tributary_edge_mqtt_dropped_messages", "Messages a subscriber did not get", dropped)?;
        metrics.counter("tributary_edge_mqtt_refused_messages", "PUBLISHes refused", mqtt.refused_total)?;
        let kept = mqtt.sessions_kept as f64;
        metrics.gauge("tributary_edge_mqtt_sessions_kept", "Sessions that outlive their connections", kept)?;
        let evicted = mqtt.sessions_evicted_total;
        metrics.counter("tributary_edge_mqtt_sessions_evicted", "Sessions ended to make room for others", evicted)?;
        let refused = mqtt.sessions_refused_total;
        metrics.counter("tributary_edge_mqtt_sessions_refused", "CONNECTs refused for want of a session", refused)?;
        let evicted = mqtt.connections_evicted_total;
        let help = "Connections without a CONNECT closed to make room for others";
        metrics.counter("tributary_edge_mqtt_connections_evicted", help, evicted)?;
        let refused = mqtt.connections_refused_total;
        metrics.counter("tributary_edge_mqtt_connections_refused", "Connections closed at once: too many", refused)?;
        let used = MEMORY_USES.iter().zip(mqtt.memory_bytes).map(|(name, bytes)| (vec![("use", *name)], bytes as f64));
        metrics.gauges("tributary_edge_mqtt_memory_bytes", "Memory held for clients", used)?;
        let max = mqtt.memory_bytes_max as f64;
        metrics.gauge("tributary_edge_mqtt_memory_bytes_max", "Most memory held for clients", max)?;
        let refused = mqtt.memory_refused_total;
        metrics.counter("tributary_edge_mqtt_memory_refused", "What clients asked for and memory was full", refused)?;
        let stuck = mqtt.stuck_readers_total;
        metrics.counter(
            "tributary_edge_mqtt_stuck_readers",
            "Connections ended that held memory and read nothing",
            stuck,
        )?;
        let errors = mqtt.protocol_errors_total;
        metrics.counter("tributary_edge_mqtt_protocol_errors", "Connections ended for what they sent", errors)?;
        let failed = [("mqtt", self.front.failed_logins()), ("admin", self.admin.throttle.failed_total())];
        let failed = failed.map(|(name, count)| (vec![("listener", name)], count));
        metrics.counters("tributary_edge_failed_logins", "Log-ins with a wrong name, password or token", failed)
    }
}

/// One record as `tail` gets it: a JSON object on a line of its own.
#[derive(Debug, Serialize, Deserialize)]
pub struct RecordLine {
    /// Its offset.
    pub offset: Offset,
    /// Its timestamp.
    pub timestamp_ms: i64,
    /// Key, base64.
    pub key: Option<String>,
    /// Names and values, values base64.
    pub headers: Vec<(String, Option<String>)>,
    /// Value, base64.
    pub value: Option<String>,
}

impl RecordLine {
    fn of(record: Record) -> Self {
        let headers = record
            .headers
            .into_iter()
            .map(|(name, value)| (String::from_utf8_lossy(&name).into_owned(), value.map(|v| BASE64.encode(v))))
            .collect();
        Self {
            offset: record.offset,
            timestamp_ms: record.timestamp,
            key: record.key.map(|key| BASE64.encode(key)),
            headers,
            value: record.value.map(|value| BASE64.encode(value)),
        }
    }
}

#[derive(Deserialize)]
struct From {
    #[serde(default)]
    from: Offset,
}

/// Routes of the edge's own: `/streams/{name}/records?from=N` answers with records as JSON lines, waiting for one.
pub fn routes(gateway: Gateway) -> Router {
    let sessions = crate::sessions::routes(gateway.front.clone());
    Router::new().route("/streams/{name}/records", get(records)).with_state(gateway).merge(sessions)
}

async fn records(State(gateway): State<Gateway>, Path(name): Path<String>, Query(query): Query<From>) -> Response {
    let Ok(stream) = StreamName::parse(&name) else {
        return (StatusCode::NOT_FOUND, format!("no stream {name}\n")).into_response();
    };
    let from = gateway.store.position(&stream).map_or(query.from, |at| query.from.max(at.first));
    let _ = tokio::time::timeout(RECORDS_WAIT, gateway.store.wait_records(&stream, from)).await;
    let store = gateway.store.clone();
    let lines = tokio::task::spawn_blocking(move || lines(&store, &stream, from)).await;
    match lines {
        Ok(Ok(lines)) => ([(header::CONTENT_TYPE, "application/x-ndjson")], lines).into_response(),
        Ok(Err(error @ StreamError::Unknown(_))) => (StatusCode::NOT_FOUND, format!("{error}\n")).into_response(),
        Ok(Err(error @ StreamError::OutOfRange { .. })) => {
            (StatusCode::RANGE_NOT_SATISFIABLE, format!("{error}\n")).into_response()
        }
        Ok(Err(error)) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

fn lines(store: &EdgeStore, stream: &StreamName, from: Offset) -> Result<String, StreamError> {
    let mut text = String::new();
    for row in store.read(stream, from, RECORDS_BYTES_MAX)? {
        let records = row.batch.records(BATCH_UNPACKED_BYTES_MAX).map_err(|e| StreamError::Damaged(e.to_string()))?;
        for record in records {
            let record = record.map_err(|e| StreamError::Damaged(e.to_string()))?;
            if record.offset >= from {
                let line = serde_json::to_string(&RecordLine::of(record)).unwrap_or_default();
                text.push_str(&line);
                text.push('\n');
            }
        }
    }
    Ok(text)
}

/// Prints a stream's records as they come, until the broker or the terminal goes away. `--json` prints the lines as
/// they are; otherwise keys and values are shown as text.
pub async fn tail(client: &AdminClient, stream: &str, from: Offset, json: bool) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let mut next = from;
    loop {
        let text = client.get(&format!("/streams/{stream}/records?from={next}")).await?;
        for line in text.lines() {
            let record: RecordLine = serde_json::from_str(line).context("the broker answered with something else")?;
            next = record.offset + 1;
            if json {
                println!("{line}");
            } else {
                println!("{}", show(&record));
            }
        }
    }
}

fn show(record: &RecordLine) -> String {
    let plain = |text: &Option<String>| match text {
        Some(text) => String::from_utf8_lossy(&BASE64.decode(text).unwrap_or_default()).escape_debug().to_string(),
        None => "-".to_owned(),
    };
    let mut line =
        format!("{}  {}  {}  {}", record.offset, record.timestamp_ms, plain(&record.key), plain(&record.value));
    for (name, value) in &record.headers {
        let _ = write!(line, "  {name}={}", plain(value));
    }
    line
}

/// What `tributary-edge status` prints.
pub fn render(status: &serde_json::Value) -> String {
    let text = |value: &serde_json::Value| match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let mut out = format!("edge {}", text(&status["id"]));
    let link = &status["link"];
    match (link["up"].as_bool(), link["last_error"].as_str()) {
        (Some(true), _) => {
            let _ =
                write!(out, "  link up to {}, {} records behind", text(&link["url"]), text(&link["behind_records"]));
        }
        (Some(false), Some(why)) => {
            let _ = write!(out, "  link DOWN to {}: {why}", text(&link["url"]));
        }
        (Some(false), None) => {
            let _ = write!(out, "  link not up yet to {}", text(&link["url"]));
        }
        (None, _) => out.push_str("  no uplink"),
    }
    let ratio = status["store"]["disk_budget_ratio"].as_f64().unwrap_or(0.0) * 100.0;
    let _ = writeln!(out, "  disk budget {ratio:.0} % used");
    if let Some(why) = status["ready"]["Err"].as_str() {
        let _ = writeln!(out, "NOT READY: {why}");
    } else if let Some(why) = status["ready_for_publish"]["Err"].as_str() {
        let _ = writeln!(out, "NOT READY FOR PUBLISH: {why}");
    }
    let aside = status["store"]["set_aside"].as_array().map_or(&[][..], Vec::as_slice);
    if !aside.is_empty() {
        let bytes: u64 = aside.iter().filter_map(|one| one["bytes"].as_u64()).sum();
        let _ = writeln!(
            out,
            "SET ASIDE: {} damaged databases, {:.1} MiB: stop the broker and run, for each, tributary-edge salvage FILE --remove",
            aside.len(),
            bytes as f64 / f64::from(1 << 20),
        );
        for one in aside {
            let mib = one["bytes"].as_u64().unwrap_or(0) as f64 / f64::from(1 << 20);
            let _ = writeln!(out, "  {}  {mib:.1} MiB", text(&one["file"]));
        }
    }
    let heading = ["STREAM", "TOPIC", "FIRST", "NEXT", "DURABLE", "SAFE", "BYTES", "OLDEST UNSENT (s)", "STATE"];
    let mut rows = vec![heading.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()];
    for stream in status["streams"].as_array().into_iter().flatten() {
        let fields = ["name", "topic", "first", "next", "durable", "safe", "bytes", "oldest_unsent_seconds"];
        let mut row: Vec<String> = fields.iter().map(|field| text(&stream[*field])).collect();
        let well = if stream["engine"] == "memory" { "ok, in memory: gone at a restart" } else { "ok" };
        row.push(stream["parked"].as_str().map_or(well.to_owned(), |why| format!("PARKED: {why}")));
        rows.push(row);
    }
    let _ = write!(out, "\n{}", table(&rows));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parked_stream_and_a_broken_link_are_told() {
        let status = serde_json::json!({
            "id": "gw-1",
            "ready": { "Ok": null },
            "link": { "up": false, "url": "http://c", "last_error": "refused" },
            "store": { "disk_budget_ratio": 0.25, "set_aside": [
                { "file": "d/edge.redb.bad-1", "bytes": 1_048_576 }, { "file": "d/edge.redb.bad-2", "bytes": 524_288 },
            ] },
            "streams": [{ "name": "s", "topic": "t", "first": 0, "next": 9, "durable": 4, "safe": 2, "bytes": 100,
                          "oldest_unsent_seconds": 1.5, "parked": "not allowed" }],
        });
        let text = render(&status);
        let aside = ["SET ASIDE: 2 damaged databases, 1.5 MiB", "d/edge.redb.bad-2  0.5 MiB", "salvage FILE --remove"];
        for part in ["gw-1", "DOWN", "refused", "25 %", "PARKED: not allowed"].into_iter().chain(aside) {
            assert!(text.contains(part), "{part} not in\n{text}");
        }
    }
}
