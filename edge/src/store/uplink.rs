//! The store as the uplink sees it.

use shared::link::frame::Limits;
use shared::link::sender::{Row, Rows, StreamInfo};

use super::*;
use crate::uplink::StreamSource;

impl Rows for EdgeStore {
    fn streams(&self) -> Vec<StreamInfo> {
        let state = self.core.state.lock();
        let info = |stream: &state::Stream| {
            let at = stream.positions();
            StreamInfo {
                name: stream.record.name.clone(),
                topic: at.topic,
                incarnation: at.incarnation,
                first: at.first,
                next: at.next,
                confirmed: at.confirmed,
                safe: at.safe,
                renewed_at: stream.record.renewed_at,
                dropped: at.gap,
            }
        };
        state.streams.iter().map(info).collect()
    }

    fn read(&self, stream: &StreamName, from: Offset, bytes_max: usize) -> Result<Vec<Row>, String> {
        // What lies below the first row was dropped after the sender looked, or is being dropped just now.
        let mut from = from;
        loop {
            match EdgeStore::read(self, stream, from, bytes_max) {
                Ok(batches) => {
                    return Ok(batches.into_iter().map(|row| Row { batch: row.batch, chain: row.chain }).collect());
                }
                Err(StreamError::OutOfRange { requested, first, .. }) if requested < first => from = first,
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    fn chain_at(&self, stream: &StreamName, next: Offset) -> Option<Chain> {
        EdgeStore::chain_at(self, stream, next)
    }
}

impl StreamSource for EdgeStore {
    fn set_confirmed(&self, stream: &StreamName, next: Offset) {
        EdgeStore::set_confirmed(self, stream, next);
    }

    fn set_safe(&self, stream: &StreamName, next: Offset) {
        EdgeStore::set_safe(self, stream, next);
    }

    fn renew_incarnation(&self, stream: &StreamName) -> BoxFuture<'static, Result<Incarnation, String>> {
        let renewed = EdgeStore::renew_incarnation(self, stream);
        Box::pin(async move { renewed.await.map_err(|error| error.to_string()) })
    }

    fn park(&self, stream: &StreamName, reason: Option<String>) {
        EdgeStore::park(self, stream, reason);
    }

    fn gap_declared(&self, stream: &StreamName, upto: Offset) {
        EdgeStore::gap_declared(self, stream, upto);
    }

    fn wait(&self, stream: &StreamName, beyond: Offset) -> BoxFuture<'static, ()> {
        self.wait_records(stream, beyond)
    }

    fn learn_limits(&self, limits: Limits) {
        self.set_limits(limits.batch_bytes_max as usize);
    }
}
