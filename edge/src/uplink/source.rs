//! The store as the uplink's source of rows.

use shared::link::frame::Limits;
use shared::link::sender::{Row, Rows, StreamInfo};
use shared::log::{BoxFuture, Chain};
use shared::name::{Incarnation, Offset, StreamName};

use super::StreamSource;
use crate::store::{EdgeStore, StreamError};

impl Rows for EdgeStore {
    fn streams(&self) -> Vec<StreamInfo> {
        let names = EdgeStore::streams(self).into_iter();
        let info = |name: StreamName| {
            let at = self.position(&name)?;
            Some(StreamInfo {
                name,
                topic: at.topic,
                incarnation: at.incarnation,
                first: at.first,
                next: at.next,
                confirmed: at.confirmed,
                safe: at.safe,
                dropped: at.gap,
            })
        };
        names.filter_map(info).collect()
    }

    fn read(&self, stream: &StreamName, from: Offset, bytes_max: usize) -> Result<Vec<Row>, String> {
        let mut from = from;
        // Rows may be dropped between the question where the stream begins and the reading.
        for _ in 0..8 {
            match EdgeStore::read(self, stream, from, bytes_max) {
                Ok(batches) => {
                    let row = |stored: crate::store::StoredBatch| Row { batch: stored.batch, chain: stored.chain };
                    return Ok(batches.into_iter().map(row).collect());
                }
                Err(StreamError::OutOfRange { requested, first, .. }) if requested < first => from = first,
                // Beyond the end there is nothing, which is no error to the sender.
                Err(StreamError::OutOfRange { .. }) => return Ok(Vec::new()),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(Vec::new())
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
