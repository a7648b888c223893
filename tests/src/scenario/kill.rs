//! The first promise: whatever is killed, cut or repeated, what the edge acknowledged is in the cloud's log, once and in order.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Context;
use crate::device;
use crate::judge::{self, Case, Record, Verdict};
use crate::kafka::Client;
use crate::lab::{Lab, PATIENCE, Rng, until};
use crate::message::{Alphabet, Id, Message};
use crate::process::Broker;
use crate::producer::{self, Producer};
use crate::proxy::Proxy;
use crate::tools::{Outsider, Reader};
use crate::wire::Recorder;
use crate::{admin, device::Settings};

/// How large a run is.
struct Size {
    devices: u32,
    messages: u32,
    edge_kills: usize,
    cloud_kills: usize,
}

const FAST: Size = Size { devices: 20, messages: 5_000, edge_kills: 3, cloud_kills: 3 };
const FULL: Size = Size { devices: 20, messages: 100_000, edge_kills: 10, cloud_kills: 10 };

/// Devices 0 and 1 are paho-mqtt, device 2 is mosquitto_pub, the others are our own, of MQTT 3.1.1 and 5 by turns.
const PAHO: [u32; 2] = [0, 1];
const MOSQUITTO: u32 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    KillEdge,
    KillCloud,
    CutLink,
    DelayLink,
    RepeatAppends,
    LoseAnswers,
}

pub async fn nothing_is_lost_or_doubled_on_kill_9(context: &Context) -> Result<String> {
    let size = if context.full { FULL } else { FAST };
    let mut rng = Rng(context.seed);
    let mut lab = context.lab("kill")?;
    let link = Proxy::start(lab.cloud.link).await?;
    lab.edge.uplink_url = format!("http://{}", link.address);
    // Small files and segments, so that reads cross every seam there is.
    lab.cloud.archive_extra = "max_lag = \"1s\"\nsegment_bytes = \"256 KiB\"\nsegment_age = \"2s\"\n".into();
    lab.cloud.extra = "[wal]\nfile_bytes = \"4 MiB\"\ntail_cache_bytes = \"64 KiB\"\n".into();
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let recorder = Recorder::start(lab.edge.mqtt).await?;

    let messages = plan(&size);
    let fleet = Fleet::start(context, &lab, &recorder, &messages, &size)?;
    let mut producer = Producer::start(lab.cloud.kafka);
    let mut chaos =
        Chaos { edge: &mut edge, cloud: &mut cloud, link: &link, producer: &mut producer, cloud_down: false };
    let outcome = disturb(&mut chaos, fleet, &recorder, &size, &mut rng).await;
    recorder.write_log(&lab.dir.join("wire.log"))?;
    outcome?;

    let produced = producer.finish().await?;
    let there = context.tools.read(Reader::Confluent, lab.cloud.kafka, producer::TOPIC).await?;
    producer::judge(&produced, &there)?;
    drain(&lab, "telemetry").await?;
    let records = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    let verdict = judge_run(&lab, &messages, &recorder, &records)?;
    compare_readers(context, &lab, &records).await?;
    let batches = compare_seals(&lab, &link).await?;
    let rows = compare_rows(&lab, &edge, &records).await?;
    edge.stop().await?;
    cloud.stop().await?;

    let (repeated, lost) = link.disturbed();
    let published = recorder.seen().published();
    Ok(format!(
        "{} messages of {} devices in {published} PUBLISHes, {}+{} kills, {repeated} appends repeated, {lost} answers lost: \
         {} records in {batches} batches, {} acknowledged and all there, {} second copies each with its second PUBLISH, \
         {rows} edge rows identical, {} of QoS 0 lost; {} produced records all there",
        messages.len(),
        size.devices,
        size.edge_kills,
        size.cloud_kills,
        verdict.records,
        verdict.acked,
        verdict.repeated,
        verdict.lost_qos0,
        produced.len()
    ))
}

fn plan(size: &Size) -> BTreeMap<Id, Message> {
    let each = size.messages / size.devices;
    let ids = (0..size.devices).flat_map(|device| (0..each).map(move |seq| (device, seq)));
    let message = |id: Id| {
        let alphabet = if id.0 == MOSQUITTO { Alphabet::Text } else { Alphabet::Binary };
        Message::new(id, alphabet, None, is_v5(id.0))
    };
    ids.map(|id| (id, message(id))).collect()
}

fn is_v5(device: u32) -> bool {
    device % 2 == 1 && device != MOSQUITTO
}

fn client_id(device: u32) -> String {
    format!("dev-{device:02}")
}

/// All devices, which publish no more than they are told to.
struct Fleet {
    released: watch::Sender<usize>,
    tasks: JoinSet<Result<()>>,
    outsiders: Vec<(Outsider, Vec<Message>)>,
    each: usize,
    /// Messages of QoS 1 and 2 among the first n of every device together, by n.
    acknowledged_by: Vec<u64>,
}

impl Fleet {
    fn start(
        context: &Context,
        lab: &Lab,
        recorder: &Recorder,
        messages: &BTreeMap<Id, Message>,
        size: &Size,
    ) -> Result<Self> {
        let each = (size.messages / size.devices) as usize;
        let (released, allowance) = watch::channel(0);
        let (mut tasks, mut outsiders) = (JoinSet::new(), Vec::new());
        for device in 0..size.devices {
            let own: Vec<Message> = messages.range((device, 0)..(device + 1, 0)).map(|(_, m)| m.clone()).collect();
            let log = lab.dir.join(format!("{}.log", client_id(device)));
            let (tools, at) = (&context.tools, recorder.address);
            if PAHO.contains(&device) {
                outsiders.push((Outsider::paho(tools, at, &client_id(device), is_v5(device), &log)?, own));
            } else if device == MOSQUITTO {
                outsiders.push((Outsider::mosquitto_pub(tools, at, &client_id(device), &log)?, own));
            } else {
                let settings = Settings {
                    client_id: client_id(device),
                    v5: is_v5(device),
                    window: 1 + device as usize,
                    reuse_ids: device % 4 < 2,
                };
                tasks.spawn(device::run(at, settings, own, allowance.clone()));
            }
        }
        let mut acknowledged_by = vec![0; each + 1];
        for seq in 0..each {
            let at_seq = (0..size.devices).filter(|d| messages.get(&(*d, seq as u32)).is_some_and(|m| m.qos > 0));
            acknowledged_by[seq + 1] = acknowledged_by[seq] + at_seq.count() as u64;
        }
        Ok(Self { released, tasks, outsiders, each, acknowledged_by })
    }

    fn release(&mut self, upto: usize) -> Result<()> {
        let before = self.released.send_replace(upto);
        for (outsider, messages) in &mut self.outsiders {
            outsider.publish(&messages[before..upto])?;
        }
        Ok(())
    }

    /// Returns when a device has ended, which before all is released only one does that was treated badly.
    async fn failed(&mut self) -> anyhow::Error {
        match self.tasks.join_next().await {
            Some(Ok(Err(error))) => error,
            ended => anyhow::anyhow!("a device ended early: {ended:?}"),
        }
    }

    async fn finish(mut self) -> Result<()> {
        for (outsider, _) in self.outsiders {
            outsider.finish().await?;
        }
        let deadline = tokio::time::Instant::now() + PATIENCE * 2;
        loop {
            let next = tokio::time::timeout_at(deadline, self.tasks.join_next()).await;
            match next.context("a device was never acknowledged all it sent")? {
                Some(ended) => ended??,
                None => break,
            }
        }
        Ok(())
    }
}

/// What can be disturbed.
struct Chaos<'a> {
    edge: &'a mut Broker,
    cloud: &'a mut Broker,
    link: &'a Proxy,
    producer: &'a mut Producer,
    cloud_down: bool,
}

impl Chaos<'_> {
    /// Ends the disturbance before this one and makes the next.
    async fn strike(&mut self, event: Event, rng: &mut Rng) -> Result<()> {
        if event == Event::KillEdge {
            // Before anything is mended, which takes the time that the edge needs to come to rest.
            self.edge.kill()?;
        }
        self.mend().await?;
        match event {
            Event::KillEdge => {
                self.edge.start().await?;
            }
            Event::KillCloud => {
                self.producer.hurry().await?;
                // In the middle of an append, if the edge makes one: somewhere between its write, its fsync and its answer.
                let _ = tokio::time::timeout(Duration::from_secs(2), self.link.append_passed()).await;
                tokio::time::sleep(Duration::from_millis(rng.below(8))).await;
                self.cloud.kill()?;
                self.producer.rest();
                self.cloud_down = true;
                // Now and then it stays away, and the edge fills up.
                if rng.below(2) == 0 {
                    self.mend().await?;
                }
            }
            Event::CutLink => self.link.cut(),
            Event::DelayLink => self.link.delay(Duration::from_millis(20 + rng.below(60))),
            Event::RepeatAppends => self.link.repeat_appends(3),
            Event::LoseAnswers => self.link.lose_answers(2),
        }
        Ok(())
    }

    /// Ends what lasts: an outage, a cut, a delay.
    async fn mend(&mut self) -> Result<()> {
        self.link.mend();
        self.link.delay(Duration::ZERO);
        if std::mem::take(&mut self.cloud_down) {
            self.cloud.start().await?;
        }
        Ok(())
    }
}

/// Releases the messages slice by slice and strikes somewhere within each, as the acknowledgements come in.
async fn disturb(
    chaos: &mut Chaos<'_>,
    mut fleet: Fleet,
    recorder: &Recorder,
    size: &Size,
    rng: &mut Rng,
) -> Result<()> {
    let mut events = vec![Event::KillEdge; size.edge_kills];
    events.extend(vec![Event::KillCloud; size.cloud_kills]);
    let others = size.edge_kills.max(2);
    for event in [Event::CutLink, Event::DelayLink, Event::RepeatAppends, Event::LoseAnswers] {
        events.extend(vec![event; others]);
    }
    rng.shuffle(&mut events);
    let mut acked = recorder.acked();
    let slices = events.len() + 1;
    let mut before = 0;
    for (i, event) in events.iter().enumerate() {
        let upto = fleet.each * (i + 1) / slices;
        fleet.release(upto)?;
        let (low, high) = (fleet.acknowledged_by[before], fleet.acknowledged_by[upto]);
        let threshold = low + (high - low) * (5 + rng.below(90)) / 100;
        tokio::select! {
            reached = tokio::time::timeout(PATIENCE * 2, acked.wait_for(|n| *n >= threshold)) => {
                reached.map(drop).with_context(|| format!("{threshold} acknowledgements before {event:?} number {i}"))?;
            }
            error = fleet.failed() => return Err(error.context(format!("before {event:?} number {i}"))),
        }
        chaos.strike(*event, rng).await.with_context(|| format!("{event:?} number {i}"))?;
        before = upto;
    }
    fleet.release(fleet.each)?;
    let finished = fleet.finish().await;
    chaos.mend().await?;
    finished
}

/// Waits until the cloud has confirmed all that the edge stored.
pub async fn drain(lab: &Lab, stream: &str) -> Result<i64> {
    until("the edge to have sent all", PATIENCE * 2, async || {
        let status = admin::edge_status(lab.edge.admin).await?;
        let Some(stream) = status.stream(stream) else { return Ok(None) };
        if let Some(why) = &stream.parked {
            bail!("stream {} is parked: {why}", stream.name);
        }
        Ok((stream.durable == stream.next).then_some(stream.next))
    })
    .await
}

fn judge_run(lab: &Lab, messages: &BTreeMap<Id, Message>, recorder: &Recorder, records: &[Record]) -> Result<Verdict> {
    let seen = recorder.seen();
    let session = |device: u32| seen.sessions.get(&client_id(device)).cloned().unwrap_or_default();
    let devices: BTreeSet<u32> = messages.keys().map(|id| id.0).collect();
    let kept: BTreeSet<u32> = devices.iter().copied().filter(|d| !session(*d).clean).collect();
    for device in &kept {
        if session(*device).forgotten > 0 {
            bail!("the edge forgot the session of {}; see {}", client_id(*device), lab.dir.join("wire.log").display());
        }
    }
    let case = Case { edge: &lab.edge.id, messages, fates: &seen.fates, order: &seen.order, kept: &kept, records };
    let verdict = judge::judge(&case);
    if !verdict.problems.is_empty() {
        let shown: Vec<&str> = verdict.problems.iter().take(20).map(String::as_str).collect();
        bail!("{} problems; see {}\n{}", verdict.problems.len(), lab.dir.join("wire.log").display(), shown.join("\n"));
    }
    Ok(verdict)
}

/// The Java client and kcat read the same as confluent-kafka did.
pub async fn compare_readers(context: &Context, lab: &Lab, records: &[Record]) -> Result<()> {
    let java = context.tools.read(Reader::Java, lab.cloud.kafka, "telemetry").await?;
    judge::same(("confluent-kafka", records), ("the Java client", &java)).map_err(anyhow::Error::msg)?;
    let kcat = context.tools.read_with_kcat(lab.cloud.kafka, "telemetry").await?;
    let text = |bytes: &Option<Vec<u8>>| String::from_utf8_lossy(bytes.as_deref().unwrap_or_default()).into_owned();
    let length = |r: &Record| r.value.as_ref().map_or(-1, |v| v.len() as i64);
    let expected: Vec<_> =
        records.iter().map(|r| (r.partition, r.offset, r.timestamp, text(&r.key), length(r))).collect();
    if kcat != expected {
        bail!("kcat read {} records, confluent-kafka {}, or they differ", kcat.len(), expected.len());
    }
    Ok(())
}

/// Every batch that the cloud serves passed over the link with this very CRC and length.
async fn compare_seals(lab: &Lab, link: &Proxy) -> Result<usize> {
    let sealed = link.sealed();
    let batches = Client::connect(lab.cloud.kafka).await?.batches("telemetry").await?;
    if let Some(batch) = batches.iter().find(|b| !sealed.contains(&b.id)) {
        bail!("the batch at {} was never sealed by the edge: {:?}, {} were", batch.base_offset, batch.id, sealed.len());
    }
    Ok(batches.len())
}

/// What the edge stored, row by row, is what the cloud's log holds: the same number, order, key, payload and time.
async fn compare_rows(lab: &Lab, edge: &Broker, records: &[Record]) -> Result<usize> {
    let rows = super::live::tail(lab, edge, "telemetry", records.len()).await?;
    for (row, record) in rows.iter().zip(records) {
        if (row.timestamp_ms, &row.key, &row.value) != (record.timestamp, &record.key, &record.value) {
            bail!("edge row {} is not the cloud's record {}:{}", row.offset, record.partition, record.offset);
        }
    }
    if rows.len() != records.len() {
        bail!("{} edge rows, {} records in the cloud", rows.len(), records.len());
    }
    Ok(rows.len())
}

/// An old copy of the edge's data is put back, and the same data runs as a second gateway: the cloud notices both, trims
/// nothing, and what comes twice is reported.
pub async fn restored_copy_and_clone_of_an_edge_trim_nothing(context: &Context) -> Result<String> {
    let mut lab = context.lab("restored")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let mut device = device::Link::connect(lab.edge.mqtt, "d", false, true).await?;
    for n in 0..20 {
        device.publish("factory/1/telemetry/a", format!("first-{n}").as_bytes()).await?;
    }
    drain(&lab, "telemetry").await?;
    edge.stop().await?;
    let copy = lab.dir.join("edge-copy");
    copy_dir(&lab.edge.data_dir, &copy)?;

    edge.start().await?;
    let mut device = device::Link::connect(lab.edge.mqtt, "d", false, true).await?;
    for n in 0..20 {
        device.publish("factory/1/telemetry/a", format!("second-{n}").as_bytes()).await?;
    }
    drain(&lab, "telemetry").await?;
    edge.stop().await?;

    // The old copy comes back and goes its own way: other records under offsets that the cloud has seen before.
    std::fs::remove_dir_all(&lab.edge.data_dir)?;
    copy_dir(&copy, &lab.edge.data_dir)?;
    edge.start().await?;
    let mut device = device::Link::connect(lab.edge.mqtt, "d", false, true).await?;
    for n in 0..30 {
        device.publish("factory/1/telemetry/a", format!("third-{n}").as_bytes()).await?;
    }
    drain(&lab, "telemetry").await?;
    let count = expect_all(context, &lab, &[("first", 20), ("second", 20), ("third", 30)]).await?;

    // The same card in a second gateway with an id of its own.
    edge.stop().await?;
    lab.edge.id = "gw-2".into();
    let mut clone = lab.edge()?;
    clone.start().await?;
    let mut device = device::Link::connect(lab.edge.mqtt, "d", false, true).await?;
    for n in 0..10 {
        device.publish("factory/1/telemetry/a", format!("clone-{n}").as_bytes()).await?;
    }
    drain(&lab, "telemetry").await?;
    let all = expect_all(context, &lab, &[("first", 20), ("second", 20), ("third", 30), ("clone", 10)]).await?;
    clone.stop().await?;
    cloud.stop().await?;
    Ok(format!("70 messages in {count} records after the old copy, 80 in {all} after the clone, none missing"))
}

/// Every message of these groups is in the topic at least once; returns how many records there are.
async fn expect_all(context: &Context, lab: &Lab, groups: &[(&str, u32)]) -> Result<usize> {
    let records = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    let values: BTreeSet<&[u8]> = records.iter().filter_map(|r| r.value.as_deref()).collect();
    for (group, count) in groups {
        for n in 0..*count {
            let value = format!("{group}-{n}");
            if !values.contains(value.as_bytes()) {
                bail!("{value} is missing among {} records", records.len());
            }
        }
    }
    Ok(records.len())
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}
