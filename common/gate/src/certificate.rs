//! Who a certificate says its holder is: the subject, for people, and the roles.

use rustls::pki_types::CertificateDer;

use crate::role::{Role, Roles, URI_PREFIX};

/// Longest subject that is written to a log.
const SUBJECT_CHARACTERS: usize = 200;

/// Who a certificate says its holder is. It is to be believed only once the certificate was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// `CN=worker-1,O=Example`; the first DNS name if the subject is empty.
    pub subject: String,
    /// Roles named by its subject alternative names.
    pub roles: Roles,
    /// Names behind the prefix of a role that are no roles.
    pub unknown_roles: Vec<String>,
}

/// Reads the holder; nothing if it is no certificate.
pub fn holder(certificate: &CertificateDer<'_>) -> Option<Holder> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    let mut subject = subject(certificate.subject());
    if subject.is_empty() {
        subject = certificate.valid_dns_names().next().map(|name| format!("DNS:{name}")).unwrap_or_default();
    }
    let (mut roles, mut unknown_roles) = (Roles::new(), Vec::new());
    for name in certificate.valid_uri_names().filter_map(|uri| uri.strip_prefix(URI_PREFIX)) {
        match name.parse::<Role>() {
            Ok(role) => drop(roles.insert(role)),
            Err(()) => unknown_roles.push(printable(name)),
        }
    }
    Some(Holder { subject: printable(&subject), roles, unknown_roles })
}

/// What a log line may hold of a foreign text.
fn printable(text: &str) -> String {
    let shown = text.chars().map(|character| if character.is_control() { '?' } else { character });
    shown.take(SUBJECT_CHARACTERS).collect()
}

/// One DER element: its tag, its contents, and what follows it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81 => (usize::from(*rest.first()?), rest.get(1..)?),
        0x82 => (usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])), rest.get(2..)?),
        _ => return None,
    };
    Some((tag, rest.get(..length)?, rest.get(length..)?))
}

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;

/// A distinguished name as `CN=…,O=…`; parts of other kinds are left out.
fn subject(mut names: &[u8]) -> String {
    // Given with or without the sequence around it.
    if let Some((SEQUENCE, inner, [])) = element(names) {
        names = inner;
    }
    let mut parts = Vec::new();
    while let Some((tag, mut set, rest)) = element(names) {
        names = rest;
        while let (SET, Some((SEQUENCE, pair, others))) = (tag, element(set)) {
            set = others;
            let Some((OBJECT_IDENTIFIER, identifier, value)) = element(pair) else { continue };
            let Some((_, value, _)) = element(value) else { continue };
            let key = match identifier {
                [0x55, 0x04, 0x03] => "CN",
                [0x55, 0x04, 0x06] => "C",
                [0x55, 0x04, 0x0a] => "O",
                [0x55, 0x04, 0x0b] => "OU",
                _ => continue,
            };
            parts.push(format!("{key}={}", String::from_utf8_lossy(value)));
        }
    }
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    use super::*;

    fn certificate(names: &[(DnType, &str)], sans: &[&str], dns: &[&str]) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(dns.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in names {
            params.distinguished_name.push(kind.clone(), *value);
        }
        params.subject_alt_names.extend(sans.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())));
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn roles_and_subject_are_read() {
        let names = [(DnType::CommonName, "worker-1"), (DnType::OrganizationName, "Example")];
        let sans = ["espalier:role:worker", "espalier:role:viewer", "spiffe://other/thing", "espalier:role:wroker"];
        let holder = holder(&certificate(&names, &sans, &["worker-1.local"])).unwrap();
        assert_eq!(holder.subject, "CN=worker-1,O=Example");
        assert_eq!(holder.roles, Roles::from([Role::Worker, Role::Viewer]));
        assert_eq!(holder.unknown_roles, ["wroker"]);
    }

    #[test]
    fn without_a_subject_the_first_dns_name_stands() {
        let holder = holder(&certificate(&[], &[], &["a.example", "b.example"])).unwrap();
        assert_eq!(holder.subject, "DNS:a.example");
        assert!(holder.roles.is_empty());
    }

    #[test]
    fn a_subject_cannot_forge_log_lines() {
        let long = format!("x\n2026 INFO all is well\u{1b}[31m{}", "y".repeat(500));
        let holder = holder(&certificate(&[(DnType::CommonName, &long)], &[], &[])).unwrap();
        assert!(holder.subject.starts_with("CN=x?2026 INFO"), "{}", holder.subject);
        assert!(!holder.subject.contains(char::is_control));
        assert_eq!(holder.subject.chars().count(), SUBJECT_CHARACTERS);
    }

    #[test]
    fn what_is_no_certificate_has_no_holder() {
        assert_eq!(holder(&CertificateDer::from(vec![0x30, 0x82, 0xff])), None);
        for der in [&[][..], &[0x31], &[0x31, 0x05, 0x30], &[0x31, 0x84, 1, 1, 1, 1], &[0x31, 0x02, 0x30, 0x7f]] {
            assert_eq!(subject(der), "", "{der:?}");
        }
    }
}
