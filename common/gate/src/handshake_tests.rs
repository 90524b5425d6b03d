//! Both ends of a connection, without a service behind it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use espalier_common::tasks::TaskGroup;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt as _;
use tonic::transport::server::Connected as _;

use crate::dial::Connector;
use crate::incoming::Identity;
use crate::role::Roles;
use crate::stream::Stream;
use crate::{Credentials, DialError, Dialer, Entrance, GateError, Role, TlsSection};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Writes a certificate for localhost that `signer` signed; its holder believes `believed`.
fn equip(folder: &Path, believed: &Authority, signer: &Authority, roles: &[Role]) {
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let uris = roles.iter().map(|role| SanType::URI(format!("espalier:role:{role}").try_into().unwrap()));
    params.subject_alt_names.extend(uris);
    let key = KeyPair::generate().unwrap();
    fs::write(folder.join("tls.crt"), params.signed_by(&key, signer).unwrap().pem()).unwrap();
    fs::write(folder.join("ca.crt"), believed.pem()).unwrap();
    let path = folder.join("tls.key");
    fs::write(&path, key.serialize_pem()).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

fn open(folder: &Path, role: Option<Role>) -> Result<std::sync::Arc<Credentials>, GateError> {
    let section = TlsSection { folder: Some(folder.to_owned()), ..TlsSection::default() };
    section.open(role).map(|credentials| credentials.expect("a folder is set"))
}

fn certificates(believed: &Authority, signer: &Authority, roles: &[Role]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    equip(folder.path(), believed, signer, roles);
    folder
}

/// A server that greets whoever comes in, and tells who came.
struct Greeter {
    tasks: TaskGroup,
    url: String,
    came: tokio::sync::mpsc::Receiver<Identity>,
}

impl Greeter {
    async fn start(entrance: Entrance) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scheme = if entrance.credentials.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://localhost:{}", listener.local_addr().unwrap().port());
        let tasks = TaskGroup::new();
        let mut connections = entrance.open(listener, &tasks);
        let (sender, came) = tokio::sync::mpsc::channel(1);
        tasks.spawn(async move {
            while let Some(connection) = connections.next().await {
                let mut connection = connection.unwrap();
                connection.write_all(b"hello").await.unwrap();
                connection.flush().await.unwrap();
                sender.send(connection.connect_info().identity).await.unwrap();
            }
        });
        Self { tasks, url, came }
    }

    async fn dial(&self, dialer: &Dialer, server: Role) -> Result<Stream, DialError> {
        let connector: Connector = dialer.connector(&self.url, server).unwrap();
        connector.connect(self.url.parse().unwrap()).await
    }

    async fn stop(self) {
        drop(self.came);
        assert!(self.tasks.shut_down(Duration::from_secs(5)).await);
    }
}

fn entrance(folder: &TempDir) -> Entrance {
    Entrance { credentials: Some(open(folder.path(), Some(Role::Worker)).unwrap()), tokens: None }
}

fn dialer(folder: &TempDir) -> Dialer {
    Dialer::new(Some(open(folder.path(), None).unwrap()))
}

fn reason(dialed: Result<Stream, DialError>) -> String {
    match dialed {
        Err(error @ DialError::Untrusted { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn both_sides_know_each_other_and_no_byte_is_lost() {
    let ours = authority("ours");
    let (server, client) =
        (certificates(&ours, &ours, &[Role::Worker]), certificates(&ours, &ours, &[Role::Coordinator]));
    let mut greeter = Greeter::start(entrance(&server)).await;
    let mut stream = greeter.dial(&dialer(&client), Role::Worker).await.unwrap();
    let Identity::Certified { roles, .. } = greeter.came.recv().await.unwrap() else { panic!("a stranger") };
    assert_eq!(roles, Roles::from([Role::Coordinator]));
    let mut greeting = [0; 5];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"hello");
    greeter.stop().await;
}

#[tokio::test]
async fn distrust_is_told_for_what_it_is() {
    let (ours, theirs) = (authority("ours"), authority("theirs"));
    let server = certificates(&ours, &ours, &[Role::Worker]);
    let greeter = Greeter::start(entrance(&server)).await;
    let client = |believed, signer| dialer(&certificates(believed, signer, &[Role::Coordinator]));
    let dial = async |dialer: Dialer, role| reason(greeter.dial(&dialer, role).await);
    let foreign = dial(client(&ours, &theirs), Role::Worker).await;
    assert!(foreign.contains("the server refuses this process' certificate: UnknownCA"), "{foreign}");
    let misled = dial(client(&theirs, &ours), Role::Worker).await;
    assert!(misled.contains("the server's certificate is not believed"), "{misled}");
    let impostor = dial(client(&ours, &ours), Role::Coordinator).await;
    assert!(impostor.contains("has not the role coordinator"), "{impostor}");
    let anonymous = TlsSection { ca: Some(server.path().join("ca.crt")), ..TlsSection::default() };
    let anonymous = dial(Dialer::new(anonymous.open(None).unwrap()), Role::Worker).await;
    assert!(anonymous.contains("CertificateRequired"), "{anonymous}");
    greeter.stop().await;
}

#[tokio::test]
async fn replaced_files_count_for_the_next_connection_and_half_replaced_ones_do_not() {
    let (before, after) = (authority("before"), authority("after"));
    let server = certificates(&before, &before, &[Role::Worker]);
    let old = dialer(&certificates(&before, &before, &[Role::Coordinator]));
    let new = dialer(&certificates(&after, &after, &[Role::Coordinator]));
    let mut greeter = Greeter::start(entrance(&server)).await;
    greeter.dial(&old, Role::Worker).await.unwrap();
    greeter.came.recv().await.unwrap();
    reason(greeter.dial(&new, Role::Worker).await);
    let key = fs::read(server.path().join("tls.key")).unwrap();
    equip(server.path(), &after, &after, &[Role::Worker]);
    let next_key = fs::read(server.path().join("tls.key")).unwrap();
    fs::write(server.path().join("tls.key"), key).unwrap();
    greeter.dial(&old, Role::Worker).await.unwrap();
    greeter.came.recv().await.unwrap();
    fs::write(server.path().join("tls.key"), next_key).unwrap();
    greeter.dial(&new, Role::Worker).await.unwrap();
    greeter.came.recv().await.unwrap();
    reason(greeter.dial(&old, Role::Worker).await);
    greeter.stop().await;
}

#[tokio::test]
async fn silent_peers_delay_nobody() {
    let ours = authority("ours");
    let (server, client) = (certificates(&ours, &ours, &[Role::Worker]), certificates(&ours, &ours, &[]));
    let mut greeter = Greeter::start(entrance(&server)).await;
    let address = greeter.url.trim_start_matches("https://localhost:").parse().unwrap();
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(("127.0.0.1", address)).await.unwrap());
    }
    let dialed = tokio::time::timeout(Duration::from_secs(5), greeter.dial(&dialer(&client), Role::Worker)).await;
    dialed.expect("the silent ones were waited for").unwrap();
    greeter.came.recv().await.unwrap();
    greeter.stop().await;
}

#[tokio::test]
async fn without_certificates_loopback_is_spoken_to_in_the_clear() {
    let mut greeter = Greeter::start(Entrance::default()).await;
    let mut stream = greeter.dial(&Dialer::default(), Role::Worker).await.unwrap();
    assert!(matches!(greeter.came.recv().await, Some(Identity::Local)));
    let mut greeting = [0; 5];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"hello");
    greeter.stop().await;
}

#[test]
fn files_that_do_not_go_together_are_refused_by_name() {
    let ours = authority("ours");
    let folder = certificates(&ours, &ours, &[Role::Worker]);
    let path = |name: &str| folder.path().join(name);
    let refused = |role| open(folder.path(), role).unwrap_err();
    assert!(matches!(refused(Some(Role::Coordinator)), GateError::WithoutRole { wanted: Role::Coordinator, .. }));
    let key = fs::read(path("tls.key")).unwrap();
    fs::write(path("tls.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let error = refused(None).to_string();
    assert!(error.contains("tls.key: is not the key of the certificate"), "{error}");
    fs::write(path("tls.key"), "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n").unwrap();
    let error = refused(None).to_string();
    assert!(error.contains("tls.key holds no private key") && !error.contains("c2Vj"), "{error}");
    fs::write(path("tls.key"), key).unwrap();
    fs::write(path("ca.crt"), "no certificate").unwrap();
    assert!(refused(None).to_string().contains("ca.crt holds no certificate"));
    fs::remove_file(path("ca.crt")).unwrap();
    assert!(matches!(refused(None), GateError::Io { .. }));
}

/// Kubernetes' names: one certificate is for every pod below a headless service.
#[test]
fn a_wildcard_covers_every_pod_of_a_service_and_nothing_else() {
    let params = CertificateParams::new(vec!["*.espalier.research.svc".to_owned()]).unwrap();
    let certificate = params.signed_by(&KeyPair::generate().unwrap(), &authority("ours")).unwrap();
    let entity = webpki::EndEntityCert::try_from(certificate.der()).unwrap();
    let covers = |host: &'static str| {
        entity.verify_is_valid_for_subject_name(&rustls::pki_types::ServerName::try_from(host).unwrap()).is_ok()
    };
    assert!(covers("espalier-worker-0-11.espalier.research.svc") && covers("metrics.espalier.research.svc"));
    assert!(
        !covers("espalier.research.svc") && !covers("a.b.espalier.research.svc") && !covers("a.espalier.other.svc")
    );
}

#[tokio::test]
async fn a_collector_needs_no_role_but_the_authority() {
    let (ours, theirs) = (authority("ours"), authority("theirs"));
    let collector = certificates(&ours, &ours, &[]);
    let entrance = Entrance { credentials: Some(open(collector.path(), None).unwrap()), tokens: None };
    let mut greeter = Greeter::start(entrance).await;
    let dial = async |dialer: Dialer| {
        let connector = dialer.connector_to_collector(&greeter.url).unwrap();
        connector.connect(greeter.url.parse().unwrap()).await
    };
    let misled = reason(dial(dialer(&certificates(&theirs, &ours, &[Role::Worker]))).await);
    assert!(misled.contains("the server's certificate is not believed"), "{misled}");
    dial(dialer(&certificates(&ours, &ours, &[Role::Worker]))).await.unwrap();
    greeter.came.recv().await.unwrap();
    greeter.stop().await;
}
