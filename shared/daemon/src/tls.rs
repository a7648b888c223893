//! Certificates and keys from PEM files. One crypto provider, ring, for the whole process.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use shared::config::TlsFiles;

/// Makes ring the provider of every TLS user in the process. Two providers make rustls panic at run time.
pub fn install_provider() {
    // An error means that it is installed already, which is what we want.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A server's TLS from its certificate chain and key.
pub fn server_config(files: &TlsFiles) -> anyhow::Result<Arc<ServerConfig>> {
    let (certificate, key) = (&files.cert_file, &files.key_file);
    let chain = certificates(certificate)?;
    let secret = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("{}: expected a private key in PEM", key.display()))?;
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, secret).with_context(|| {
        format!("certificate {} and key {} do not go together", certificate.display(), key.display())
    })?;
    Ok(Arc::new(config))
}

/// Every certificate of a PEM file.
pub fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let wanted = || format!("{}: expected certificates in PEM", path.display());
    let chain: Vec<_> =
        CertificateDer::pem_file_iter(path).with_context(wanted)?.collect::<Result<_, _>>().with_context(wanted)?;
    anyhow::ensure!(!chain.is_empty(), wanted());
    Ok(chain)
}
