//! Certificates and keys from PEM files, read again when they change. One crypto provider, ring, for the whole process.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use shared::config::TlsFiles;
use tokio::sync::watch;
use tracing::{error, info, warn};

/// How often files are looked at.
pub const FILES_CHECK: Duration = Duration::from_secs(5);

/// Makes ring the provider of every TLS user in the process. Two providers make rustls panic at run time.
pub fn install_provider() {
    // An error means that it is installed already, which is what we want.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A listener's certificate and key, as its files are now.
pub struct ServerCertificate {
    files: TlsFiles,
    key: Mutex<Arc<CertifiedKey>>,
    change: Mutex<FilesChange>,
}

impl fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerCertificate({})", self.files.cert_file.display())
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.key.lock().clone())
    }
}

impl ServerCertificate {
    /// Reads certificate chain and key.
    pub fn read(files: &TlsFiles) -> anyhow::Result<Arc<Self>> {
        let change = FilesChange::new(&[&files.cert_file, &files.key_file]);
        let key = Mutex::new(Arc::new(certified_key(files)?));
        Ok(Arc::new(Self { files: files.clone(), key, change: Mutex::new(change) }))
    }

    /// A server's TLS that shows the certificate of the moment.
    pub fn config(self: &Arc<Self>) -> Arc<ServerConfig> {
        Arc::new(ServerConfig::builder().with_no_client_auth().with_cert_resolver(self.clone()))
    }

    /// Reads the files again if they have changed. Connections from now on see the new certificate. Files that cannot be used leave the old
    /// one in force.
    pub fn look(&self) {
        let mut change = self.change.lock();
        let seen = change.look(&[&self.files.cert_file, &self.files.key_file]);
        if seen == FilesSeen::Same {
            return;
        }
        let certificate = self.files.cert_file.display();
        match certified_key(&self.files) {
            Ok(key) => {
                *self.key.lock() = Arc::new(key);
                change.settled();
                info!(%certificate, "the certificate has changed and is in use");
            }
            // Certificate and key are two files: one of them may be new and the other not yet.
            Err(_) if seen == FilesSeen::Changed => {}
            Err(cause) => {
                change.settled();
                error!(%certificate, cause = format!("{cause:#}"), "the changed certificate cannot be used; the old one stays in use");
            }
        }
    }
}

fn certified_key(files: &TlsFiles) -> anyhow::Result<CertifiedKey> {
    let (certificate, key) = (&files.cert_file, &files.key_file);
    let chain = certificates(certificate)?;
    let secret = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("{}: expected a private key in PEM", key.display()))?;
    let provider = CryptoProvider::get_default().context("no TLS provider is installed")?;
    CertifiedKey::from_der(chain, secret, provider)
        .with_context(|| format!("certificate {} and key {} do not go together", certificate.display(), key.display()))
}

/// Every certificate of a PEM file.
pub fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let wanted = || format!("{}: expected certificates in PEM", path.display());
    let chain: Vec<_> =
        CertificateDer::pem_file_iter(path).with_context(wanted)?.collect::<Result<_, _>>().with_context(wanted)?;
    anyhow::ensure!(!chain.is_empty(), wanted());
    Ok(chain)
}

/// Looks at all certificates every [`FILES_CHECK`], and at once on SIGHUP, until `stop` turns true.
pub async fn watch(certificates: Vec<Arc<ServerCertificate>>, mut stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut hangup = signal(SignalKind::hangup())?;
    let mut tick = tokio::time::interval(FILES_CHECK);
    loop {
        let mut asked = false;
        tokio::select! {
            _ = tick.tick() => {}
            _ = hangup.recv() => asked = true,
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
        }
        if asked {
            warn!("SIGHUP: files of certificates and tokens are looked at again; other settings need a restart");
        }
        let all = certificates.clone();
        tokio::task::spawn_blocking(move || all.iter().for_each(|one| one.look())).await?;
    }
}

/// Notices that files were written again or replaced.
#[derive(Debug)]
pub struct FilesChange {
    used: Vec<FileStamp>,
    seen: Vec<FileStamp>,
}

/// What tells one state of a file from another: device, inode, size, and when content or owner changed last.
type FileStamp = Option<(u64, u64, u64, (i64, i64), (i64, i64))>;

/// What a look at files showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FilesSeen {
    /// They are as they were when last used.
    Same,
    /// They are other ones than at the last look; more may be about to change.
    Changed,
    /// They are other ones than were used, and the same as at the last look.
    Settled,
}

impl FilesChange {
    /// The files as they are now are those in use.
    pub fn new(files: &[&Path]) -> Self {
        let used: Vec<_> = files.iter().map(|path| stamp(path)).collect();
        Self { seen: used.clone(), used }
    }

    /// Looks at the files.
    pub fn look(&mut self, files: &[&Path]) -> FilesSeen {
        let now: Vec<_> = files.iter().map(|path| stamp(path)).collect();
        let same = now == self.seen;
        self.seen = now;
        match same {
            _ if self.seen == self.used => FilesSeen::Same,
            true => FilesSeen::Settled,
            false => FilesSeen::Changed,
        }
    }

    /// What the last look showed is in use, or will never be.
    pub fn settled(&mut self) {
        self.used.clone_from(&self.seen);
    }
}

fn stamp(path: &Path) -> FileStamp {
    let data = std::fs::metadata(path).ok()?;
    let changed = (data.ctime(), data.ctime_nsec());
    Some((data.dev(), data.ino(), data.len(), (data.mtime(), data.mtime_nsec()), changed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_used_when_they_have_settled() {
        let path = std::env::temp_dir().join(format!("tributary-tls-{}", std::process::id()));
        let files = [path.as_path()];
        std::fs::write(&path, "one").unwrap();
        let mut change = FilesChange::new(&files);
        assert_eq!(change.look(&files), FilesSeen::Same);
        std::fs::write(&path, "three").unwrap();
        assert_eq!(change.look(&files), FilesSeen::Changed);
        assert_eq!(change.look(&files), FilesSeen::Settled);
        change.settled();
        assert_eq!(change.look(&files), FilesSeen::Same);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(change.look(&files), FilesSeen::Changed);
        assert_eq!(change.look(&files), FilesSeen::Settled);
    }

    #[test]
    fn a_changed_certificate_is_used_and_a_broken_one_is_not() {
        install_provider();
        let dir = std::env::temp_dir().join(format!("tributary-cert-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let files = TlsFiles { cert_file: dir.join("cert.pem"), key_file: dir.join("key.pem") };
        let (cert, key) =
            (include_str!("../../mqtt/src/front/tests/cert.pem"), include_str!("../../mqtt/src/front/tests/key.pem"));
        let write = |cert: &str, key: &str| {
            std::fs::write(&files.cert_file, cert).unwrap();
            std::fs::write(&files.key_file, key).unwrap();
        };
        write(cert, key);
        let certificate = ServerCertificate::read(&files).unwrap();
        let first = certificate.key.lock().clone();
        let same = |other: &Arc<CertifiedKey>| Arc::ptr_eq(&certificate.key.lock(), other);
        certificate.look();
        assert!(same(&first), "nothing has changed");
        write("broken", key);
        certificate.look();
        certificate.look();
        assert!(same(&first), "the old one stays");
        // A comment more is another file.
        write(&format!("renewed\n{cert}"), key);
        certificate.look();
        assert!(!same(&first), "the new one is used");
        let second = certificate.key.lock().clone();
        // The key of another certificate is there first; its certificate never comes.
        write(&format!("again\n{cert}"), OTHER_KEY);
        certificate.look();
        certificate.look();
        assert!(same(&second), "they do not go together");
        std::fs::remove_dir_all(dir).unwrap();
    }

    const OTHER_KEY: &str = "\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgqCZeliAwzVwRhPh5
93AnDBJ0XWbS2Y0M7bu/pUVzaKOhRANCAAQhduIKuPT+dF8jg8OlILRsBI+fzWqD
8GswgjHsEo4RJgXANI0tzAKSMt9bTDY1y/lHimGktnOgRD9V+nsO972L
-----END PRIVATE KEY-----
";
}
