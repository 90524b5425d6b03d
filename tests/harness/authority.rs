//! Certificates for tests, made on the spot.

use std::fs::{self, Permissions};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};

/// An authority that signs certificates for 127.0.0.1 and localhost.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// A new one with this name, which nobody believes yet.
    ///
    /// # Errors
    /// If the key cannot be made.
    pub fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)? })
    }

    /// Its own certificate.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// Writes `ca.crt`, `tls.crt` and `tls.key` into `folder`, for somebody called `name` with `roles`. What is there is
    /// replaced.
    ///
    /// # Errors
    /// If the certificate cannot be made or written.
    pub fn equip(&self, folder: &Path, name: &str, roles: &[&str]) -> Result<()> {
        self.equip_until(folder, name, roles, 4096)
    }

    /// The same, with a certificate that ends with a year.
    ///
    /// # Errors
    /// If the certificate cannot be made or written.
    pub fn equip_until(&self, folder: &Path, name: &str, roles: &[&str], year: i32) -> Result<()> {
        self.equip_at(folder, name, roles, Ipv4Addr::LOCALHOST, year)
    }

    /// The same, for somebody at `address`.
    ///
    /// # Errors
    /// If the certificate cannot be made or written.
    pub fn equip_at(&self, folder: &Path, name: &str, roles: &[&str], address: Ipv4Addr, year: i32) -> Result<()> {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(address)));
        for role in roles {
            params.subject_alt_names.push(SanType::URI(format!("espalier:role:{role}").try_into()?));
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        fs::create_dir_all(folder)?;
        fs::write(folder.join("ca.crt"), self.pem())?;
        fs::write(folder.join("tls.crt"), certificate.pem())?;
        write_secret(&folder.join("tls.key"), &key.serialize_pem())
    }
}

/// Writes a file that only its owner may read.
///
/// # Errors
/// If it cannot be written.
pub fn write_secret(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, Permissions::from_mode(0o600))?)
}
