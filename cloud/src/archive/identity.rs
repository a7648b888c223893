//! What a bucket says of whom it belongs to: the cluster id, random, minted once, kept in data directory and bucket; and
//! for each shard the engine that writes it.

use std::io::Write as _;
use std::path::Path as FilePath;

use bytes::Bytes;
use object_store::path::Path;
use tracing::{info, warn};

use super::store::random;
use super::{ArchiveError, ArchiveSettings, Store, StoreError};
use crate::state::Engine;

const FILE: &str = "cluster-id";
/// Longest id that is read.
const BYTES_MAX: u64 = 64;

/// The id that data directory and bucket agree on; where one has none, it gets the other's.
pub(super) async fn agree(
    settings: &ArchiveSettings,
    store: &Store,
    key: &Path,
    remote: bool,
) -> Result<String, ArchiveError> {
    let data_dir = settings.data_dir.as_path();
    let local = read(data_dir)?;
    let there =
        match store.get(key, BYTES_MAX).await {
            Ok(bytes) => Some(parse(&bytes).ok_or_else(|| ArchiveError::Damaged {
                key: key.to_string(),
                reason: "it is not a cluster id".into(),
            })?),
            Err(StoreError::Missing(_)) => None,
            Err(error @ StoreError::Failed { .. }) if remote => {
                warn!(%error, "the archive cannot be reached");
                return local.ok_or_else(|| settings.unreachable(store, &error));
            }
            Err(error) => return Err(error.into()),
        };
    match (local, there) {
        (Some(local), Some(there)) if local == there => Ok(local),
        (Some(local), Some(bucket)) => Err(ArchiveError::ClusterMismatch { local, bucket, archive: store.describe() }),
        (None, Some(there)) => {
            info!(cluster_id = %there, "this data directory joins the system that the archive belongs to");
            write(data_dir, &there)?;
            Ok(there)
        }
        (local, None) => {
            let id = local.unwrap_or_else(|| format!("{:016x}{:016x}", random(), random()));
            write(data_dir, &id)?;
            match store.create(key, &[Bytes::from(format!("{id}\n"))]).await {
                Ok(()) => Ok(id),
                Err(StoreError::Failed { reason, .. }) if remote => {
                    warn!(reason, "the archive cannot be written now");
                    Ok(id)
                }
                Err(error) => Err(error.into()),
            }
        }
    }
}

/// Refuses a shard that another engine writes, before anything is claimed: a take-over cannot be undone. A shard that says
/// nothing is from now on this engine's.
pub(super) async fn agree_on_engine(store: &Store, key: &Path, shard: u32, engine: Engine) -> Result<(), ArchiveError> {
    let said = Bytes::from(format!("{engine}\n"));
    for _ in 0..2 {
        match store.get(key, BYTES_MAX).await {
            Ok(there) if there == said => return Ok(()),
            Ok(there) => {
                let there = String::from_utf8_lossy(&there).trim().to_owned();
                return Err(ArchiveError::OtherEngine { shard, there, here: engine, archive: store.describe() });
            }
            Err(StoreError::Missing(_)) => {}
            // Nothing is claimed either while the store cannot be reached.
            Err(StoreError::Failed { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        match store.create(key, std::slice::from_ref(&said)).await {
            Ok(()) | Err(StoreError::Failed { .. }) => return Ok(()),
            // Another node was quicker: it is looked at again.
            Err(StoreError::Taken(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The id of the system that a data directory belongs to; `None` if it has none yet.
pub fn cluster_id_in(data_dir: &FilePath) -> Result<Option<String>, ArchiveError> {
    read(data_dir)
}

fn parse(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?.trim();
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    (!text.is_empty() && text.bytes().all(legal)).then(|| text.to_owned())
}

fn read(data_dir: &FilePath) -> Result<Option<String>, ArchiveError> {
    let path = data_dir.join(FILE);
    match std::fs::read(&path) {
        Ok(bytes) => {
            let id = parse(&bytes).filter(|_| bytes.len() as u64 <= BYTES_MAX);
            id.map(Some).ok_or_else(|| ArchiveError::Local(format!("{} is not a cluster id", path.display())))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ArchiveError::Local(format!("{}: {error}", path.display()))),
    }
}

fn write(data_dir: &FilePath, id: &str) -> Result<(), ArchiveError> {
    let path = data_dir.join(FILE);
    let written = || -> std::io::Result<()> {
        std::fs::create_dir_all(data_dir)?;
        let new = data_dir.join("cluster-id.new");
        let mut file = std::fs::File::create(&new)?;
        writeln!(file, "{id}")?;
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        std::fs::File::open(data_dir)?.sync_all()
    };
    written().map_err(|error| ArchiveError::Local(format!("{}: {error}", path.display())))
}
