//! Certificates, read again when their files change: a rotated one is used by the next connection.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::Resumption;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme};
use sha2::{Digest as _, Sha256};
use tracing::{info, warn};
use zeroize::Zeroizing;

use crate::certificate::holder;
use crate::settings::{IdentityPaths, TlsPaths};
use crate::{GateError, Role, file};

/// What is spoken over TLS by services and those who call them.
pub(crate) const HTTP2: &[u8] = b"h2";
/// What browsers, scrapers and probes may speak besides.
pub(crate) const HTTP1: &[u8] = b"http/1.1";

/// A process' certificate and the authorities it believes.
#[derive(Debug)]
pub struct Credentials {
    paths: TlsPaths,
    /// The role that its own certificate must name.
    role: Option<Role>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    loaded: Arc<Loaded>,
    /// Digest of the bytes that `loaded` was made of.
    digest: [u8; 32],
    /// What the last attempt to read them again failed with, if it did.
    complaint: Option<String>,
}

/// What was made of the files.
#[derive(Debug)]
pub(crate) struct Loaded {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    identity: Option<Arc<SingleCertAndKey>>,
    /// For connections out.
    pub(crate) client: Arc<ClientConfig>,
}

/// The bytes of one file.
type Content = Zeroizing<Vec<u8>>;

/// The bytes of all files.
struct Bytes {
    ca: Content,
    /// Chain and key.
    identity: Option<(Content, Content)>,
}

impl Bytes {
    fn read(paths: &TlsPaths) -> Result<Self, GateError> {
        let identity = |paths: &IdentityPaths| Ok((file::read(&paths.certificate)?, file::read_secret(&paths.key)?));
        Ok(Self { ca: file::read(&paths.ca)?, identity: paths.identity.as_ref().map(identity).transpose()? })
    }

    fn digest(&self) -> [u8; 32] {
        let parts =
            [Some(&self.ca), self.identity.as_ref().map(|pair| &pair.0), self.identity.as_ref().map(|pair| &pair.1)];
        let mut all = Sha256::new();
        for part in parts.into_iter().flatten() {
            all.update((part.len() as u64).to_le_bytes());
            all.update(part);
        }
        all.finalize().into()
    }
}

impl Credentials {
    /// Reads the files. If `role` is given, the certificate must be there and name it.
    ///
    /// # Errors
    /// See [`GateError`].
    pub fn open(paths: TlsPaths, role: Option<Role>) -> Result<Arc<Self>, GateError> {
        if role.is_some() && paths.identity.is_none() {
            return Err(GateError::Keys { reason: "needs certificate and key: others want to know who this is" });
        }
        let bytes = Bytes::read(&paths)?;
        let loaded = Arc::new(load(&bytes, &paths, role)?);
        let state = Mutex::new(State { loaded, digest: bytes.digest(), complaint: None });
        Ok(Arc::new(Self { paths, role, state }))
    }

    /// What the files say now. While they cannot be used, what they said before counts, and a warning is logged: a rotation
    /// may be half done.
    pub(crate) async fn current(self: &Arc<Self>) -> Arc<Loaded> {
        let credentials = Arc::clone(self);
        let read = tokio::task::spawn_blocking(move || credentials.refresh()).await;
        read.unwrap_or_else(|_| Arc::clone(&self.state.lock().unwrap_or_else(PoisonError::into_inner).loaded))
    }

    /// Reads the files (they are small and connections rare) and makes them anew if a byte differs.
    fn refresh(&self) -> Arc<Loaded> {
        let read = Bytes::read(&self.paths);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let reloaded = read.and_then(|bytes| {
            let digest = bytes.digest();
            let changed = digest != state.digest;
            Ok(if changed { Some((load(&bytes, &self.paths, self.role)?, digest)) } else { None })
        });
        match reloaded {
            Ok(Some((loaded, digest))) => {
                info!(ca = %self.paths.ca.display(), "certificates were replaced");
                *state = State { loaded: Arc::new(loaded), digest, complaint: None };
            }
            Ok(None) => state.complaint = None,
            Err(error) => {
                let complaint = espalier_common::fault::Fault::new(error.class(), &error).message;
                if state.complaint.as_ref() != Some(&complaint) {
                    warn!(error = complaint, "certificates cannot be read again: the former ones are used");
                    state.complaint = Some(complaint);
                }
            }
        }
        Arc::clone(&state.loaded)
    }
}

fn load(bytes: &Bytes, paths: &TlsPaths, role: Option<Role>) -> Result<Loaded, GateError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let unusable = |path: &std::path::Path| {
        let path = path.to_owned();
        move |error: rustls::Error| GateError::Certificate { path, reason: error.to_string() }
    };
    let mut roots = RootCertStore::empty();
    for authority in certificates(&bytes.ca, &paths.ca)? {
        roots.add(authority).map_err(unusable(&paths.ca))?;
    }
    let roots = Arc::new(roots);
    let identity = match (&bytes.identity, &paths.identity) {
        (Some((chain, key)), Some(paths)) => Some(Arc::new(identity(chain, key, paths, role, &provider)?)),
        _ => None,
    };
    let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable(&paths.ca))?
        .with_root_certificates(Arc::clone(&roots));
    let mut client = match &identity {
        Some(identity) => client.with_client_cert_resolver(Arc::clone(identity) as _),
        None => client.with_no_client_auth(),
    };
    client.alpn_protocols.push(HTTP2.to_vec());
    // Every connection is checked in full, so that no certificate outlives its end or its authority in a ticket.
    client.resumption = Resumption::disabled();
    Ok(Loaded { provider, roots, identity, client: Arc::new(client) })
}

fn certificates(pem: &[u8], path: &std::path::Path) -> Result<Vec<CertificateDer<'static>>, GateError> {
    let wrong = |reason: String| GateError::Pem { path: path.to_owned(), wanted: "certificate", reason };
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| wrong(error.to_string()))?;
    if found.is_empty() { Err(wrong(String::new())) } else { Ok(found) }
}

fn identity(
    chain: &[u8],
    key: &[u8],
    paths: &IdentityPaths,
    role: Option<Role>,
    provider: &CryptoProvider,
) -> Result<SingleCertAndKey, GateError> {
    let chain = certificates(chain, &paths.certificate)?;
    let unusable = |reason: String| GateError::Certificate { path: paths.certificate.clone(), reason };
    let named = holder(&chain[0]).ok_or_else(|| unusable("the first certificate cannot be parsed".to_owned()))?;
    if let Some(wanted) = role.filter(|role| !named.roles.contains(role)) {
        return Err(GateError::WithoutRole { path: paths.certificate.clone(), wanted });
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| GateError::Pem {
        path: paths.key.clone(),
        wanted: "private key",
        // What the parser read stays with it.
        reason: match error {
            rustls::pki_types::pem::Error::NoItemsFound => String::new(),
            _ => "it is damaged".to_owned(),
        },
    })?;
    let certified = CertifiedKey::from_der(chain, key, provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            GateError::Certificate { path: paths.key.clone(), reason: "is not the key of the certificate".to_owned() }
        }
        other => unusable(other.to_string()),
    })?;
    Ok(SingleCertAndKey::from(certified))
}

impl Loaded {
    /// For one connection in; whom it turns away is told to `witness`.
    pub(crate) fn server(
        &self,
        takes_strangers: bool,
        protocols: &[&[u8]],
        witness: &Arc<Witness>,
    ) -> Result<ServerConfig, rustls::Error> {
        let wrong = |error: rustls::server::VerifierBuilderError| rustls::Error::General(error.to_string());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&self.provider));
        let verifier = if takes_strangers { verifier.allow_unauthenticated() } else { verifier };
        let verifier = Watched { inner: verifier.build().map_err(wrong)?, witness: Arc::clone(witness) };
        let identity = self.identity.clone().ok_or(rustls::Error::NoCertificatesPresented)?;
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(identity);
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

/// Remembers the subject of a certificate that was turned away, for the log.
#[derive(Debug, Default)]
pub(crate) struct Witness(Mutex<Option<String>>);

impl Witness {
    /// Who was turned away.
    pub(crate) fn subject(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The usual verifier, watched.
#[derive(Debug)]
struct Watched {
    inner: Arc<dyn ClientCertVerifier>,
    witness: Arc<Witness>,
}

impl ClientCertVerifier for Watched {
    fn offer_client_auth(&self) -> bool {
        self.inner.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.inner.verify_client_cert(certificate, intermediates, now).inspect_err(|_| {
            let subject = holder(certificate).map(|holder| holder.subject);
            *self.witness.0.lock().unwrap_or_else(PoisonError::into_inner) = subject;
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
