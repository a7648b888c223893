//! One object store, as carefully as it must be used: nothing of it is overwritten but hints, no outcome is guessed, nothing is read
//! beyond a bound.
//!
//! Every write but a heartbeat is a `PutMode::Create`. When its outcome is not known (a time-out, a 5xx after the store had done it), it
//! is made again with the same bytes; `AlreadyExists` is settled by reading back and comparing.

use std::io;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::Attribute;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, Error, GetOptions, GetRange, GetResult, GetResultPayload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutOptions, PutPayload, RetryConfig,
};
use shared::config::redacted;

use super::pace::{Pacer, RetryBudget};
use crate::buffers::Buffers;
use crate::manifest::is_segment;
use crate::planted::{Bug, planted};
use crate::wal::disk::DiskFile;

/// Why a store could not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("{0} is not in the store")]
    Missing(Path),
    /// There is an object of that name, with other bytes.
    #[error("{0} is in the store already, and someone else wrote it")]
    Taken(Path),
    /// It failed, or no answer came in time; the same request may succeed later.
    #[error("{operation} {key}: {reason}")]
    Failed {
        /// What was tried.
        operation: &'static str,
        /// On what.
        key: Path,
        /// What the store said.
        reason: String,
    },
    /// The store takes a second object of one name although it was told not to: nothing would keep two nodes apart.
    #[error(
        "{0} does not honour PUT If-None-Match: a second object of the same name was accepted. \
         Use a store that does (Amazon S3, MinIO, Ceph, file://)"
    )]
    Unconditional(String),
    /// The URL or its options are not usable.
    #[error("archive url {url:?}: {reason}")]
    Url {
        /// The URL.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// How requests are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestSettings {
    /// How long one attempt may take, besides its body.
    pub timeout: Duration,
    /// The slowest line that is not taken for a dead one: a body gets the time it needs at this rate on top.
    pub bytes_per_sec_min: u64,
    /// Attempts before an error is reported.
    pub attempts: u32,
    /// The pause before the second attempt, doubled for each further one, with jitter.
    pub backoff: Duration,
    /// Second and further attempts that all requests of a store may make together before some succeed again: ten
    /// successes earn one. An outage then costs each caller one attempt, and not several times the load.
    pub retry_budget: u32,
    /// Bytes per second of bodies that nobody waits for: shipping, splitting, the command-line tool. Not of what
    /// consumers read. `None` is without bound.
    pub bandwidth_max: Option<u64>,
}

impl Default for RequestSettings {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            bytes_per_sec_min: 512 * 1024,
            attempts: 4,
            backoff: Duration::from_millis(100),
            retry_budget: 100,
            bandwidth_max: None,
        }
    }
}

/// Requests made, since the start.
#[derive(Debug, Default)]
pub struct Requests {
    /// Objects written.
    pub puts: AtomicU64,
    /// Bytes of them.
    pub put_bytes: AtomicU64,
    /// Objects and ranges read.
    pub gets: AtomicU64,
    /// Bytes of them.
    pub get_bytes: AtomicU64,
    /// Listings: at a start and in sweeps only.
    pub lists: AtomicU64,
    /// Objects deleted.
    pub deletes: AtomicU64,
    /// Attempts that failed.
    pub errors: AtomicU64,
    /// Second and further attempts.
    pub retries: AtomicU64,
    /// Attempts that were not made because the retry budget was used up.
    pub retries_refused: AtomicU64,
    /// Milliseconds that bodies waited for the bandwidth limit.
    pub paced_ms: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// An object store with its manners.
#[derive(Debug)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    prefix: Path,
    settings: RequestSettings,
    /// What segments are stored as.
    storage_class: Option<String>,
    retries: RetryBudget,
    pacer: Option<Pacer>,
    requests: Requests,
    is_local: bool,
    /// What files are read to.
    buffers: Buffers,
}

impl Store {
    /// Uses `inner`, below `prefix`.
    pub fn new(inner: Arc<dyn ObjectStore>, prefix: Path, settings: RequestSettings) -> Self {
        let retries = RetryBudget::new(settings.retry_budget);
        let pacer = settings.bandwidth_max.map(Pacer::new);
        let (requests, buffers) = (Requests::default(), Buffers::new(IDLE_BYTES_MAX));
        Self { inner, prefix, settings, storage_class: None, retries, pacer, requests, is_local: false, buffers }
    }

    /// Opens `file:///directory` or `s3://bucket/prefix`. `options` are the `AWS_*` variables, as main read them, and
    /// [`STORAGE_CLASS`].
    pub fn open(url: &str, options: &[(String, String)], settings: RequestSettings) -> Result<Self, StoreError> {
        if let Some(directory) = local_directory(url)? {
            return Self::directory(directory, settings);
        }
        Self::s3(url, options, settings)
    }

    /// As [`Store::open`], but a directory that is not there is an error and is not made.
    pub fn open_existing(
        url: &str,
        options: &[(String, String)],
        settings: RequestSettings,
    ) -> Result<Self, StoreError> {
        if let Some(directory) = local_directory(url)? {
            if !directory.is_dir() {
                return Err(StoreError::Url { url: redacted(url), reason: "there is no such directory".into() });
            }
            return Self::directory(directory, settings);
        }
        Self::s3(url, options, settings)
    }

    fn s3(url: &str, options: &[(String, String)], settings: RequestSettings) -> Result<Self, StoreError> {
        let refused = |reason: String| StoreError::Url { url: redacted(url), reason };
        let Some(rest) = url.strip_prefix("s3://") else {
            return Err(refused("expected file:///ABSOLUTE/PATH or s3://BUCKET/PREFIX".into()));
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(refused("it names no bucket".into()));
        }
        if bucket.contains('@') {
            return Err(refused(
                "credentials have no place in it: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".into(),
            ));
        }
        let prefix = Path::parse(prefix.trim_end_matches('/')).map_err(|e| refused(e.to_string()))?;
        // Our own retries settle what came of a PUT; the client's would hide it.
        let retry = RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: 1,
            retry_timeout: settings.timeout.min(Duration::from_secs(20)),
        };
        let mut client = ClientOptions::new().with_timeout(CLIENT_TIMEOUT).with_connect_timeout(settings.timeout);
        let mut builder = AmazonS3Builder::new();
        let mut storage_class = None;
        for (key, value) in options {
            if key == STORAGE_CLASS {
                storage_class = Some(value.clone());
                continue;
            }
            let Ok(known) = key.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() else { continue };
            if matches!(known, AmazonS3ConfigKey::Endpoint) && value.starts_with("http://") {
                client = client.with_allow_http(true);
            }
            if matches!(known, AmazonS3ConfigKey::Endpoint) && redacted(value).contains("(hidden)") {
                // It would be in the text of every failed request.
                return Err(refused(format!("{key} holds a user name, a password or a query: leave them out")));
            }
            builder = builder.with_config(known, value);
        }
        let builder = builder.with_bucket_name(bucket).with_retry(retry).with_client_options(client);
        // One object at a time goes; the bulk call is what S3's likenesses lack most often.
        let built = builder.with_disable_bulk_delete(true).build();
        let inner = built.map_err(|e| refused(e.to_string()))?;
        Ok(Self { storage_class, ..Self::new(Arc::new(inner), prefix, settings) })
    }

    /// As [`Store::open`], for what may be lost: where the store is a directory, nothing is synced.
    pub(super) fn open_unsynced(
        url: &str,
        options: &[(String, String)],
        settings: RequestSettings,
    ) -> Result<Self, StoreError> {
        match local_directory(url)? {
            Some(directory) => Self::at_directory(directory, settings, false),
            None => Self::s3(url, options, settings),
        }
    }

    /// Opens a directory, which is made if need be. Every write is synced, file and directory.
    pub fn directory(directory: &FilePath, settings: RequestSettings) -> Result<Self, StoreError> {
        Self::at_directory(directory, settings, true)
    }

    fn at_directory(directory: &FilePath, settings: RequestSettings, synced: bool) -> Result<Self, StoreError> {
        let refused = |reason: String| StoreError::Url { url: format!("file://{}", directory.display()), reason };
        std::fs::create_dir_all(directory).map_err(|e| refused(e.to_string()))?;
        let inner = LocalFileSystem::new_with_prefix(directory).map_err(|e| refused(e.to_string()))?;
        Ok(Self { is_local: true, ..Self::new(Arc::new(inner.with_fsync(synced)), Path::default(), settings) })
    }

    /// Whether this is a directory. Then the kernel reads ahead, if what adjoins is read in order, and many requests at a
    /// time only disturb it.
    pub fn is_local(&self) -> bool {
        self.is_local
    }

    /// Everything of ours is below this.
    pub fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// What was asked of the store so far.
    pub fn requests(&self) -> &Requests {
        &self.requests
    }

    /// What the store is, for people.
    pub fn describe(&self) -> String {
        if self.prefix.as_ref().is_empty() { self.inner.to_string() } else { format!("{}/{}", self.inner, self.prefix) }
    }

    /// Makes an object of `chunks`. `Ok` means that it is there with these bytes, whoever's PUT it was that succeeded.
    pub async fn create(&self, key: &Path, chunks: &[Bytes]) -> Result<(), StoreError> {
        self.put(key, chunks, true).await
    }

    /// As [`Store::create`], outside the bandwidth limit: for what somebody waits for.
    pub async fn create_at_once(&self, key: &Path, chunks: &[Bytes]) -> Result<(), StoreError> {
        self.put(key, chunks, false).await
    }

    async fn put(&self, key: &Path, chunks: &[Bytes], paced: bool) -> Result<(), StoreError> {
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        let mut last = None;
        for attempt in 0..self.settings.attempts.max(1) {
            if !self.may_try(attempt).await {
                break;
            }
            if paced {
                self.pace(bytes as u64).await;
            }
            let payload: PutPayload = chunks.iter().cloned().collect();
            let put = self.inner.put_opts(key, payload, self.put_options(key));
            last = Some(match self.timed_for(self.patience(bytes as u64), "PUT", key, put).await {
                Ok(_) => {
                    self.retries.succeeded();
                    count(&self.requests.puts, 1);
                    count(&self.requests.put_bytes, bytes as u64);
                    return Ok(());
                }
                Err(Attempt::Exists(_)) if planted(Bug::NoNonce) => return Ok(()),
                Err(Attempt::Exists(reason)) => match self.get_once(key, bytes as u64 + 1).await {
                    Ok(there) if same(&there, chunks) => return Ok(()),
                    Ok(_) => return Err(StoreError::Taken(key.clone())),
                    // Deleted meanwhile, or a conflict that S3 reports as 409: to be made again.
                    Err(StoreError::Missing(_)) => StoreError::Failed { operation: "PUT", key: key.clone(), reason },
                    Err(StoreError::Failed { operation: "GET", reason, .. }) if reason == TOO_LARGE => {
                        return Err(StoreError::Taken(key.clone()));
                    }
                    Err(error) => error,
                },
                Err(Attempt::Failed(error)) => error,
            });
        }
        Err(last.unwrap_or_else(|| unanswered("PUT", key)))
    }

    fn put_options(&self, key: &Path) -> PutOptions {
        let mut options = PutOptions::from(PutMode::Create);
        // The rest lives for minutes or is read at each start: classes for long storage would cost more there.
        if let Some(class) = self.storage_class.as_ref().filter(|_| is_segment(key)) {
            options.attributes.insert(Attribute::StorageClass, class.clone().into());
        }
        options
    }

    /// Writes an object over what is there, in one attempt. For heartbeats alone: nothing else is ever written over.
    pub(super) async fn overwrite(&self, key: &Path, bytes: Bytes) -> Result<(), StoreError> {
        let length = bytes.len() as u64;
        let put = self.inner.put_opts(key, bytes.into(), PutMode::Overwrite.into());
        match self.timed("PUT", key, put).await {
            Ok(_) => {
                count(&self.requests.puts, 1);
                count(&self.requests.put_bytes, length);
                Ok(())
            }
            Err(Attempt::Failed(error)) => Err(error),
            Err(Attempt::Exists(reason)) => Err(StoreError::Failed { operation: "PUT", key: key.clone(), reason }),
        }
    }

    /// As [`Store::get`], in one attempt that takes no longer than `patience`: for who will look again soon.
    pub(super) async fn glance(&self, key: &Path, bytes_max: u64, patience: Duration) -> Result<Bytes, StoreError> {
        let get = tokio::time::timeout(patience, self.get_once(key, bytes_max)).await;
        get.unwrap_or_else(|_| Err(unanswered("GET", key)))
    }

    /// A whole object of at most `bytes_max` bytes.
    pub async fn get(&self, key: &Path, bytes_max: u64) -> Result<Bytes, StoreError> {
        self.repeated(|| self.get_once(key, bytes_max)).await
    }

    /// Exactly `range` of an object.
    pub async fn get_range(&self, key: &Path, range: std::ops::Range<u64>) -> Result<Bytes, StoreError> {
        let mut pieces = self.get_pieces(key, range, u64::MAX).await?;
        Ok(pieces.pop().unwrap_or_default())
    }

    /// As [`Store::get_range`], within the bandwidth limit: for readers that nobody waits for.
    pub async fn get_range_paced(&self, key: &Path, range: std::ops::Range<u64>) -> Result<Bytes, StoreError> {
        self.pace(range.end.saturating_sub(range.start)).await;
        self.get_range(key, range).await
    }

    /// As [`Store::get_range`], in pieces of `piece` bytes. Where the store is a directory each has memory of its own; elsewhere
    /// they share what the answer came in.
    pub async fn get_pieces(
        &self,
        key: &Path,
        range: std::ops::Range<u64>,
        piece: u64,
    ) -> Result<Vec<Bytes>, StoreError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let length = range.end - range.start;
        self.repeated(|| self.get_pieces_once(key, Some(GetRange::Bounded(range.clone())), length, piece)).await
    }

    /// A whole object, in one attempt.
    async fn get_once(&self, key: &Path, bytes_max: u64) -> Result<Bytes, StoreError> {
        let mut pieces = self.get_pieces_once(key, None, bytes_max, u64::MAX).await?;
        Ok(pieces.pop().unwrap_or_default())
    }

    async fn get_pieces_once(
        &self,
        key: &Path,
        range: Option<GetRange>,
        bytes_max: u64,
        piece: u64,
    ) -> Result<Vec<Bytes>, StoreError> {
        let failed = |reason: &str| StoreError::Failed { operation: "GET", key: key.clone(), reason: reason.into() };
        let exact = range.is_some();
        let get = async {
            let result = self.inner.get_opts(key, GetOptions::new().with_range(range)).await?;
            let expected = result.range.end - result.range.start;
            if expected > bytes_max {
                return Ok((expected, Vec::new()));
            }
            Ok((expected, self.body(result, piece.max(1)).await?))
        };
        let patience = if exact { self.patience(bytes_max) } else { self.patience(UNKNOWN_BYTES) };
        let (expected, pieces) = match self.timed_for(patience, "GET", key, get).await {
            Ok(result) => result,
            Err(Attempt::Failed(error)) => return Err(error),
            Err(Attempt::Exists(reason)) => return Err(failed(&reason)),
        };
        let bytes: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        count(&self.requests.gets, 1);
        count(&self.requests.get_bytes, bytes);
        if expected > bytes_max {
            return Err(failed(TOO_LARGE));
        }
        if bytes != expected || (exact && expected != bytes_max) {
            count(&self.requests.errors, 1);
            return Err(failed("the body was cut short"));
        }
        Ok(pieces)
    }

    /// What an answer brings, in pieces of `piece` bytes. A file is read in one go, to memory that is used again.
    async fn body(&self, answer: GetResult, piece: u64) -> object_store::Result<Vec<Bytes>> {
        match answer {
            GetResult { payload: GetResultPayload::File(file, _), range, .. } => {
                let buffers = self.buffers.clone();
                let read = move || {
                    let starts = range.clone().step_by(usize::try_from(piece).unwrap_or(usize::MAX));
                    let pieces = starts.map(|start| {
                        let bytes = piece.min(range.end - start) as usize;
                        let mut buffer = buffers.take_exactly(bytes);
                        file.read_at(buffer.bytes_mut(), start).map(|()| buffer.freeze(bytes))
                    });
                    pieces.collect::<io::Result<Vec<Bytes>>>()
                };
                let read =
                    off_async(read).await.unwrap_or_else(|| Err(io::Error::other("the thread that read it died")));
                read.map_err(|error| Error::Generic { store: "file", source: error.into() })
            }
            answer => {
                let mut rest = answer.bytes().await?;
                let pieces = std::iter::from_fn(|| {
                    let length = rest.len().min(usize::try_from(piece).unwrap_or(usize::MAX));
                    (length > 0).then(|| rest.split_to(length))
                });
                Ok(pieces.collect())
            }
        }
    }

    /// Removes an object; one that is gone already counts as removed.
    pub async fn delete(&self, key: &Path) -> Result<(), StoreError> {
        let deleted = self.repeated(|| async {
            match self.timed("DELETE", key, self.inner.delete(key)).await {
                Ok(()) | Err(Attempt::Failed(StoreError::Missing(_))) => Ok(()),
                Err(Attempt::Failed(error)) => Err(error),
                Err(Attempt::Exists(reason)) => {
                    Err(StoreError::Failed { operation: "DELETE", key: key.clone(), reason })
                }
            }
        });
        deleted.await?;
        count(&self.requests.deletes, 1);
        Ok(())
    }

    /// Every object below `prefix`, ascending by key. For starts and sweeps; reads never list.
    pub async fn list(&self, prefix: &Path) -> Result<Vec<ObjectMeta>, StoreError> {
        let mut found = self
            .repeated(|| async {
                count(&self.requests.lists, 1);
                let mut listing = self.inner.list(Some(prefix));
                let mut found: Vec<ObjectMeta> = Vec::new();
                // Each step has its own time: a million objects are a thousand answers.
                loop {
                    match self.timed("LIST", prefix, listing.try_next()).await {
                        Ok(Some(object)) => found.push(object),
                        Ok(None) => return Ok(found),
                        Err(Attempt::Failed(error)) => return Err(error),
                        Err(Attempt::Exists(reason)) => {
                            return Err(StoreError::Failed { operation: "LIST", key: prefix.clone(), reason });
                        }
                    }
                }
            })
            .await?;
        found.sort_by(|a, b| a.location.cmp(&b.location));
        Ok(found)
    }

    /// Shows every object below `prefix` to `look`, without holding them all. For sweeps, which have time: each thousand
    /// of them, a page of the listing, is followed by a pause, and each may take what a request may.
    pub async fn scan(&self, prefix: &Path, mut look: impl FnMut(Path)) -> Result<(), StoreError> {
        count(&self.requests.lists, 1);
        let mut listing = self.inner.list(Some(prefix));
        let mut seen = 0u64;
        loop {
            match self.timed("LIST", prefix, listing.try_next()).await {
                Ok(Some(object)) => look(object.location),
                Ok(None) => return Ok(()),
                Err(Attempt::Failed(error)) => return Err(error),
                Err(Attempt::Exists(reason)) => {
                    return Err(StoreError::Failed { operation: "LIST", key: prefix.clone(), reason });
                }
            }
            seen += 1;
            if seen.is_multiple_of(LIST_PAGE_OBJECTS) {
                count(&self.requests.lists, 1);
                tokio::time::sleep(self.settings.backoff).await;
            }
        }
    }

    /// Proves that the store can be written, read and deleted from, and that `PutMode::Create` is honoured: of several
    /// that write one name at a time, one succeeds.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let key = self.prefix.clone().join("probe").join(format!("{:016x}", random()));
        let put = |body: u8| {
            let payload = PutPayload::from(vec![body]);
            self.timed("PUT", &key, self.inner.put_opts(&key, payload, PutMode::Create.into()))
        };
        let answers = futures_util::future::join_all((0..4u8).map(put)).await;
        let winners = answers.iter().filter(|answer| answer.is_ok()).count();
        let again = match put(9).await {
            // None of the first came through: this one was the first, and proves nothing yet.
            Ok(_) if winners == 0 => put(10).await,
            again => again,
        };
        let proven = match (again, winners) {
            (Ok(_), _) | (_, 2..) => Err(StoreError::Unconditional(self.describe())),
            (Err(Attempt::Failed(error)), _) => Err(error),
            // Lost answers leave it open whose PUT won; one object of that name is what matters, and there is one.
            (Err(Attempt::Exists(_)), _) => Ok(()),
        };
        // A probe that could not be cleared away is a byte of litter.
        let _ = self.delete(&key).await;
        proven
    }

    async fn repeated<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut answer = attempt().await;
        for number in 1..self.settings.attempts {
            match &answer {
                Err(StoreError::Failed { reason, .. }) if reason != TOO_LARGE => {}
                _ => break,
            }
            if !self.may_try(number).await {
                break;
            }
            answer = attempt().await;
        }
        if answer.is_ok() {
            self.retries.succeeded();
        }
        answer
    }

    /// How long a request with a body may take: a slow line is not a dead one.
    fn patience(&self, bytes: u64) -> Duration {
        self.settings.timeout + Duration::from_secs(bytes / self.settings.bytes_per_sec_min.max(1))
    }

    async fn timed<T>(
        &self,
        operation: &'static str,
        key: &Path,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, Attempt> {
        self.timed_for(self.settings.timeout, operation, key, request).await
    }

    async fn timed_for<T>(
        &self,
        patience: Duration,
        operation: &'static str,
        key: &Path,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, Attempt> {
        let answer = match tokio::time::timeout(patience, request).await {
            Ok(answer) => answer,
            Err(_) => {
                count(&self.requests.errors, 1);
                return Err(Attempt::Failed(unanswered(operation, key)));
            }
        };
        answer.map_err(|error| match error {
            Error::NotFound { .. } => Attempt::Failed(StoreError::Missing(key.clone())),
            Error::AlreadyExists { .. } | Error::Precondition { .. } => Attempt::Exists(error.to_string()),
            error => {
                count(&self.requests.errors, 1);
                Attempt::Failed(StoreError::Failed { operation, key: key.clone(), reason: error.to_string() })
            }
        })
    }

    /// Waits before a further attempt, if the budget has one left.
    async fn may_try(&self, attempt: u32) -> bool {
        if attempt == 0 {
            return true;
        }
        if !self.retries.take() {
            count(&self.requests.retries_refused, 1);
            return false;
        }
        count(&self.requests.retries, 1);
        tokio::time::sleep(backoff(self.settings.backoff, attempt)).await;
        true
    }

    /// Waits until `bytes` more are within the bandwidth limit: slice by slice, so that a large body does not hold up a
    /// small one for long.
    async fn pace(&self, bytes: u64) {
        let Some(pacer) = &self.pacer else { return };
        let mut left = bytes;
        while left > 0 {
            let slice = left.min(pacer.slice());
            let wait = pacer.take(Instant::now(), slice);
            count(&self.requests.paced_ms, wait.as_millis() as u64);
            tokio::time::sleep(wait).await;
            left -= slice;
        }
    }
}

/// Among a store's options: the class that segments are stored as.
pub const STORAGE_CLASS: &str = "storage_class";

/// The directory that a `file://` URL names.
fn local_directory(url: &str) -> Result<Option<&FilePath>, StoreError> {
    match url.strip_prefix("file://") {
        Some(directory) if directory.starts_with('/') => Ok(Some(FilePath::new(directory))),
        Some(_) => Err(StoreError::Url { url: redacted(url), reason: "expected file:///ABSOLUTE/PATH".into() }),
        None => Ok(None),
    }
}

/// Objects in one page of a listing, as S3 and its likenesses have it.
const LIST_PAGE_OBJECTS: u64 = 1000;
/// Buffers kept for later reads of files: as much as one request for chunks brings.
const IDLE_BYTES_MAX: usize = 8 << 20;
/// What an object of unknown size is taken for.
const UNKNOWN_BYTES: u64 = 8 << 20;
/// Connections are given up after this, whatever the body.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(600);
const TOO_LARGE: &str = "it is larger than it can rightly be";

enum Attempt {
    Exists(String),
    Failed(StoreError),
}

fn unanswered(operation: &'static str, key: &Path) -> StoreError {
    StoreError::Failed { operation, key: key.clone(), reason: "no answer in time".into() }
}

fn same(there: &Bytes, chunks: &[Bytes]) -> bool {
    let mut rest = &there[..];
    for chunk in chunks {
        match rest.strip_prefix(&chunk[..]) {
            Some(after) => rest = after,
            None => return false,
        }
    }
    rest.is_empty()
}

/// Does what may wait for the disk on a thread that may; in place where there is no runtime.
pub(super) async fn off_async<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => runtime.spawn_blocking(work).await.ok(),
        Err(_) => Some(work()),
    }
}

/// The pause before attempt number `attempt` (from 1): doubling, at most 64-fold, between half and all of it.
pub fn backoff(base: Duration, attempt: u32) -> Duration {
    let full = base * 2u32.pow(attempt.saturating_sub(1).min(6));
    full / 2 + full.mul_f64((random() >> 11) as f64 / (1u64 << 53) as f64) / 2
}

/// Random bytes, of the same kind.
pub(super) fn random_bytes() -> [u8; 16] {
    (u128::from(random()) << 64 | u128::from(random())).to_be_bytes()
}

/// A random number; where the system has none, one that is at least different on each call.
pub fn random() -> u64 {
    #[cfg(test)]
    if let Some(number) = crate::sim::random() {
        return number;
    }
    static FALLBACK: AtomicU64 = AtomicU64::new(1);
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_ne_bytes(bytes),
        Err(_) => FALLBACK.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed),
    }
}
