//! One object store, as carefully as it must be used: nothing is overwritten, no outcome is guessed, nothing is read
//! beyond a bound.
//!
//! Every write is a `PutMode::Create`. When its outcome is not known (a time-out, a 5xx after the store had done it), it
//! is made again with the same bytes; `AlreadyExists` is settled by reading back and comparing.

use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode,
    PutPayload, RetryConfig,
};

use crate::planted::{Bug, planted};

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
}

impl Default for RequestSettings {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            bytes_per_sec_min: 512 * 1024,
            attempts: 4,
            backoff: Duration::from_millis(100),
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
    requests: Requests,
}

impl Store {
    /// Uses `inner`, below `prefix`.
    pub fn new(inner: Arc<dyn ObjectStore>, prefix: Path, settings: RequestSettings) -> Self {
        Self { inner, prefix, settings, requests: Requests::default() }
    }

    /// Opens `file:///directory` or `s3://bucket/prefix`. `options` are the `AWS_*` variables, as main read them.
    pub fn open(url: &str, options: &[(String, String)], settings: RequestSettings) -> Result<Self, StoreError> {
        let refused = |reason: String| StoreError::Url { url: url.to_owned(), reason };
        if let Some(directory) = url.strip_prefix("file://") {
            if !directory.starts_with('/') {
                return Err(refused("expected file:///ABSOLUTE/PATH".into()));
            }
            return Self::directory(FilePath::new(directory), settings);
        }
        let Some(rest) = url.strip_prefix("s3://") else {
            return Err(refused("expected file:///ABSOLUTE/PATH or s3://BUCKET/PREFIX".into()));
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(refused("it names no bucket".into()));
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
        for (key, value) in options {
            let Ok(known) = key.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() else { continue };
            if matches!(known, AmazonS3ConfigKey::Endpoint) && value.starts_with("http://") {
                client = client.with_allow_http(true);
            }
            builder = builder.with_config(known, value);
        }
        let builder = builder.with_bucket_name(bucket).with_retry(retry).with_client_options(client);
        // One object at a time goes; the bulk call is what S3's likenesses lack most often.
        let built = builder.with_disable_bulk_delete(true).build();
        let inner = built.map_err(|e| refused(e.to_string()))?;
        Ok(Self::new(Arc::new(inner), prefix, settings))
    }

    /// Opens a directory, which is made if need be. Every write is synced, file and directory.
    pub fn directory(directory: &FilePath, settings: RequestSettings) -> Result<Self, StoreError> {
        let refused = |reason: String| StoreError::Url { url: format!("file://{}", directory.display()), reason };
        std::fs::create_dir_all(directory).map_err(|e| refused(e.to_string()))?;
        let inner = LocalFileSystem::new_with_prefix(directory).map_err(|e| refused(e.to_string()))?;
        Ok(Self::new(Arc::new(inner.with_fsync(true)), Path::default(), settings))
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
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        let mut last = None;
        for attempt in 0..self.settings.attempts.max(1) {
            self.pause(attempt).await;
            let payload: PutPayload = chunks.iter().cloned().collect();
            let put = self.inner.put_opts(key, payload, PutMode::Create.into());
            last = Some(match self.timed_for(self.patience(bytes as u64), "PUT", key, put).await {
                Ok(_) => {
                    count(&self.requests.puts, 1);
                    count(&self.requests.put_bytes, bytes as u64);
                    return Ok(());
                }
                Err(Attempt::Exists(_)) if planted(Bug::NoNonce) => return Ok(()),
                Err(Attempt::Exists(reason)) => match self.get_once(key, None, bytes as u64 + 1).await {
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

    /// A whole object of at most `bytes_max` bytes.
    pub async fn get(&self, key: &Path, bytes_max: u64) -> Result<Bytes, StoreError> {
        self.repeated(|| self.get_once(key, None, bytes_max)).await
    }

    /// Exactly `range` of an object.
    pub async fn get_range(&self, key: &Path, range: std::ops::Range<u64>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let length = range.end - range.start;
        self.repeated(|| self.get_once(key, Some(GetRange::Bounded(range.clone())), length)).await
    }

    async fn get_once(&self, key: &Path, range: Option<GetRange>, bytes_max: u64) -> Result<Bytes, StoreError> {
        let failed = |reason: &str| StoreError::Failed { operation: "GET", key: key.clone(), reason: reason.into() };
        let exact = range.is_some();
        let get = async {
            let result = self.inner.get_opts(key, GetOptions::new().with_range(range)).await?;
            let expected = result.range.end - result.range.start;
            if expected > bytes_max {
                return Ok((expected, Bytes::new()));
            }
            Ok((expected, result.bytes().await?))
        };
        let patience = if exact { self.patience(bytes_max) } else { self.patience(UNKNOWN_BYTES) };
        let (expected, bytes) = match self.timed_for(patience, "GET", key, get).await {
            Ok(result) => result,
            Err(Attempt::Failed(error)) => return Err(error),
            Err(Attempt::Exists(reason)) => return Err(failed(&reason)),
        };
        count(&self.requests.gets, 1);
        count(&self.requests.get_bytes, bytes.len() as u64);
        if expected > bytes_max {
            return Err(failed(TOO_LARGE));
        }
        if bytes.len() as u64 != expected || (exact && expected != bytes_max) {
            count(&self.requests.errors, 1);
            return Err(failed("the body was cut short"));
        }
        Ok(bytes)
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
                let listing = self.inner.list(Some(prefix)).try_collect::<Vec<ObjectMeta>>();
                match self.timed("LIST", prefix, listing).await {
                    Ok(found) => Ok(found),
                    Err(Attempt::Failed(error)) => Err(error),
                    Err(Attempt::Exists(reason)) => {
                        Err(StoreError::Failed { operation: "LIST", key: prefix.clone(), reason })
                    }
                }
            })
            .await?;
        found.sort_by(|a, b| a.location.cmp(&b.location));
        Ok(found)
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
        let again = put(9).await;
        let winners = answers.iter().filter(|answer| answer.is_ok()).count();
        let proven = match (again, winners) {
            (Err(Attempt::Exists(_)), 1) => Ok(()),
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
        let mut number = 0;
        loop {
            self.pause(number).await;
            number += 1;
            match attempt().await {
                Err(StoreError::Failed { reason, .. }) if number < self.settings.attempts && reason != TOO_LARGE => {}
                answer => return answer,
            }
        }
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

    async fn pause(&self, attempt: u32) {
        if attempt > 0 {
            tokio::time::sleep(backoff(self.settings.backoff, attempt)).await;
        }
    }
}

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

/// The pause before attempt number `attempt` (from 1): doubling, at most 64-fold, between half and all of it.
pub fn backoff(base: Duration, attempt: u32) -> Duration {
    let full = base * 2u32.pow(attempt.saturating_sub(1).min(6));
    full / 2 + full.mul_f64((random() >> 11) as f64 / (1u64 << 53) as f64) / 2
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
