//! A client of pages: one request a connection, plain or over TLS.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// An answer that does not come in this time does not come.
const PATIENCE: Duration = Duration::from_secs(20);

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// `200`.
    pub status: u16,
    /// Its head, in lower case.
    pub head: String,
    /// What is behind the head.
    pub body: String,
}

/// What a client over TLS has.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pem<'a> {
    /// The authority it believes.
    pub ca: &'a str,
    /// Its certificate and key, if it has one.
    pub identity: Option<(&'a str, &'a str)>,
}

/// Gets a page of `http://host:port/…`, with more headers.
///
/// # Errors
/// If nobody answers, or not in HTTP.
pub fn get(url: &str, headers: &[(&str, &str)]) -> Result<Answer> {
    let (authority, path) = parts(url, "http://")?;
    ask(connect(authority)?, authority, path, headers)
}

/// Gets a page of `https://host:port/…`, with more headers.
///
/// # Errors
/// If nobody answers, or the two do not believe each other.
pub fn get_over_tls(url: &str, pem: Pem<'_>, headers: &[(&str, &str)]) -> Result<Answer> {
    let (authority, path) = parts(url, "https://")?;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pem.ca.as_bytes())?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match pem.identity {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => config.with_client_auth_cert(
            vec![CertificateDer::from_pem_slice(certificate.as_bytes())?],
            PrivateKeyDer::from_pem_slice(key.as_bytes())?,
        )?,
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let host = authority.rsplit_once(':').context("no port")?.0.to_owned();
    let connection = ClientConnection::new(Arc::new(config), ServerName::try_from(host)?)?;
    ask(StreamOwned::new(connection, connect(authority)?), authority, path, headers)
}

fn parts<'a>(url: &'a str, scheme: &str) -> Result<(&'a str, &'a str)> {
    let rest = url.strip_prefix(scheme).with_context(|| format!("{url} is no {scheme}"))?;
    Ok(rest.find('/').map_or((rest, "/"), |at| rest.split_at(at)))
}

fn connect(authority: &str) -> Result<TcpStream> {
    let stream = TcpStream::connect(authority)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// In HTTP/1.0, in which the answer ends with the connection.
fn ask(mut stream: impl Read + Write, authority: &str, path: &str, headers: &[(&str, &str)]) -> Result<Answer> {
    let mut request = format!("GET {path} HTTP/1.0\r\n");
    if !headers.iter().any(|(name, _)| *name == "host") {
        request.push_str(&format!("host: {authority}\r\n"));
    }
    headers.iter().for_each(|(name, value)| request.push_str(&format!("{name}: {value}\r\n")));
    stream.write_all(format!("{request}\r\n").as_bytes())?;
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    // A peer that closes without a farewell has said all the same what it had to say.
    ensure!(read.is_ok() || !text.is_empty(), "no answer: {read:?}");
    let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("no head in {text:?}"))?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok(Answer { status, head: head.to_lowercase(), body: body.to_owned() })
}

/// Reads `http://…` server-sent events until `seen` finds something in the text so far.
///
/// # Errors
/// If the stream ends, or is silent, before.
pub fn follow<T>(url: &str, mut seen: impl FnMut(&str) -> Option<T>) -> Result<T> {
    let (authority, path) = parts(url, "http://")?;
    let mut stream = connect(authority)?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nhost: {authority}\r\n\r\n").as_bytes())?;
    let (mut text, mut buffer) = (String::new(), [0; 8192]);
    loop {
        let count = stream.read(&mut buffer)?;
        ensure!(count > 0, "the stream ended: {text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..count]));
        if let Some(found) = seen(&text) {
            return Ok(found);
        }
    }
}
