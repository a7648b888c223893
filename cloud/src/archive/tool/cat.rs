//! `cat`: the records of a topic, from segments and from the shipped log.

use std::collections::BTreeMap;
use std::io::Write;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use object_store::path::Path;
use serde_json::{Map, Value};
use shared::batch::{Batch, Record};
use shared::limits::BATCH_UNPACKED_BYTES_MAX;
use shared::name::{Offset, Partition, TopicId};

use super::chain::walk;
use super::object::{IndexError, RunError, RunReader, Source, Window, read_index};
use super::view::{ShardView, View};
use super::{CLEAN, FINDINGS, Finding, ToolError};
use crate::archive::Store;
use crate::block::Block;
use crate::manifest::HeldRun;
use crate::shard::fold;
use crate::state::State;

/// How records are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A line of JSON each.
    Json,
    /// The value, and a line feed.
    Value,
    /// Whole batches as they are stored: RecordBatch v2.
    Raw,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub topic: &'a str,
    pub partition: Option<u32>,
    pub from: Offset,
    pub to: Option<Offset>,
    pub format: Format,
}

/// Runs the command.
pub(super) async fn run(store: &Store, wanted: &Wanted<'_>, out: &mut dyn Write) -> Result<i32, ToolError> {
    let view = View::load_whole(store).await?;
    let mut findings = Vec::new();
    // Names and log starts as they are at the end of the shipped log: what was deleted is not shown.
    let mut states = Vec::new();
    for shard in &view.shards {
        states.push(state_at_end(store, shard, &mut findings).await?);
    }
    let topic = find_topic(&states, wanted.topic)?;
    let mut printer = Printer { wanted, out, findings: &mut findings };
    for (shard, state) in view.shards.iter().zip(&states) {
        // Where the next batch of each partition may begin: below the log start nothing may be read.
        let mut starts: BTreeMap<Partition, Offset> = state
            .partitions()
            .filter(|(partition, _)| partition.topic == topic)
            .filter(|(partition, _)| wanted.partition.is_none_or(|index| partition.index == index))
            .map(|(partition, known)| (*partition, known.log_start.max(wanted.from)))
            .collect();
        for (partition, start) in &mut starts {
            for held in shard.runs.get(partition).into_iter().flatten() {
                if held.run.next > *start && printer.wants(held.run.base) {
                    cat_run(store, shard, *partition, held, *start, &mut printer).await?;
                }
            }
        }
        let mut ignored = Vec::new();
        let each = |key: &Path, position: u64, block: &Block, _: &mut Vec<Finding>| {
            for entry in block.entries() {
                if let Some(start) = starts.get(&entry.partition) {
                    let batches = block.batches(entry);
                    let batches =
                        batches.map_err(|error| ToolError::Damaged(Finding::at(key, position, error).to_string()));
                    for batch in batches? {
                        printer.batch(entry.partition, &batch, *start)?;
                    }
                }
            }
            Ok(())
        };
        walk(store, shard, &mut ignored, each, |_| {}).await?;
    }
    for finding in &findings {
        eprintln!("{finding}");
    }
    Ok(if findings.is_empty() { CLEAN } else { FINDINGS })
}

async fn state_at_end(store: &Store, shard: &ShardView, findings: &mut Vec<Finding>) -> Result<State, ToolError> {
    let mut state = shard.state.clone();
    let each = |key: &Path, position: u64, block: &Block, _: &mut Vec<Finding>| {
        fold(&mut state, block)
            .map(drop)
            .map_err(|error| ToolError::Damaged(Finding::at(key, position, error).to_string()))
    };
    walk(store, shard, findings, each, |_| {}).await?;
    Ok(state)
}

/// The topic of that name, or of that id.
fn find_topic(states: &[State], wanted: &str) -> Result<TopicId, ToolError> {
    let topics = || states.iter().flat_map(State::topics);
    let found = topics().find(|topic| topic.name.as_str() == wanted || topic.id.to_string() == wanted);
    found.map(|topic| topic.id).ok_or_else(|| ToolError::Topic {
        topic: wanted.to_owned(),
        known: topics().map(|topic| topic.name.to_string()).collect::<Vec<_>>().join(", "),
    })
}

async fn cat_run(
    store: &Store,
    shard: &ShardView,
    partition: Partition,
    held: &HeldRun,
    start: Offset,
    printer: &mut Printer<'_, '_>,
) -> Result<(), ToolError> {
    let key = shard.keys.segment(&held.object);
    let source = Source::Stored(store, &key);
    let run = &held.run;
    let mut at = 0;
    if start > run.base {
        let end = run.index_position + u64::from(run.index_length);
        match read_index(&mut Window::new(&source, end), run).await {
            Ok(index) => at = index.at_offset(run, start).map_or(0, |stretch| stretch.start),
            Err(IndexError::Store(error)) => return Err(error.into()),
            // The run can be read from its beginning all the same.
            Err(IndexError::Segment(error)) => {
                printer.findings.push(Finding::at(&key, run.index_position, error));
            }
        }
    }
    let mut window = Window::new(&source, run.position + run.length);
    let mut reader = RunReader::new(run, at);
    loop {
        match reader.next(&mut window).await {
            Ok(Some((_, batch))) => {
                if !printer.wants(batch.base_offset()) {
                    return Ok(());
                }
                printer.batch(partition, &batch, start)?;
            }
            Ok(None) => return Ok(()),
            Err(RunError::Store(error)) => return Err(error.into()),
            Err(RunError::Batch(position, error)) => {
                let what = format!("{partition}, the rest of the run up to offset {} is left out: {error}", run.next);
                printer.findings.push(Finding::at(&key, position, what));
                return Ok(());
            }
        }
    }
}

struct Printer<'a, 'o> {
    wanted: &'a Wanted<'a>,
    out: &'o mut dyn Write,
    findings: &'a mut Vec<Finding>,
}

impl Printer<'_, '_> {
    /// Whether what begins at `base` can be asked for.
    fn wants(&self, base: Offset) -> bool {
        self.wanted.to.is_none_or(|to| base < to)
    }

    fn batch(&mut self, partition: Partition, batch: &Batch, start: Offset) -> Result<(), ToolError> {
        if batch.last_offset() < start || !self.wants(batch.base_offset()) {
            return Ok(());
        }
        if self.wanted.format == Format::Raw {
            return Ok(self.out.write_all(batch.bytes())?);
        }
        // A marker of the log itself, which clients skip.
        if batch.is_control() {
            return Ok(());
        }
        let records =
            batch.records(BATCH_UNPACKED_BYTES_MAX).and_then(|records| records.collect::<Result<Vec<_>, _>>());
        let records = match records {
            Ok(records) => records,
            Err(error) => {
                let what = format!(
                    "offsets {}..{} cannot be opened, --format raw gives them as stored: {error}",
                    batch.base_offset(),
                    batch.last_offset().saturating_add(1)
                );
                self.findings.push(Finding::new(partition, what));
                return Ok(());
            }
        };
        let to = self.wanted.to.unwrap_or(Offset::MAX);
        for record in records.iter().filter(|record| record.offset >= start && record.offset < to) {
            match self.wanted.format {
                Format::Value => {
                    self.out.write_all(record.value.as_deref().unwrap_or_default())?;
                    self.out.write_all(b"\n")?;
                }
                _ => writeln!(self.out, "{}", json(partition, batch, record))?,
            }
        }
        Ok(())
    }
}

fn json(partition: Partition, batch: &Batch, record: &Record) -> Value {
    let mut line = Map::new();
    line.insert("partition".into(), partition.index.into());
    line.insert("offset".into(), record.offset.into());
    let timestamp = if batch.is_log_append_time() { batch.max_timestamp() } else { record.timestamp };
    line.insert("timestamp".into(), timestamp.into());
    put_bytes(&mut line, "key", record.key.as_deref());
    put_bytes(&mut line, "value", record.value.as_deref());
    let headers = record.headers.iter().map(|(name, value)| {
        let mut header = Map::new();
        put_bytes(&mut header, "name", Some(name));
        put_bytes(&mut header, "value", value.as_deref());
        Value::Object(header)
    });
    line.insert("headers".into(), headers.collect());
    Value::Object(line)
}

/// Text under `name`; bytes that are no UTF-8 under `name_base64`.
fn put_bytes(line: &mut Map<String, Value>, name: &str, bytes: Option<&[u8]>) {
    match bytes.map(|bytes| (bytes, std::str::from_utf8(bytes))) {
        None => line.insert(name.into(), Value::Null),
        Some((_, Ok(text))) => line.insert(name.into(), text.into()),
        Some((bytes, Err(_))) => line.insert(format!("{name}_base64"), BASE64_STANDARD.encode(bytes).into()),
    };
}
