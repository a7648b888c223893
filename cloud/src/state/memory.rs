//! A state log in memory: for tests of what stands on one. It keeps nothing beyond the process.

use parking_lot::Mutex;
use shared::log::{AppendError, BoxFuture};
use shared::name::TimestampMs;

use super::{Change, State, StateLog};

/// Applies changes at once and remembers them.
#[derive(Debug, Default)]
pub struct MemoryStateLog {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    state: State,
    commits: Vec<Vec<Change>>,
    refuse: Option<AppendError>,
    now_ms: TimestampMs,
}

impl Inner {
    fn apply(&mut self, change: &Change) {
        self.state.apply(change).expect("a change of a guest in the list");
    }
}

impl MemoryStateLog {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that begins with these changes applied.
    pub fn with(changes: &[Change]) -> Self {
        let log = Self::new();
        changes.iter().for_each(|change| log.inner.lock().apply(change));
        log
    }

    /// From now on every commit is refused with this, or taken again.
    pub fn refuse(&self, error: Option<AppendError>) {
        self.inner.lock().refuse = error;
    }

    /// From now on it is this late.
    pub fn set_now(&self, now_ms: TimestampMs) {
        self.inner.lock().now_ms = now_ms;
    }

    /// What was committed so far, commit by commit.
    pub fn commits(&self) -> Vec<Vec<Change>> {
        self.inner.lock().commits.clone()
    }
}

impl StateLog for MemoryStateLog {
    fn commit(&self, changes: Vec<Change>) -> BoxFuture<'static, Result<(), AppendError>> {
        let mut inner = self.inner.lock();
        let result = match inner.refuse.clone() {
            Some(error) => Err(error),
            None => {
                changes.iter().for_each(|change| inner.apply(change));
                inner.commits.push(changes);
                Ok(())
            }
        };
        Box::pin(std::future::ready(result))
    }

    fn with_state(&self, read: &mut dyn FnMut(&State)) {
        read(&self.inner.lock().state);
    }

    fn now_ms(&self) -> TimestampMs {
        self.inner.lock().now_ms
    }
}
