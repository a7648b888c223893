//! Files that nobody else is to read: what the process makes is its own user's, and secrets that others can read are told.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use shared::limited;

/// What others may do with a file or directory, group and all.
const OTHERS: u32 = 0o077;
/// Whoever is neither owner nor of the group.
const EVERYBODY: u32 = 0o007;

/// From now on every directory that the process makes is 0700 and every file 0600, also those made by libraries.
pub fn keep_private() {
    rustix::process::umask(Mode::from_raw_mode(OTHERS));
}

/// Makes a directory for the process alone, or takes everybody else's rights from one that is there and from what lies directly in it.
/// Returns what was tightened. Nobody gets through such a directory, whatever the modes of what lies deeper.
pub fn private_dir(path: &Path) -> io::Result<Vec<PathBuf>> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let mut tightened = Vec::new();
    tighten(path, &mut tightened)?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        // What a link points to is not ours.
        if !entry.file_type()?.is_symlink() {
            match tighten(&entry.path(), &mut tightened) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result?,
            }
        }
    }
    Ok(tightened)
}

fn tighten(path: &Path, tightened: &mut Vec<PathBuf>) -> io::Result<()> {
    let mode = fs::metadata(path)?.permissions().mode();
    if mode & OTHERS != 0 {
        match fs::set_permissions(path, Permissions::from_mode(mode & 0o7777 & !OTHERS)) {
            Ok(()) => tightened.push(path.to_owned()),
            // It is somebody else's, or the file system keeps no modes: that is no reason not to start.
            Err(error) if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported) => {
                limited!(warn, path = %path.display(), mode = format!("{:04o}", mode & 0o7777), %error,
                    "others can get at this, and its mode cannot be changed: chown it to the user of this process, or chmod go= it");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What a person should know about a file with a secret in it, if everybody can read or change it. `key` says what names it.
pub fn secret_warning(key: &str, path: &Path) -> Option<String> {
    let mode = fs::metadata(path).ok()?.permissions().mode();
    (mode & EVERYBODY != 0).then(|| {
        format!(
            "{key}: every user of this machine can get at the secret in {} (mode {:04o}): chmod 600 {}",
            path.display(),
            mode & 0o7777,
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    /// Nobody may change modes in /proc, not even root.
    #[test]
    fn a_mode_that_cannot_be_changed_is_no_reason_not_to_start() {
        let mut tightened = Vec::new();
        assert!(mode(Path::new("/proc/self")) & OTHERS != 0);
        tighten(Path::new("/proc/self"), &mut tightened).unwrap();
        assert!(tightened.is_empty());
    }

    #[test]
    fn a_directory_is_made_private_and_an_open_one_is_tightened() {
        let home = std::env::temp_dir().join(format!("tributary-files-{}", std::process::id()));
        let dir = home.join("a/b");
        assert!(private_dir(&dir).unwrap().is_empty());
        assert_eq!(mode(&dir), 0o700);
        let (file, script, link) = (dir.join("file"), dir.join("script"), dir.join("link"));
        for (path, mode) in [(&file, 0o644), (&script, 0o755)] {
            fs::write(path, "x").unwrap();
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        }
        let outside = home.join("outside");
        fs::write(&outside, "x").unwrap();
        fs::set_permissions(&outside, Permissions::from_mode(0o644)).unwrap();
        std::os::unix::fs::symlink(&outside, &link).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        let tightened = private_dir(&dir).unwrap();
        assert_eq!(tightened.len(), 3, "{tightened:?}");
        assert_eq!([&dir, &file, &script, &outside].map(|path| mode(path)), [0o700, 0o600, 0o700, 0o644]);
        assert!(private_dir(&dir).unwrap().is_empty());

        assert!(secret_warning("token_file", &outside).unwrap().contains("chmod 600"));
        for good in [0o640, 0o600, 0o400] {
            fs::set_permissions(&outside, Permissions::from_mode(good)).unwrap();
            assert_eq!(secret_warning("token_file", &outside), None);
        }
        assert_eq!(secret_warning("token_file", &home.join("none")), None);
        fs::remove_dir_all(home).unwrap();
    }
}
