//! A log that fails on order: for tests of what must survive a failing one.
//!
//! It stands before any engine and follows a script: each append takes the next [`Fault`], and when the script has ended all
//! goes through. Nothing is random here; a caller who wants chance draws the script.

use std::collections::VecDeque;
use std::sync::Arc;

use event_listener::Event;
use parking_lot::Mutex;

use super::{
    Append, AppendError, Appended, Bounds, BoxFuture, EpochEnd, Log, Read, ReadError, ReadLimits, TimePoint, TrimError,
};
use crate::name::{Offset, Partition, TimestampMs};

/// What happens to one append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It goes through.
    Pass,
    /// Nothing is stored, and this is the answer.
    Refuse(AppendError),
    /// It is stored, and this is the answer: an outcome that the caller must not take for a refusal.
    StoreThenFail(AppendError),
    /// It is stored and answered once [`FaultyLog::release`] is called.
    Hold,
}

/// A log with faults before it.
pub struct FaultyLog {
    inner: Arc<dyn Log>,
    script: Mutex<VecDeque<Fault>>,
    reads: Mutex<VecDeque<Option<ReadError>>>,
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    released: Mutex<u64>,
    turned: Event,
}

impl FaultyLog {
    /// Stands before `inner` with an empty script.
    pub fn new(inner: Arc<dyn Log>) -> Self {
        Self { inner, script: Mutex::default(), reads: Mutex::default(), gate: Arc::default() }
    }

    /// Adds to what happens to the next appends.
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        self.script.lock().extend(faults);
    }

    /// Adds to what happens to the next reads: the error, or `None` to pass.
    pub fn script_reads(&self, faults: impl IntoIterator<Item = Option<ReadError>>) {
        self.reads.lock().extend(faults);
    }

    /// Lets every held append go on.
    pub fn release(&self) {
        *self.gate.released.lock() += 1;
        self.gate.turned.notify(usize::MAX);
    }
}

impl Gate {
    async fn pass(&self, entered: u64) {
        loop {
            let turned = self.turned.listen();
            if *self.released.lock() > entered {
                return;
            }
            turned.await;
        }
    }
}

impl Log for FaultyLog {
    fn append(&self, append: Append) -> BoxFuture<'static, Result<Appended, AppendError>> {
        match self.script.lock().pop_front().unwrap_or(Fault::Pass) {
            Fault::Pass => self.inner.append(append),
            Fault::Refuse(error) => Box::pin(std::future::ready(Err(error))),
            Fault::StoreThenFail(error) => {
                let stored = self.inner.append(append);
                Box::pin(async move { stored.await.and(Err(error)) })
            }
            Fault::Hold => {
                let (stored, gate) = (self.inner.append(append), self.gate.clone());
                let entered = *gate.released.lock();
                Box::pin(async move {
                    gate.pass(entered).await;
                    stored.await
                })
            }
        }
    }

    fn read(&self, partition: Partition, from: Offset, limits: ReadLimits) -> BoxFuture<'_, Result<Read, ReadError>> {
        match self.reads.lock().pop_front().flatten() {
            Some(error) => Box::pin(std::future::ready(Err(error))),
            None => self.inner.read(partition, from, limits),
        }
    }

    fn bounds(&self, partition: Partition) -> Result<Bounds, ReadError> {
        self.inner.bounds(partition)
    }

    fn wait(&self, partition: Partition, beyond: Offset) -> BoxFuture<'static, Result<(), ReadError>> {
        self.inner.wait(partition, beyond)
    }

    fn trim(&self, partition: Partition, before: Offset) -> BoxFuture<'static, Result<Offset, TrimError>> {
        self.inner.trim(partition, before)
    }

    fn find_time(&self, partition: Partition, at: TimestampMs) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        self.inner.find_time(partition, at)
    }

    fn max_time(&self, partition: Partition) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        self.inner.max_time(partition)
    }

    fn epoch_end(&self, partition: Partition, epoch: i32) -> Result<Option<EpochEnd>, ReadError> {
        self.inner.epoch_end(partition, epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{batch, block_on, from_producer, poll_once};
    use super::super::memory::MemoryLog;
    use super::*;
    use crate::name::TopicId;

    #[test]
    fn faults_come_in_the_order_of_the_script() {
        let memory = MemoryLog::new(1 << 20);
        let partition = Partition { topic: TopicId([1; 16]), index: 0 };
        memory.create(partition);
        let log = FaultyLog::new(Arc::new(memory));
        let broken = AppendError::Storage("broken".into());
        log.script([Fault::Refuse(AppendError::Closed), Fault::StoreThenFail(broken.clone()), Fault::Hold]);
        let send = || log.append(from_producer(partition, batch(1, 1)));
        assert_eq!(block_on(send()), Err(AppendError::Closed));
        assert_eq!(block_on(send()), Err(broken));
        assert_eq!(log.bounds(partition).unwrap().high_watermark, 1, "stored all the same");
        let mut held = send();
        assert!(poll_once(&mut held).is_none());
        log.release();
        assert_eq!(block_on(held).unwrap().base_offset, 1);
        assert_eq!(block_on(send()).unwrap().base_offset, 2);
        log.script_reads([Some(ReadError::Closed)]);
        let limits = ReadLimits { bytes_max: 1 };
        assert_eq!(block_on(log.read(partition, 0, limits)).unwrap_err(), ReadError::Closed);
        assert!(block_on(log.read(partition, 0, limits)).is_ok());
    }
}
