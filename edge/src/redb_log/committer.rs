//! The thread that owns the write transaction.
//!
//! A commit begins when the last one ended and something waits, but not sooner than `commit_interval` after the last one
//! began, unless `commit_bytes` wait. What comes while a commit runs shares the next one.
//!
//! After an error nothing is acknowledged. The handle is of no use then: the database is opened again, with growing
//! pauses, and the same commit is made again from memory; those who wait for it go on waiting. If the database comes back
//! with something else than the last commit or this one, the store has failed for good, and the process must start over.
//!
//! A commit that stays full although room was made and the reserve was lent is made without what does not fit (see
//! [`Commit::shed_more`]): only that fails, and everybody else's records, cursors and deletes go on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tracing::{error, info, warn};

use super::backend::DiskBound;
use super::{Commit, LogError, RedbLog, Shed, Trimmed};

/// What the committer asks of the store.
pub trait Work: Send + Sync + 'static {
    /// Whether something waits for a commit now.
    fn urgency(&self) -> Urgency;

    /// Takes all that waits.
    fn take(&self) -> Commit;

    /// The disk was full: plans more deletes into `commit`.
    fn make_room(&self, commit: &mut Commit);

    /// `commit` is durable.
    fn committed(&self, commit: Commit, trimmed: Vec<Trimmed>, took: Duration);

    /// The disk does not take it for now; `None`: it does again.
    fn troubled(&self, why: Option<&LogError>);

    /// Nothing will become durable any more.
    fn failed(&self, why: String);
}

/// How soon a commit is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// Not at all.
    None,
    /// Some time: cursors moved.
    Later,
    /// Somebody waits; so many bytes do.
    Now {
        /// Waiting bytes.
        bytes: usize,
    },
}

/// When commits begin.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Least time between starts.
    pub interval: Duration,
    /// Waiting bytes that start one earlier.
    pub bytes: usize,
}

/// Cursors that moved are written after this at the latest, even if no record comes.
const LATER: Duration = Duration::from_secs(1);
/// How long to pause before the database is opened again, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// Wakes the committer.
#[derive(Debug, Default)]
pub struct Bell {
    state: Mutex<BellState>,
    rung: Condvar,
}

#[derive(Debug, Default)]
struct BellState {
    rung: bool,
    closing: bool,
}

impl Bell {
    /// Something waits.
    pub fn ring(&self) {
        let mut state = self.state.lock();
        if !state.rung {
            state.rung = true;
            self.rung.notify_one();
        }
    }

    /// Commit what waits, then end.
    pub fn close(&self) {
        self.state.lock().closing = true;
        self.rung.notify_one();
    }

    fn is_closing(&self) -> bool {
        self.state.lock().closing
    }

    /// Waits until it is rung or closed, or for so long.
    fn wait(&self, timeout: Duration) {
        let mut state = self.state.lock();
        if !state.rung && !state.closing {
            self.rung.wait_for(&mut state, timeout);
        }
        state.rung = false;
    }

    /// Sleeps, but not through the close.
    fn pause(&self, span: Duration) {
        let until = Instant::now() + span;
        let mut state = self.state.lock();
        while !state.closing && Instant::now() < until {
            self.rung.wait_until(&mut state, until);
        }
    }
}

/// Runs until the bell closes. Call it on a thread of its own.
pub fn run(log: &RedbLog, work: &dyn Work, bell: &Bell, bound: &Arc<DiskBound>, pace: Pace) {
    let mut last_start: Option<Instant> = None;
    let mut later_since: Option<Instant> = None;
    loop {
        let closing = bell.is_closing();
        let wait = match work.urgency() {
            Urgency::None if closing => return,
            Urgency::None => {
                later_since = None;
                Some(Duration::from_secs(3600))
            }
            Urgency::Later if closing => None,
            Urgency::Later => {
                let since = *later_since.get_or_insert_with(Instant::now);
                LATER.checked_sub(since.elapsed()).filter(|left| !left.is_zero())
            }
            Urgency::Now { bytes } if closing || bytes >= pace.bytes => None,
            Urgency::Now { .. } => {
                last_start.and_then(|start| pace.interval.checked_sub(start.elapsed())).filter(|left| !left.is_zero())
            }
        };
        if let Some(wait) = wait {
            bell.wait(wait);
            continue;
        }
        later_since = None;
        let start = Instant::now();
        last_start = Some(start);
        let mut commit = work.take();
        match commit_at_last(log, work, bell, bound, &mut commit) {
            Some(trimmed) => work.committed(commit, trimmed, start.elapsed()),
            None => return,
        }
    }
}

/// Commits, opening the database again as often as it takes. `None`: the store has failed or was closed meanwhile.
fn commit_at_last(
    log: &RedbLog,
    work: &dyn Work,
    bell: &Bell,
    bound: &Arc<DiskBound>,
    commit: &mut Commit,
) -> Option<Vec<Trimmed>> {
    let mut pause = PAUSE.0;
    let mut why = match log.commit(commit) {
        Ok(trimmed) => return Some(trimmed),
        Err(why) => why,
    };
    error!(%why, "commit failed; nothing is acknowledged until the database is open again");
    let mut room_made = false;
    loop {
        work.troubled(Some(&why));
        if bell.is_closing() {
            work.failed(format!("closed while the disk failed: {why}"));
            return None;
        }
        let attempt = reopened(log, commit).and_then(|reached| match reached {
            Some(trimmed) => Ok(trimmed),
            None => {
                // Only now is it certain that nothing of the last attempt is there: what is left out may change.
                if matches!(why, LogError::Full(_)) {
                    if !std::mem::replace(&mut room_made, true) {
                        work.make_room(commit);
                        bound.raise(true);
                    } else if !commit.shed_more() {
                        // Not even what frees room goes in: everything is tried again when time has passed.
                        commit.shed = Shed::default();
                        room_made = false;
                    }
                }
                Ok(log.commit(commit)?)
            }
        });
        match attempt {
            Ok(trimmed) => {
                bound.raise(false);
                work.troubled(None);
                if commit.shed.is_empty() {
                    info!("the database is open again, the commit went through");
                } else {
                    error!(
                        %why,
                        sessions = commit.shed.sessions.len(),
                        records = commit.shed.records,
                        "the disk is full: what found no room was not stored and is not acknowledged, its clients are disconnected and send it again; the rest goes on"
                    );
                }
                return Some(trimmed);
            }
            Err(Retry::Fatal(text)) => {
                error!(%text, "the store has failed");
                work.failed(text);
                return None;
            }
            Err(Retry::Again(error)) => {
                // The next step of a commit that is full makes it smaller: no reason to wait.
                let smaller = matches!(error, LogError::Full(_)) && room_made;
                why = error;
                if smaller {
                    continue;
                }
                warn!(%why, pause_ms = pause.as_millis() as u64, "still failing");
            }
        }
        bell.pause(pause);
        pause = (pause * 2).min(PAUSE.1);
    }
}

enum Retry {
    Again(LogError),
    Fatal(String),
}

impl From<LogError> for Retry {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Damaged(what) => Self::Fatal(format!("the database is damaged: {what}")),
            LogError::OtherFormat { .. } => Self::Fatal(error.to_string()),
            other => Self::Again(other),
        }
    }
}

/// Opens the database again. `Some`: the failed call had reached the disk after all; `None`: nothing of it is there.
fn reopened(log: &RedbLog, commit: &Commit) -> Result<Option<Vec<Trimmed>>, Retry> {
    // A database made afresh here would not be the one that was acknowledged from; its commit number tells.
    let contents = log.reopen()?;
    if contents.commit == commit.number {
        let trims = commit.trims.iter().filter_map(|trim| {
            let record = contents.streams.get(&trim.stream)?;
            Some(Trimmed {
                stream: trim.stream,
                first: record.first,
                first_chain: record.first_chain,
                first_bytes: record.first_bytes,
                youngest: i64::MIN,
                more: true,
            })
        });
        return Ok(Some(trims.collect()));
    }
    if contents.commit.checked_add(1) != Some(commit.number) {
        return Err(Retry::Fatal(format!(
            "the database came back with commit {}, the last acknowledged one was {}",
            contents.commit,
            commit.number.saturating_sub(1)
        )));
    }
    Ok(None)
}
