//! What a person configures.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::trace::Collector;
use crate::{Credentials, Dialer, GateError, Role, Tokens};

/// `[tls]` of every program: its own certificate, and the authority that vouches for others. Files are PEM, and are read
/// again when they change.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSection {
    /// Instead of the other three: a folder with `ca.crt`, `tls.crt` and `tls.key`, as cert-manager makes it.
    pub folder: Option<PathBuf>,
    /// Certificates of the authorities that others' certificates are checked against.
    pub ca: Option<PathBuf>,
    /// This process' certificate, followed by intermediate ones.
    pub certificate: Option<PathBuf>,
    /// Its private key; not readable by everybody.
    pub key: Option<PathBuf>,
}

/// `[auth]` of every program that serves people.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AuthSection {
    /// A file of tokens that stand in for a certificate when a run is submitted or watched; see [`crate::tokens`].
    pub tokens: Option<PathBuf>,
}

impl AuthSection {
    /// Reads the file, if one is named.
    ///
    /// # Errors
    /// `TokenWithoutTls`, and what is wrong with the file.
    pub fn open(&self, has_tls: bool) -> Result<Option<Arc<Tokens>>, GateError> {
        if self.tokens.is_some() && !has_tls {
            return Err(GateError::TokenWithoutTls { key: "auth.tokens" });
        }
        self.tokens.clone().map(Tokens::open).transpose()
    }
}

/// `[http]` of every program: pages and probes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HttpSection {
    /// Where `/healthz`, `/readyz` and `/metrics` are, and the coordinator's page; nowhere if it is not set. Beyond loopback
    /// only with `[tls]`.
    pub listen: Option<SocketAddr>,
}

/// `[trace]` of every program: where spans are sent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TraceSection {
    /// URL of a collector that takes OTLP over gRPC, e.g. `http://127.0.0.1:4317`; nothing is traced if it is not set. Beyond
    /// loopback `https://` only, with a certificate that the authority of `[tls]` vouches for.
    pub endpoint: Option<String>,
}

impl TraceSection {
    /// How the collector is reached, if one is named: the files of `tls` are read for `https://` alone.
    ///
    /// # Errors
    /// `Url`, `PlainUrl`, `NoTls`, and what is wrong with the files.
    pub fn collector(&self, tls: &TlsSection) -> Result<Option<Collector>, GateError> {
        let Some(endpoint) = &self.endpoint else { return Ok(None) };
        let credentials = if endpoint.starts_with("https://") { tls.open(None)? } else { None };
        Collector::new(endpoint, &Dialer::new(credentials)).map(Some)
    }
}

/// Which files to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPaths {
    /// The authorities.
    pub ca: PathBuf,
    /// Certificate and key.
    pub identity: Option<IdentityPaths>,
}

/// Where a process' own certificate is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityPaths {
    /// The chain.
    pub certificate: PathBuf,
    /// The key.
    pub key: PathBuf,
}

impl TlsSection {
    /// Reads the files, if any are named. If `role` is given, there must be a certificate and it must name the role.
    ///
    /// # Errors
    /// See [`GateError`].
    pub fn open(&self, role: Option<Role>) -> Result<Option<Arc<Credentials>>, GateError> {
        self.paths()?.map(|paths| Credentials::open(paths, role)).transpose()
    }

    /// Which files to read; nothing if no key is set.
    ///
    /// # Errors
    /// `Keys`.
    pub fn paths(&self) -> Result<Option<TlsPaths>, GateError> {
        let Self { folder, ca, certificate, key } = self;
        if let Some(folder) = folder {
            if ca.is_some() || certificate.is_some() || key.is_some() {
                return Err(GateError::Keys { reason: "takes either folder, or ca, certificate and key" });
            }
            let identity = IdentityPaths { certificate: folder.join("tls.crt"), key: folder.join("tls.key") };
            return Ok(Some(TlsPaths { ca: folder.join("ca.crt"), identity: Some(identity) }));
        }
        let identity = match (certificate.clone(), key.clone()) {
            (Some(certificate), Some(key)) => Some(IdentityPaths { certificate, key }),
            (None, None) => None,
            _ => return Err(GateError::Keys { reason: "needs certificate and key, or neither" }),
        };
        match (ca.clone(), identity) {
            (Some(ca), identity) => Ok(Some(TlsPaths { ca, identity })),
            (None, None) => Ok(None),
            (None, Some(_)) => Err(GateError::Keys { reason: "needs ca: whose certificates are taken" }),
        }
    }
}

/// Refuses a listener beyond loopback that nothing protects.
///
/// # Errors
/// `OpenListener`.
pub fn check_listener(key: &'static str, address: SocketAddr, has_tls: bool) -> Result<(), GateError> {
    if has_tls || address.ip().is_loopback() { Ok(()) } else { Err(GateError::OpenListener { key, address }) }
}

/// The URL of a worker that listens on `address`: its `advertise`, a host or host:port, if it has one.
///
/// # Errors
/// `NothingAdvertised` for a listener on every address without a name; `Advertise`.
pub fn advertised(address: SocketAddr, advertise: Option<&str>, has_tls: bool) -> Result<String, GateError> {
    let scheme = if has_tls { "https" } else { "http" };
    let Some(advertise) = advertise else {
        return match address.ip().is_unspecified() {
            true => Err(GateError::NothingAdvertised { address }),
            false => Ok(format!("{scheme}://{address}")),
        };
    };
    let wrong = || GateError::Advertise { advertise: advertise.to_owned() };
    // A bare IPv6 address has colons of its own.
    if let Ok(ip) = advertise.parse::<IpAddr>() {
        return Ok(format!("{scheme}://{}", SocketAddr::new(ip, address.port())));
    }
    let named: http::uri::Authority = advertise.parse().map_err(|_| wrong())?;
    if named.as_str().contains('@') || named.host().is_empty() {
        return Err(wrong());
    }
    let port = match named.port() {
        Some(port) if port.as_u16() == 0 => return Err(wrong()),
        Some(port) => port.as_u16(),
        None if named.as_str() != named.host() => return Err(wrong()),
        None => address.port(),
    };
    Ok(format!("{scheme}://{}:{port}", named.host()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(folder: bool, ca: bool, certificate: bool, key: bool) -> TlsSection {
        let path = |is_set: bool, name: &str| is_set.then(|| PathBuf::from(name));
        TlsSection {
            folder: path(folder, "/tls"),
            ca: path(ca, "/a"),
            certificate: path(certificate, "/c"),
            key: path(key, "/k"),
        }
    }

    #[test]
    fn a_folder_stands_for_three_files() {
        let paths = section(true, false, false, false).paths().unwrap().unwrap();
        assert_eq!(paths.ca, PathBuf::from("/tls/ca.crt"));
        assert_eq!(paths.identity.unwrap().key, PathBuf::from("/tls/tls.key"));
    }

    #[test]
    fn half_a_configuration_is_refused() {
        assert_eq!(section(false, false, false, false).paths().unwrap(), None);
        assert!(section(false, true, false, false).paths().unwrap().unwrap().identity.is_none());
        assert!(section(false, true, true, true).paths().unwrap().unwrap().identity.is_some());
        let halves = [(true, true, false, false), (true, false, false, true), (false, true, true, false)];
        for (folder, ca, certificate, key) in [&halves[..], &[(false, false, true, true)]].concat() {
            assert!(section(folder, ca, certificate, key).paths().is_err(), "{folder} {ca} {certificate} {key}");
        }
    }

    #[test]
    fn only_loopback_is_listened_on_without_tls() {
        let check = |address: &str, tls| check_listener("worker.listen", address.parse().unwrap(), tls);
        check("127.0.0.1:0", false).unwrap();
        check("[::1]:0", false).unwrap();
        check("0.0.0.0:7433", true).unwrap();
        for open in ["0.0.0.0:7433", "10.1.2.3:0", "[::]:0"] {
            let error = check(open, false).unwrap_err();
            assert!(error.to_string().contains(open) && error.to_string().contains("worker.listen"), "{error}");
        }
    }

    #[test]
    fn a_worker_is_called_by_the_name_it_advertises() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let url = |listen: &str, advertise: Option<&str>| advertised(address(listen), advertise, true);
        assert_eq!(url("10.1.2.3:40", None).unwrap(), "https://10.1.2.3:40");
        assert_eq!(url("0.0.0.0:40", Some("worker-0.workers")).unwrap(), "https://worker-0.workers:40");
        assert_eq!(url("0.0.0.0:40", Some("gate.example:443")).unwrap(), "https://gate.example:443");
        assert_eq!(url("[::]:40", Some("fd00::1")).unwrap(), "https://[fd00::1]:40");
        assert_eq!(advertised(address("127.0.0.1:40"), None, false).unwrap(), "http://127.0.0.1:40");
        assert!(matches!(url("0.0.0.0:40", None), Err(GateError::NothingAdvertised { .. })));
        for wrong in ["", "a b", "user@host", "host:", "host:0", "host:99999", "http://host", "host/path"] {
            assert!(matches!(url("0.0.0.0:40", Some(wrong)), Err(GateError::Advertise { .. })), "{wrong:?}");
        }
    }
}
