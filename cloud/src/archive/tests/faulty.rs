//! An object store that fails on order: before it does what was asked, after, by silence, or with half a body.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetRange, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use parking_lot::Mutex;

/// What goes wrong.
#[derive(Debug, Default)]
pub struct Plan {
    /// Nothing is answered but errors.
    pub down: bool,
    /// After so many writes every request fails, as if the process had been cut off.
    pub writes_left: Option<u32>,
    /// The first writes, so many, fail with nothing done.
    pub refused_first: u32,
    /// One in so many requests fails, in one of four ways.
    pub one_in: Option<u64>,
    /// Writes to keys that contain this are done, and answered with an error.
    pub lost_answers: Option<&'static str>,
    /// There is no such bucket.
    pub bucketless: bool,
    /// `PutMode::Create` is not honoured.
    pub unconditional: bool,
    /// Where the pseudo-random numbers are.
    pub seed: u64,
    /// Writes done.
    pub writes: u32,
    /// Reads are never answered.
    pub silent: bool,
    /// How long a read takes.
    pub latency: Duration,
    /// How long a write takes.
    pub write_latency: Duration,
    /// What was asked, but for writes.
    pub asked: Asked,
}

/// Requests that write nothing, by kind.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// GETs of a range.
    pub ranges: usize,
    /// Bytes of them.
    pub bytes: u64,
    /// GETs of whole objects.
    pub wholes: usize,
    /// HEADs.
    pub heads: usize,
    /// LISTs.
    pub lists: usize,
}

/// The store; clones share the content.
#[derive(Debug, Clone)]
pub struct Faulty {
    pub inner: Arc<InMemory>,
    pub plan: Arc<Mutex<Plan>>,
}

enum Fault {
    None,
    Before,
    After,
    Silence,
    Cut,
}

impl Faulty {
    pub fn new() -> Self {
        Self { inner: Arc::new(InMemory::new()), plan: Arc::default() }
    }

    /// The same content seen by a process of its own, with faults of its own.
    pub fn other(&self) -> Self {
        Self { inner: self.inner.clone(), plan: Arc::default() }
    }

    fn fault(&self, write: bool) -> Fault {
        let mut plan = self.plan.lock();
        if plan.down || plan.writes_left == Some(0) {
            return Fault::Before;
        }
        if write {
            plan.writes += 1;
            if let Some(left) = &mut plan.writes_left {
                *left -= 1;
            }
        }
        if write && plan.writes <= plan.refused_first {
            return Fault::Before;
        }
        let Some(one_in) = plan.one_in else { return Fault::None };
        plan.seed = plan.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let number = plan.seed >> 33;
        if !number.is_multiple_of(one_in) {
            return Fault::None;
        }
        match number / one_in % 4 {
            0 => Fault::Before,
            1 => Fault::After,
            2 => Fault::Silence,
            _ if write => Fault::After,
            _ => Fault::Cut,
        }
    }

    /// What was asked since this was called last.
    pub fn asked(&self) -> Asked {
        std::mem::take(&mut self.plan.lock().asked)
    }

    fn note(&self, options: &GetOptions) -> (bool, Duration) {
        let mut plan = self.plan.lock();
        match &options.range {
            _ if options.head => plan.asked.heads += 1,
            Some(GetRange::Bounded(range)) => {
                plan.asked.ranges += 1;
                plan.asked.bytes += range.end - range.start;
            }
            _ => plan.asked.wholes += 1,
        }
        (plan.silent, plan.latency)
    }

    async fn apply<T>(&self, write: bool, request: impl Future<Output = Result<T>>) -> Result<(T, bool)> {
        match self.fault(write) {
            Fault::None => Ok((request.await?, false)),
            Fault::Cut => Ok((request.await?, true)),
            Fault::Before => Err(error("503 before")),
            Fault::After => {
                let _ = request.await;
                Err(error("503 after"))
            }
            Fault::Silence => {
                let _ = request.await;
                std::future::pending().await
            }
        }
    }
}

fn error(text: &'static str) -> Error {
    Error::Generic { store: "faulty", source: text.into() }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty store")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, mut opts: PutOptions) -> Result<PutResult> {
        if self.plan.lock().bucketless {
            return Err(Error::NotFound { path: location.to_string(), source: "NoSuchBucket".into() });
        }
        if self.plan.lock().unconditional {
            opts.mode = PutMode::Overwrite;
        }
        let latency = self.plan.lock().write_latency;
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        let lost = self.plan.lock().lost_answers.is_some_and(|part| location.as_ref().contains(part));
        let put = self.apply(true, self.inner.put_opts(location, payload, opts)).await?.0;
        if lost { Err(error("503 after")) } else { Ok(put) }
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(error("no multipart here"))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let (silent, latency) = self.note(&options);
        if silent {
            std::future::pending::<()>().await;
        }
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        if self.plan.lock().lost_answers.is_some_and(|part| location.as_ref().contains(part)) {
            return Err(error("503"));
        }
        let (result, cut) = self.apply(false, self.inner.get_opts(location, options)).await?;
        if !cut {
            return Ok(result);
        }
        let (meta, range, attributes, extensions) =
            (result.meta.clone(), result.range.clone(), result.attributes.clone(), result.extensions.clone());
        let bytes = result.bytes().await?;
        let half: Bytes = bytes.slice(..bytes.len() / 2);
        let payload = GetResultPayload::Stream(futures_util::stream::once(async { Ok(half) }).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.fault(true) {
            Fault::None => self.inner.delete_stream(locations),
            _ => futures_util::stream::once(async { Err(error("503")) }).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.plan.lock().asked.lists += 1;
        match self.fault(false) {
            Fault::None => self.inner.list(prefix),
            _ => futures_util::stream::once(async { Err(error("503")) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.plan.lock().asked.lists += 1;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(error("no copies here"))
    }
}
