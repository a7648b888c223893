//! A Kafka producer that goes on through the cloud's deaths and remembers what was acknowledged to it.
//!
//! The edges alone would not notice a cloud that answers too early: they keep what is not in the bucket and send it again.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::judge::Record;
use crate::kafka::Client;
use crate::lab::PATIENCE;

/// Between two records, and before a new connection.
const PAUSE: Duration = Duration::from_millis(30);
/// Records it writes in a hurry.
const HURRIED: usize = 5;

/// The topic it writes to.
pub const TOPIC: &str = "produced";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// Beside the devices, not instead of them.
    Gentle,
    /// The next record as soon as the last one is acknowledged.
    Hurried,
    Stopped,
}

/// A producer at work.
pub struct Producer {
    pace: watch::Sender<Pace>,
    acked: watch::Receiver<Vec<i64>>,
    task: JoinHandle<()>,
}

impl Producer {
    /// Writes one record after the other with `acks=all`, each again until it is acknowledged.
    pub fn start(cloud: SocketAddr) -> Self {
        let (pace, paced) = watch::channel(Pace::Gentle);
        let (acked_sender, acked) = watch::channel(Vec::new());
        let task = tokio::spawn(work(cloud, paced, acked_sender));
        Self { pace, acked, task }
    }

    /// Hurries, and returns right after an acknowledgement: the best moment to kill a broker that gives them too early.
    /// Such a broker has answered a record by then whose block waits for the one before to be written.
    pub async fn hurry(&mut self) -> Result<()> {
        self.pace.send_replace(Pace::Hurried);
        let enough = self.acked.borrow().len() + HURRIED;
        let reached = tokio::time::timeout(PATIENCE, self.acked.wait_for(|acked| acked.len() >= enough)).await;
        reached.context("the producer is never answered")?.map(drop).context("the producer has ended")
    }

    /// Hurries no more.
    pub fn rest(&self) {
        self.pace.send_replace(Pace::Gentle);
    }

    /// Ends it; returns the offset of each record that was acknowledged: the n-th holds [`value`] n.
    pub async fn finish(self) -> Result<Vec<i64>> {
        self.pace.send_replace(Pace::Stopped);
        tokio::time::timeout(PATIENCE, self.task).await.context("the producer does not end")??;
        Ok(self.acked.borrow().clone())
    }
}

async fn work(cloud: SocketAddr, mut pace: watch::Receiver<Pace>, acked: watch::Sender<Vec<i64>>) {
    let mut client = None;
    while *pace.borrow() != Pace::Stopped {
        if client.is_none() {
            client = connect(cloud).await.ok();
        }
        let next = value(acked.borrow().len());
        let produced = match &mut client {
            Some(client) => client.produce(TOPIC, next.as_bytes()).await,
            None => Err(anyhow::anyhow!("not connected")),
        };
        match produced {
            Ok(offset) => acked.send_modify(|offsets| offsets.push(offset)),
            Err(_) => client = None,
        }
        if client.is_none() {
            tokio::time::sleep(PAUSE).await;
        } else {
            // Either way the next record follows.
            let _ = tokio::time::timeout(PAUSE, pace.wait_for(|pace| *pace != Pace::Gentle)).await;
        }
    }
}

async fn connect(cloud: SocketAddr) -> Result<Client> {
    let mut client = Client::connect(cloud).await?;
    client.touch(TOPIC).await?;
    Ok(client)
}

fn value(n: usize) -> String {
    format!("produced-{n}")
}

/// Every acknowledged record is where the acknowledgement said. What was not acknowledged may be there or not.
pub fn judge(acked: &[i64], records: &[Record]) -> Result<()> {
    let mut wrong = Vec::new();
    for (n, offset) in acked.iter().enumerate() {
        let found = records.iter().find(|record| record.offset == *offset).and_then(|record| record.value.as_deref());
        if found != Some(value(n).as_bytes()) {
            wrong.push(format!("{} was acknowledged at offset {offset} and is not there", value(n)));
        }
    }
    if !wrong.is_empty() {
        bail!("{} of {} produced records are lost\n{}", wrong.len(), acked.len(), wrong.join("\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_record_that_is_missing_or_elsewhere_is_found() {
        let record = |offset, n| Record {
            partition: 0,
            offset,
            timestamp: 0,
            key: None,
            value: Some(value(n).into_bytes()),
            headers: Vec::new(),
        };
        let records = [record(0, 0), record(1, 1), record(2, 1)];
        judge(&[0, 1], &records).unwrap();
        judge(&[0, 2], &records).unwrap();
        assert!(judge(&[0, 3], &records).is_err());
        assert!(judge(&[1, 0], &records).is_err());
    }
}
