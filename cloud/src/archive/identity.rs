//! The cluster id: random, minted once, kept in data directory and bucket.

use std::io::Write as _;
use std::path::Path as FilePath;

use bytes::Bytes;
use object_store::path::Path;
use tracing::{info, warn};

use super::store::random;
use super::{ArchiveError, Store, StoreError};

const FILE: &str = "cluster-id";
/// Longest id that is read.
const BYTES_MAX: u64 = 64;

/// The id that data directory and bucket agree on; where one has none, it gets the other's.
pub(super) async fn agree(
    data_dir: &FilePath,
    store: &Store,
    key: &Path,
    remote: bool,
) -> Result<String, ArchiveError> {
    let local = read(data_dir)?;
    let there =
        match store.get(key, BYTES_MAX).await {
            Ok(bytes) => Some(parse(&bytes).ok_or_else(|| ArchiveError::Damaged {
                key: key.to_string(),
                reason: "it is not a cluster id".into(),
            })?),
            Err(StoreError::Missing(_)) => None,
            Err(error @ StoreError::Failed { .. }) if remote => {
                let unreachable = || ArchiveError::Unreachable { archive: store.describe(), reason: error.to_string() };
                warn!(%error, "the archive cannot be reached");
                return local.ok_or_else(unreachable);
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
