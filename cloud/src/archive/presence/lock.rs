//! The data directory's lock, and what it proves: that no other process of this directory runs.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use super::heartbeat::OwnerIdentity;
use crate::archive::store::random_bytes;

/// In the data directory: its random id, and what is locked.
const FILE: &str = "owner";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Why a data directory could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another process has it.
    #[error("data_dir {0} is in use by another process: stop it, or give this one a data_dir of its own")]
    Locked(String),
    /// The file system failed.
    #[error("data_dir: {path} cannot be used: {reason}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        reason: String,
    },
}

/// A data directory that no other process can use for as long as this lives.
#[derive(Debug)]
pub struct DataDirLock {
    identity: OwnerIdentity,
    _file: File,
}

impl DataDirLock {
    /// Takes the directory, which must be there.
    pub fn acquire(data_dir: &Path) -> Result<Self, DataDirError> {
        let path = data_dir.join(FILE);
        let failed =
            |error: io::Error| DataDirError::Io { path: path.display().to_string(), reason: error.to_string() };
        let mut options = OpenOptions::new();
        let mut file =
            options.create(true).truncate(false).read(true).write(true).mode(0o600).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DataDirError::Locked(data_dir.display().to_string())),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let data_id = match read_id(&mut file).map_err(failed)? {
            Some(id) => id,
            None => write_id(&mut file).map_err(failed)?,
        };
        let found = file.metadata().map_err(failed)?;
        let (device, inode) = (found.dev(), found.ino());
        Ok(Self { identity: OwnerIdentity { data_id, boot_id: boot_id(), device, inode }, _file: file })
    }

    /// What this process is told from others by.
    pub fn identity(&self) -> OwnerIdentity {
        self.identity
    }
}

fn read_id(file: &mut File) -> io::Result<Option<[u8; 16]>> {
    let mut text = Vec::new();
    file.take(64).read_to_end(&mut text)?;
    Ok(std::str::from_utf8(&text)
        .ok()
        .and_then(|text| u128::from_str_radix(text.trim(), 16).ok())
        .map(u128::to_be_bytes))
}

fn write_id(file: &mut File) -> io::Result<[u8; 16]> {
    let id = random_bytes();
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{:032x}", u128::from_be_bytes(id))?;
    file.sync_all()?;
    Ok(id)
}

/// The kernel's. Where it has none each start is one of its own.
fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string(BOOT_ID).unwrap_or_default();
    u128::from_str_radix(&text.trim().replace('-', ""), 16).map_or_else(|_| random_bytes(), u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_is_the_same_owner_and_a_copy_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDirLock::acquire(dir.path()).unwrap();
        assert!(
            matches!(DataDirLock::acquire(dir.path()), Err(DataDirError::Locked(text)) if text.contains("tmp") || !text.is_empty())
        );
        let identity = first.identity();
        drop(first);
        assert_eq!(DataDirLock::acquire(dir.path()).unwrap().identity(), identity);

        let copy = tempfile::tempdir().unwrap();
        std::fs::copy(dir.path().join(FILE), copy.path().join(FILE)).unwrap();
        let copied = DataDirLock::acquire(copy.path()).unwrap().identity();
        assert_eq!(copied.data_id, identity.data_id, "its id comes with it");
        assert_ne!(copied, identity, "and it is not the same owner");
        assert_ne!(DataDirLock::acquire(tempfile::tempdir().unwrap().path()).unwrap().identity(), identity);
    }

    #[test]
    fn an_id_that_was_cut_is_made_anew_and_others_cannot_read_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("owner"), b"").unwrap();
        let identity = DataDirLock::acquire(dir.path()).unwrap().identity();
        assert_eq!(DataDirLock::acquire(dir.path()).unwrap().identity(), identity);
        let fresh = tempfile::tempdir().unwrap();
        drop(DataDirLock::acquire(fresh.path()).unwrap());
        let mode = std::fs::metadata(fresh.path().join("owner")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
