//! Kafka producers that never repeat themselves: every attempt writes a value of its own, so that each value may be in the
//! log once at most, and once for certain if it was acknowledged. For nodes that take a log from each other.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::judge::Record;
use crate::kafka::Client;
use crate::lab::PATIENCE;

/// Before a new connection.
const PAUSE: Duration = Duration::from_millis(20);

/// One record that a producer tried to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    pub value: String,
    pub began: Instant,
    /// The offset that was acknowledged.
    pub acked: Option<i64>,
}

/// Producers at work, each writing one record after the other with `acks=all`.
pub struct Attempts {
    stop: Arc<AtomicBool>,
    acked: watch::Receiver<usize>,
    tasks: JoinSet<Vec<Attempt>>,
}

impl Attempts {
    /// `name` must be another one each time; it begins every value.
    pub fn start(broker: SocketAddr, topic: &str, name: &str, producers: usize) -> Self {
        let (stop, (count, acked)) = (Arc::new(AtomicBool::new(false)), watch::channel(0));
        let (count, mut tasks) = (Arc::new(count), JoinSet::new());
        for producer in 0..producers {
            let (topic, name) = (topic.to_owned(), format!("{name}.{producer}"));
            tasks.spawn(work(broker, topic, name, stop.clone(), count.clone()));
        }
        Self { stop, acked, tasks }
    }

    /// Returns right after `more` further acknowledgements: load is under way then.
    pub async fn acknowledged(&mut self, more: usize) -> Result<()> {
        let enough = *self.acked.borrow() + more;
        let reached = tokio::time::timeout(PATIENCE, self.acked.wait_for(|acked| *acked >= enough)).await;
        reached.context("the producers are never answered")?.map(drop).context("the producers have ended")
    }

    /// Ends them; returns the attempts of each, in the order in which it made them. One that is not answered yet is
    /// waited for, unless its connection breaks.
    pub async fn finish(mut self) -> Result<Vec<Vec<Attempt>>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        while let Some(ended) = self.tasks.join_next().await {
            all.push(ended?);
        }
        Ok(all)
    }
}

async fn work(
    broker: SocketAddr,
    topic: String,
    name: String,
    stop: Arc<AtomicBool>,
    count: Arc<watch::Sender<usize>>,
) -> Vec<Attempt> {
    let (mut client, mut attempts) = (None, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let Some(connected) = &mut client else {
            client = Client::connect(broker).await.ok();
            if client.is_none() {
                tokio::time::sleep(PAUSE).await;
            }
            continue;
        };
        let (value, began) = (format!("{name}.{}", attempts.len()), Instant::now());
        let produced = connected.try_produce(&topic, value.as_bytes(), 30_000).await;
        let acked = produced.as_ref().ok().and_then(|answer| answer.ok());
        attempts.push(Attempt { value, began, acked });
        match produced {
            Ok(Ok(_)) => count.send_modify(|count| *count += 1),
            // A refusal leaves the connection whole, but a node that refuses would be asked without end.
            Ok(Err(_)) => tokio::time::sleep(PAUSE).await,
            Err(_) => client = None,
        }
    }
    attempts
}

/// Holds what a topic of one partition holds against what was tried, and returns how many attempts were acknowledged.
/// `all` has the attempts of each producer. With `lossless`, offsets must begin at 0 and go on without a hole.
pub fn judge(all: &[Vec<Attempt>], records: &[Record], lossless: bool) -> Result<usize> {
    let mut wrong = Vec::new();
    let mut places: HashMap<&[u8], Vec<i64>> = HashMap::new();
    let mut offsets: BTreeMap<i64, usize> = BTreeMap::new();
    for record in records {
        places.entry(record.value.as_deref().unwrap_or_default()).or_default().push(record.offset);
        *offsets.entry(record.offset).or_default() += 1;
    }
    if let Some((offset, count)) = offsets.iter().find(|(_, count)| **count > 1) {
        wrong.push(format!("offset {offset} has {count} records"));
    }
    if lossless && let Some((n, offset)) = (0..).zip(offsets.keys()).find(|(n, offset)| n != *offset) {
        wrong.push(format!("offsets are not contiguous: {offset} where {n} was expected"));
    }
    let (mut acked, mut known) = (0, 0);
    for attempts in all {
        let mut newest = -1;
        for Attempt { value, acked: answer, .. } in attempts {
            let found = places.get(value.as_bytes()).map_or(&[][..], Vec::as_slice);
            known += found.len();
            acked += usize::from(answer.is_some());
            match (answer, found) {
                (Some(answer), [offset]) if offset == answer => {}
                (Some(answer), []) => wrong.push(format!("{value} was acknowledged at {answer} and is not there")),
                (Some(answer), _) => wrong.push(format!("{value} was acknowledged at {answer} and is at {found:?}")),
                (None, [] | [_]) => {}
                (None, _) => wrong.push(format!("{value} is there {} times, tried once", found.len())),
            }
            if let Some((first, last)) = found.first().zip(found.last()) {
                if *first < newest {
                    wrong.push(format!("{value} lies before what its producer wrote earlier"));
                }
                newest = *last;
            }
        }
    }
    if known != records.len() {
        wrong.push(format!("{} records are there that nobody wrote", records.len() - known));
    }
    if !wrong.is_empty() {
        let shown: Vec<&str> = wrong.iter().take(20).map(String::as_str).collect();
        bail!("{} problems among {acked} acknowledged records\n{}", wrong.len(), shown.join("\n"));
    }
    Ok(acked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempts(answers: &[Option<i64>]) -> Vec<Vec<Attempt>> {
        let attempt = |(n, acked): (usize, &Option<i64>)| Attempt {
            value: format!("v{n}"),
            began: Instant::now(),
            acked: *acked,
        };
        vec![answers.iter().enumerate().map(attempt).collect()]
    }

    fn records(values: &[(i64, usize)]) -> Vec<Record> {
        let record = |(offset, n): &(i64, usize)| Record {
            partition: 0,
            offset: *offset,
            timestamp: 0,
            key: None,
            value: Some(format!("v{n}").into_bytes()),
            headers: Vec::new(),
        };
        values.iter().map(record).collect()
    }

    fn check(values: &[(i64, usize)], complaint: &str) {
        let error = judge(&attempts(&[Some(0), None, Some(1), None]), &records(values), true).expect_err(complaint);
        assert!(error.to_string().contains(complaint), "expected {complaint:?}, found {error}");
    }

    #[test]
    fn what_was_not_acknowledged_may_be_there_once_or_not() {
        let tried = attempts(&[Some(0), None, Some(1), None]);
        assert_eq!(judge(&tried, &records(&[(0, 0), (1, 2)]), true).unwrap(), 2);
        assert_eq!(judge(&tried, &records(&[(0, 0), (1, 2), (2, 3)]), true).unwrap(), 2);
        assert_eq!(judge(&tried, &records(&[(0, 0), (1, 2), (1 << 32, 3)]), false).unwrap(), 2);
    }

    #[test]
    fn each_way_to_break_the_promise_is_found() {
        check(&[(0, 0)], "v2 was acknowledged at 1 and is not there");
        check(&[(0, 0), (1, 3), (2, 2)], "v2 was acknowledged at 1 and is at [2]");
        check(&[(0, 0), (1, 2), (2, 2)], "v2 was acknowledged at 1 and is at [1, 2]");
        check(&[(0, 0), (1, 2), (2, 3), (3, 3)], "v3 is there 2 times");
        check(&[(0, 0), (1, 2), (2, 1)], "v2 lies before what its producer wrote earlier");
        check(&[(0, 0), (1, 2), (3, 3)], "not contiguous: 3 where 2");
        check(&[(0, 0), (1, 2), (1, 3)], "offset 1 has 2 records");
        check(&[(0, 0), (1, 2), (2, 9)], "that nobody wrote");
    }
}
