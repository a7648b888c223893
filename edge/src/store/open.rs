//! Opening: the lock on the directory, the budget, and what to do with a database that cannot be read.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use shared::clock::ClockReading;
use tracing::{error, info, warn};

use super::sessions::SessionBooks;
use super::*;
use crate::redb_log::backend::{CappedFile, OpenStorage};
use crate::redb_log::committer::{self, Pace};
use crate::redb_log::{StreamRecord, Trim};
use crate::retention::{BUDGET_BYTES_MIN, Budget, wants_compaction};
use crate::streams::StreamSettings;

/// Settings of the store.
#[derive(Clone)]
pub struct StoreSettings {
    /// This gateway's identity, for the header `tributary.edge`.
    pub edge: EdgeId,
    /// Where the database rests.
    pub data_dir: PathBuf,
    /// Bound of the page cache.
    pub cache_bytes: usize,
    /// Least time between starts of commits.
    pub commit_interval: Duration,
    /// Waiting bytes that start a commit before the interval is over.
    pub commit_bytes: usize,
    /// Most bytes the database may take; `None`: the lesser of 1 GiB and half of what is free.
    pub disk_budget: Option<u64>,
    /// Largest batch the cloud takes, until it says otherwise.
    pub batch_bytes_max: usize,
    /// Both clocks: the wall's for names and status, the other one for what expires.
    pub clock: Clock,
}

/// Reads both clocks of the machine.
pub type Clock = Arc<dyn Fn() -> ClockReading + Send + Sync>;

impl std::fmt::Debug for StoreSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreSettings")
            .field("edge", &self.edge)
            .field("data_dir", &self.data_dir)
            .finish_non_exhaustive()
    }
}

impl StoreSettings {
    /// Defaults for a gateway and a directory.
    pub fn new(edge: EdgeId, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            edge,
            data_dir: data_dir.into(),
            cache_bytes: 8 << 20,
            commit_interval: Duration::ZERO,
            commit_bytes: 1 << 20,
            disk_budget: None,
            batch_bytes_max: shared::limits::BATCH_BYTES_MAX,
            clock: Arc::new(system_clock),
        }
    }
}

fn system_clock() -> ClockReading {
    let wall_ms = match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_millis()).unwrap_or(i64::MAX),
    };
    ClockReading { wall_ms, at: Instant::now() }
}

/// Why the store did not open, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds the directory.
    #[error("{} is in use by another process: stop that one, or give this one a data_dir of its own", .0.display())]
    InUse(PathBuf),
    /// The file system refused.
    #[error("{}: {error}: {remedy}", path.display())]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What it said.
        error: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// The database could not be opened, though it is not known to be damaged.
    #[error("{}: {error}: {remedy}", path.display())]
    Database {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        error: LogError,
        /// What to do.
        remedy: &'static str,
    },
    /// The budget is too small to work with.
    #[error(
        "a disk budget of {found} bytes is too small, {BUDGET_BYTES_MIN} are needed: free some space, or raise [storage] disk_budget"
    )]
    Budget {
        /// What there is.
        found: u64,
    },
    /// A stream moves to memory, and the database holds what only it has.
    #[error(
        "[[stream]] name = \"{stream}\": engine = \"memory\", but the database holds {records} records of it that are not safe in the cloud yet: start with engine = \"redb\" until status shows SAFE = NEXT, or give the stream in memory another name"
    )]
    Engine {
        /// The stream.
        stream: StreamName,
        /// What would be left behind.
        records: Offset,
    },
    /// The rules cannot be used.
    #[error(transparent)]
    Rules(#[from] RuleError),
    /// The committer's thread could not be started.
    #[error("cannot start a thread: {0}: raise the limit on processes of this user")]
    Thread(io::Error),
}

const DATABASE: &str = "edge.redb";
const LOCK: &str = "lock";
const SET_ASIDE: &str = "edge.redb.bad-";
/// Files set aside that a start names in its log; status names all.
const SET_ASIDE_NAMED: usize = 20;
/// Free bytes on the disk without which nothing is compacted.
const COMPACTION_FREE_MIN: u64 = 8 << 20;

/// A new incarnation.
pub(super) fn mint() -> Incarnation {
    let mut bits = [0u8; 16];
    if getrandom::fill(&mut bits).is_err() {
        // No randomness this early in a boot: time and process tell two lives apart well enough not to stop for it.
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        bits = (nanos ^ (u128::from(std::process::id()) << 96)).to_le_bytes();
    }
    Incarnation(bits)
}

impl EdgeStore {
    /// Opens or makes the store in its directory.
    pub fn open(settings: StoreSettings, streams: Vec<StreamSettings>) -> Result<Arc<Self>, OpenError> {
        let rules = Rules::new(&streams)?;
        let dir = settings.data_dir.clone();
        let writable = "make it a directory this user may write to, or set another data_dir";
        let io = |path: &Path, error, remedy| OpenError::Io { path: path.to_owned(), error, remedy };
        fs::create_dir_all(&dir).map_err(|error| io(&dir, error, writable))?;
        let lock = lock(&dir)?;
        let mut aside = set_aside(&dir).map_err(|error| io(&dir, error, writable))?;
        let path = dir.join(DATABASE);
        let bounded = |aside: &[PathBuf]| -> Result<(Budget, Arc<DiskBound>), OpenError> {
            let budget = Budget::new(disk_budget(&settings, &path, aside)?);
            let dir = dir.clone();
            let free = move || rustix::fs::statvfs(&dir).ok().map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize));
            Ok((budget, DiskBound::on_disk(budget.bytes_max, budget.reserve, Box::new(free))))
        };
        let (mut budget, mut bound) = bounded(&aside)?;
        let storage = CappedFile::opener(path.clone(), bound.clone());
        make(&dir, &path, &settings, &bound, &aside)?;
        let opened = match open_log(&storage, &settings, &bound) {
            Err(LogError::Damaged(what)) => {
                prove_damage(&path, &storage, &settings, &what)?;
                let bad = free_name(&dir, (settings.clock)().wall_ms);
                fs::rename(&path, &bad).map_err(|error| io(&path, error, writable))?;
                error!(%what, moved_to = %bad.display(), "the database is damaged and was set aside; what it had not sent stays there");
                aside.push(bad);
                (budget, bound) = bounded(&aside)?;
                make(&dir, &path, &settings, &bound, &aside)?;
                open_log(&CappedFile::opener(path.clone(), bound.clone()), &settings, &bound)
            }
            other => other,
        };
        for file in aside.iter().take(SET_ASIDE_NAMED) {
            error!(
                file = %file.display(),
                bytes = on_disk(file),
                files = aside.len(),
                "a damaged database waits for its records to be sent: stop the broker and run tributary-edge salvage FILE --remove"
            );
        }
        let opened = opened.map_err(|error| {
            let remedy = match &error {
                LogError::OtherFormat { .. } => {
                    "install the version that wrote it; or move the file away, start with an empty database, and send what the old one holds with salvage FILE of the tributary-edge that wrote it"
                }
                LogError::Full(_) => "free some space on that disk, or raise [storage] disk_budget; nothing was deleted",
                _ => "look at the system log for disk errors, check the file's permissions, and start again; nothing was deleted",
            };
            OpenError::Database { path: path.clone(), error, remedy }
        })?;
        let opened = compact_if_worth(opened, &dir, &bound).map_err(|error| OpenError::Database {
            path,
            error,
            remedy: "start again; nothing was deleted",
        })?;
        Self::start(settings, rules, opened, bound, budget, Some(lock), aside)
    }

    /// Opens the store on storage of the caller's: tests put doubles here.
    pub fn open_on(
        settings: StoreSettings,
        streams: &[StreamSettings],
        storage: &OpenStorage,
        bound: Arc<DiskBound>,
    ) -> Result<Arc<Self>, OpenError> {
        let rules = Rules::new(streams)?;
        let budget = Budget::new(settings.disk_budget.unwrap_or(crate::retention::BUDGET_BYTES_DEFAULT));
        let path = settings.data_dir.clone();
        let remedy = "start again";
        let opened =
            open_log(storage, &settings, &bound).map_err(|error| OpenError::Database { path, error, remedy })?;
        Self::start(settings, rules, opened, bound, budget, None, Vec::new())
    }

    fn start(
        settings: StoreSettings,
        rules: Rules,
        (log, contents): (RedbLog, crate::redb_log::Contents),
        bound: Arc<DiskBound>,
        budget: Budget,
        lock: Option<File>,
        aside: Vec<PathBuf>,
    ) -> Result<Arc<Self>, OpenError> {
        let mut contents = contents;
        leave_database(&log, &mut contents, &rules)?;
        let commit = contents.commit;
        info!(incarnation = %contents.incarnation, commit, streams = contents.streams.len(), "store opened");
        let sessions = log.sessions().map_err(|error| OpenError::Database {
            path: settings.data_dir.join(DATABASE),
            error,
            remedy: "look at the disk and start again; nothing was deleted",
        })?;
        let mut state = State::new(
            contents,
            &sessions,
            (settings.clock)(),
            &rules,
            budget,
            settings.batch_bytes_max,
            settings.commit_bytes,
        );
        drop(sessions);
        state.disk_has(bound.used(), bound.free());
        state.set_aside = aside;
        let ids: BTreeMap<u32, StreamRecord> =
            state.streams.iter().filter(|one| one.memory.is_none()).map(|one| (one.id, one.record.clone())).collect();
        for (id, record) in ids {
            let at = |offset| log.locate(id, offset).ok().flatten().map(|(_, place)| place);
            state.place_cursors(id, at(record.confirmed), at(record.safe));
        }
        let core = Arc::new(Core {
            log,
            rules,
            edge: settings.edge,
            state: Mutex::new(state),
            durable: AtomicU64::new(commit),
            refused: AtomicU64::new(0),
            refusals: Mutex::default(),
            progress: watch::Sender::new(Progress { durable: commit, ended: None }),
            room: watch::Sender::new(0),
            bell: Bell::default(),
            bound,
            clock: settings.clock,
        });
        let pace = Pace { interval: settings.commit_interval, bytes: settings.commit_bytes };
        let thread = {
            let core = core.clone();
            move || {
                // A panic below must not leave connections waiting for ever.
                let run = || committer::run(&core.log, &*core, &core.bell, &core.bound, pace);
                let ended = catch_unwind(AssertUnwindSafe(run));
                core.end(if ended.is_ok() { "closed" } else { "the database engine panicked" }.to_owned());
                core.log.close();
                // Released last: the next process finds the database closed.
                drop(lock);
            }
        };
        let committer =
            std::thread::Builder::new().name("committer".into()).spawn(thread).map_err(OpenError::Thread)?;
        Ok(Arc::new(Self { core, committer: Mutex::new(Some(committer)) }))
    }
}

/// Compacts a file that is mostly dead. It never stops a start: what fails is said, and the file stays as it was.
fn compact_if_worth(
    (log, contents): (RedbLog, crate::redb_log::Contents),
    dir: &Path,
    bound: &Arc<DiskBound>,
) -> Result<(RedbLog, crate::redb_log::Contents), LogError> {
    let records = contents.streams.values().map(|one| one.next_bytes.saturating_sub(one.first_bytes)).sum();
    let retained: u64 = contents.retained.iter().map(|(_, size)| u64::from(*size)).sum();
    let live = Budget::live(records, retained + SessionBooks::new(&log.sessions()?, u64::MAX).bytes());
    let before = bound.used();
    if !wants_compaction(before, live) {
        return Ok((log, contents));
    }
    // Pages move within the file, which hardly grows by it; but a disk that is full to the brim is left alone.
    let free = rustix::fs::statvfs(dir).map_or(0, |disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    if free < COMPACTION_FREE_MIN {
        warn!(
            before,
            live, free, "the database is mostly dead and not compacted: the disk has no room to do it safely"
        );
        return Ok((log, contents));
    }
    info!(before, live, "compacting the database: most of the file is dead");
    match log.compact() {
        Ok(_) => {
            info!(before, after = bound.used(), "the database is compacted");
            Ok((log, contents))
        }
        Err(error) => {
            warn!(%error, "the database was not compacted; it is opened as it is");
            let contents = log.reopen()?;
            Ok((log, contents))
        }
    }
}

/// Streams whose engine is memory now: what the database has of them is deleted if it is safe, and else stops the start.
fn leave_database(log: &RedbLog, contents: &mut crate::redb_log::Contents, rules: &Rules) -> Result<(), OpenError> {
    let moved =
        |record: &StreamRecord| rules.all().iter().any(|rule| rule.memory_bytes.is_some() && rule.name == record.name);
    for (id, record) in contents.streams.iter_mut().filter(|(_, record)| moved(record)) {
        let unsafe_from = record.safe.max(record.first);
        if unsafe_from < record.next {
            return Err(OpenError::Engine { stream: record.name.clone(), records: record.next - unsafe_from });
        }
        loop {
            let trim = Trim { stream: *id, below: record.next, bytes: u64::MAX, old: 0 };
            let commit = Commit {
                number: contents.commit + 1,
                trims: vec![trim],
                records: BTreeMap::from([(*id, record.clone())]),
                unchanged: std::collections::BTreeSet::from([*id]),
                ..Commit::default()
            };
            let remedy = "look at the disk and start again; nothing that is not safe in the cloud was deleted";
            let path = PathBuf::from(DATABASE);
            let trimmed = log.commit(&commit).map_err(|error| OpenError::Database { path, error, remedy })?;
            contents.commit += 1;
            trimmed.iter().for_each(|trim| crate::redb_log::apply_trim(record, trim));
            if !trimmed.iter().any(|trim| trim.more) {
                break;
            }
        }
    }
    Ok(())
}

fn open_log(
    storage: &OpenStorage,
    settings: &StoreSettings,
    bound: &Arc<DiskBound>,
) -> Result<(RedbLog, crate::redb_log::Contents), LogError> {
    match RedbLog::open(storage.clone(), settings.cache_bytes, mint) {
        Err(LogError::Full(_)) => {
            // Recovery itself may need a page or two: what the reserve is for.
            bound.raise(true);
            let opened = RedbLog::open(storage.clone(), settings.cache_bytes, mint);
            bound.raise(false);
            opened
        }
        other => other,
    }
}

/// Makes the database where there is none: under another name, because a power cut in the middle leaves a file that is
/// no database, and such a file under the real name would pass for damage.
fn make(
    dir: &Path,
    path: &Path,
    settings: &StoreSettings,
    bound: &Arc<DiskBound>,
    aside: &[PathBuf],
) -> Result<(), OpenError> {
    if path.exists() {
        return Ok(());
    }
    let new = dir.join(format!("{DATABASE}.new"));
    let remedy = if aside.is_empty() {
        "free some space on that disk, or make the directory writable for this user"
    } else {
        "free some space on that disk: databases set aside (edge.redb.bad-*) are sent and removed by tributary-edge salvage FILE --remove, or may be moved to another disk"
    };
    let io = |error| OpenError::Io { path: new.clone(), error, remedy };
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
        _ => {}
    }
    let storage = CappedFile::opener(new.clone(), bound.clone());
    let made = open_log(&storage, settings, bound);
    let (log, _) = made.map_err(|error| OpenError::Database { path: new.clone(), error, remedy })?;
    log.close();
    fs::rename(&new, path).map_err(io)?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)
}

/// Holds a data directory against every other process of this program, until it is dropped.
pub fn lock(dir: &Path) -> Result<File, OpenError> {
    let path = dir.join(LOCK);
    let remedy = "make it writable for this user, or set another data_dir";
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|error| OpenError::Io { path: path.clone(), error, remedy })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse(dir.to_owned())),
        Err(TryLockError::Error(error)) => Err(OpenError::Io { path, error, remedy }),
    }
}

/// Databases that were set aside, oldest first.
fn set_aside(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(SET_ASIDE) && entry.file_type()?.is_file() {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// A name for a damaged database that nothing has, whatever the clock says.
fn free_name(dir: &Path, now_ms: TimestampMs) -> PathBuf {
    let mut seconds = now_ms.max(0) / 1000;
    loop {
        let name = dir.join(format!("{SET_ASIDE}{seconds}"));
        if fs::symlink_metadata(&name).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return name;
        }
        seconds += 1;
    }
}

/// What a file takes on the disk.
pub(super) fn on_disk(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).map_or(0, |file| file.blocks() * 512)
}

/// The budget for the database alone. What was set aside is taken off it, but never so much that the database could not
/// work: a setting that is too small ends a start, what this program itself has left on the disk does not.
pub(super) fn disk_budget(settings: &StoreSettings, path: &Path, aside: &[PathBuf]) -> Result<u64, OpenError> {
    let (used, set_aside) = (on_disk(path), aside.iter().map(|path| on_disk(path)).sum::<u64>());
    let all = match settings.disk_budget {
        Some(bytes) if bytes < BUDGET_BYTES_MIN => return Err(OpenError::Budget { found: bytes }),
        Some(bytes) => bytes,
        None => {
            let disk = rustix::fs::statvfs(&settings.data_dir).map_err(|error| OpenError::Io {
                path: settings.data_dir.clone(),
                error: error.into(),
                remedy: "set [storage] disk_budget, which is then not measured",
            })?;
            Budget::from_free(disk.f_bavail.saturating_mul(disk.f_frsize), used + set_aside)
        }
    };
    if all < BUDGET_BYTES_MIN && used + set_aside == 0 {
        return Err(OpenError::Budget { found: all });
    }
    Ok(all.saturating_sub(set_aside).max(used.min(all)).max(BUDGET_BYTES_MIN))
}

/// Damage is proven when the disk gives every byte of the file and a second look finds the same. Anything else ends the
/// start: a database that might be read tomorrow is not set aside today.
fn prove_damage(path: &Path, storage: &OpenStorage, settings: &StoreSettings, what: &str) -> Result<(), OpenError> {
    let mut buffer = vec![0u8; 1 << 20];
    let read_all = || -> io::Result<()> {
        let mut file = File::open(path)?;
        while file.read(&mut buffer)? > 0 {}
        Ok(())
    };
    let mut read_all = read_all;
    read_all().map_err(|error| OpenError::Io {
        path: path.to_owned(),
        error,
        remedy: "the disk does not give back what it stored: replace it; the database was left as it is",
    })?;
    match RedbLog::open(storage.clone(), settings.cache_bytes, mint) {
        Err(LogError::Damaged(_)) => Ok(()),
        Ok(_) => Err(OpenError::Database {
            path: path.to_owned(),
            error: LogError::Io(format!("looked damaged ({what}), and then did not")),
            remedy: "start again; check the memory and the disk of this machine",
        }),
        Err(error) => Err(OpenError::Database { path: path.to_owned(), error, remedy: "start again" }),
    }
}
