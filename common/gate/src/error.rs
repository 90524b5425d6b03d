//! Why the gate cannot be set up as it is configured.

use std::net::SocketAddr;
use std::path::PathBuf;

use espalier_common::fault::FaultClass;

/// Why the gate cannot be set up as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// An open listener.
    #[error("{key} is {address}, but without [tls] only loopback is listened on")]
    OpenListener {
        /// The key.
        key: &'static str,
        /// What was asked for.
        address: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("{key} is {address}, which cannot be listened on")]
    Listen {
        /// The key.
        key: &'static str,
        /// What was asked for.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A listener on every address, with no name for it.
    #[error("worker.listen is {address}, which others cannot call: give worker.advertise, the host that they can")]
    NothingAdvertised {
        /// What was asked for.
        address: SocketAddr,
    },
    /// Not a host.
    #[error("worker.advertise is `{advertise}`: give a host, or host:port")]
    Advertise {
        /// What was given.
        advertise: String,
    },
    /// Keys that do not go together.
    #[error("[tls] {reason}")]
    Keys {
        /// What is wrong with them.
        reason: &'static str,
    },
    /// Tokens without encryption.
    #[error("{key} needs [tls]: a token is never sent in the clear")]
    TokenWithoutTls {
        /// The key.
        key: &'static str,
    },
    /// A file cannot be read.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is larger than anything of its kind.
    #[error("{} has more than {limit} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// What it may have.
        limit: u64,
    },
    /// A secret that others can read.
    #[error("{} can be read or written by everybody (mode {mode:04o}): chmod o= it", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Not PEM, or not what it should hold.
    #[error("{} holds no {wanted}{}", path.display(), because(reason))]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
        /// What the parser said, if anything.
        reason: String,
    },
    /// Certificates that cannot be used.
    #[error("{}: {reason}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate that does not name its holder's role.
    #[error("{} does not name the role {wanted}: its subject alternative names lack URI:{}{wanted}", path.display(), crate::role::URI_PREFIX)]
    WithoutRole {
        /// The file.
        path: PathBuf,
        /// The role.
        wanted: crate::Role,
    },
    /// A line of a token file.
    #[error("{}:{line}: {reason}", path.display())]
    TokenLine {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// What is wrong with it; never the token.
        reason: &'static str,
    },
    /// Not a URL of ours.
    #[error("`{url}` is no URL: {reason}")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A URL without encryption, beyond loopback.
    #[error("{url} is not encrypted, which is for loopback only: give an https:// URL and [tls]")]
    PlainUrl {
        /// The URL.
        url: String,
    },
    /// A URL without encryption, though there is encryption.
    #[error("{url} is not encrypted, but [tls] is set: give an https:// URL")]
    PlainUrlDespiteTls {
        /// The URL.
        url: String,
    },
    /// A URL with encryption, but nothing to check it with.
    #[error("{url} needs [tls]: at least the authority (ca) that its certificate is checked against")]
    NoTls {
        /// The URL.
        url: String,
    },
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

impl GateError {
    /// What may be done about it: nothing but correcting the configuration.
    pub fn class(&self) -> FaultClass {
        FaultClass::Reject
    }
}
