//! An object store that fails on order: before it does what was asked, after, by silence, or with half a body.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use parking_lot::Mutex;

/// What goes wrong.
#[derive(Debug, Default)]
pub struct Plan {
    /// Nothing is answered but errors.
    pub down: bool,
    /// After so many writes every request fails, as if the process had been cut off.
    pub writes_left: Option<u32>,
    /// One in so many requests fails, in one of four ways.
    pub one_in: Option<u64>,
    /// Writes to keys that contain this are done, and answered with an error.
    pub lost_answers: Option<&'static str>,
    /// `PutMode::Create` is not honoured.
    pub unconditional: bool,
    /// Where the pseudo-random numbers are.
    pub seed: u64,
    /// Writes done.
    pub writes: u32,
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
        if self.plan.lock().unconditional {
            opts.mode = PutMode::Overwrite;
        }
        let lost = self.plan.lock().lost_answers.is_some_and(|part| location.as_ref().contains(part));
        let put = self.apply(true, self.inner.put_opts(location, payload, opts)).await?.0;
        if lost { Err(error("503 after")) } else { Ok(put) }
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(error("no multipart here"))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
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
        match self.fault(false) {
            Fault::None => self.inner.list(prefix),
            _ => futures_util::stream::once(async { Err(error("503")) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(error("no copies here"))
    }
}
