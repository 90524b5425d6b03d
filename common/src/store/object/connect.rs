//! From a URL and the environment to a client of one bucket.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use url::Url;

use crate::store::{StoreError, StoreSettings};

/// What begins the URL of an object store.
pub(in crate::store) const SCHEMES: [&str; 7] = ["s3", "s3a", "gs", "az", "azure", "abfs", "abfss"];

/// From the first try of a request until no further one is begun.
const RETRY_DEADLINE: Duration = Duration::from_secs(60);
/// Tries beyond the first: more than fit into the deadline, which is what ends them.
const RETRIES: usize = 40;
/// One request, at most a part of 16 MiB: a link that is slower than that is of no use here.
const REQUEST_DEADLINE: Duration = Duration::from_secs(60);
/// Until a connection stands.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

pub(super) fn retry() -> RetryConfig {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(5), base: 3.0 };
    RetryConfig { backoff, max_retries: RETRIES, retry_timeout: RETRY_DEADLINE }
}

fn client() -> ClientOptions {
    ClientOptions::new().with_timeout(REQUEST_DEADLINE).with_connect_timeout(CONNECT_DEADLINE)
}

/// A URL as it may be shown: without user, password, query and fragment.
pub(crate) fn without_secrets(url: &str) -> String {
    let end = url.find(['?', '#']).unwrap_or(url.len());
    let (scheme, rest) = match url[..end].split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), &url[..end]),
    };
    let authority = rest.find('/').unwrap_or(rest.len());
    let host = rest[..authority].rfind('@').map_or(0, |at| at + 1);
    format!("{scheme}{}", &rest[host..])
}

/// Makes the client of the bucket that a URL names; returns it with the prefix that the URL names there.
///
/// # Errors
/// `UnknownScheme`, `Misconfigured`.
pub(super) fn connect(
    url: &str,
    settings: &StoreSettings,
    retry: RetryConfig,
) -> Result<(Arc<dyn ObjectStore>, String), StoreError> {
    let unknown = || StoreError::UnknownScheme { url: without_secrets(url) };
    let parsed = Url::parse(url).map_err(|_| unknown())?;
    // abfss://container@account.dfs.core.windows.net names no user there.
    let names_container = parsed.scheme().starts_with("abfs");
    let secret = parsed.password().is_some() || (!parsed.username().is_empty() && !names_container);
    if secret || parsed.query().is_some() || parsed.fragment().is_some() || parsed.host_str().is_none_or(str::is_empty)
    {
        return Err(unknown());
    }
    let prefix = Path::from_url_path(parsed.path()).map_err(|_| unknown())?;
    // The provider is chosen once a process; whoever chose before us is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let built: Result<Arc<dyn ObjectStore>, object_store::Error> = match parsed.scheme() {
        "s3" | "s3a" => {
            // The store compares what arrives with what was sent.
            let builder = AmazonS3Builder::new()
                .with_checksum_algorithm(Checksum::SHA256)
                .with_client_options(client())
                .with_retry(retry);
            let options = settings.options("AWS_").filter_map(|(key, value)| Some((key.parse().ok()?, value)));
            let builder =
                options.fold(builder, |builder, (key, value): (AmazonS3ConfigKey, _)| builder.with_config(key, value));
            builder.with_url(url).build().map(|store| Arc::new(store) as _)
        }
        "gs" => {
            let builder = GoogleCloudStorageBuilder::new().with_client_options(client()).with_retry(retry);
            let options = settings.options("GOOGLE_").filter_map(|(key, value)| Some((key.parse().ok()?, value)));
            let builder =
                options.fold(builder, |builder, (key, value): (GoogleConfigKey, _)| builder.with_config(key, value));
            builder.with_url(url).build().map(|store| Arc::new(store) as _)
        }
        "az" | "azure" | "abfs" | "abfss" => {
            let builder = MicrosoftAzureBuilder::new().with_client_options(client()).with_retry(retry);
            let options = settings.options("AZURE_").filter_map(|(key, value)| Some((key.parse().ok()?, value)));
            let builder =
                options.fold(builder, |builder, (key, value): (AzureConfigKey, _)| builder.with_config(key, value));
            builder.with_url(url).build().map(|store| Arc::new(store) as _)
        }
        _ => return Err(unknown()),
    };
    let wrong = |error: object_store::Error| StoreError::Misconfigured {
        url: url.to_owned(),
        reason: settings.hide_secrets(&error.to_string()),
    };
    Ok((built.map_err(wrong)?, prefix.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_with_secrets_are_refused_and_not_repeated() {
        let settings = StoreSettings::default();
        for url in
            ["s3://key:hunter2@bucket/x", "s3://hunter2@bucket", "s3://bucket/x?token=hunter2", "s3:///x#hunter2"]
        {
            let error = connect(url, &settings, retry()).unwrap_err();
            assert!(matches!(error, StoreError::UnknownScheme { .. }), "{url}: {error}");
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_url_names_a_bucket_and_a_prefix() {
        let settings = [
            ("AWS_REGION", "eu-central-1"),
            ("AZURE_STORAGE_ACCOUNT_NAME", "a"),
            ("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0"),
        ];
        let settings = StoreSettings::from_variables(settings.map(|(name, value)| (name.to_owned(), value.to_owned())));
        for (url, prefix) in [("s3://bucket", ""), ("s3://bucket/runs/7/", "runs/7"), ("az://box/a%20run", "a run")] {
            assert_eq!(connect(url, &settings, retry()).unwrap().1, prefix, "{url}");
        }
    }
}
