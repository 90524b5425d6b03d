//! What the `object_store` crate reports, as an error of ours.

use std::error::Error as _;

use object_store::Error;
use object_store::client::{HttpError, HttpErrorKind};

use crate::store::{StoreError, StoreSettings};

/// Longest text that is taken over: an answer may be a whole page.
const LONGEST: usize = 600;

/// What stores call a bucket that is not there; the crate takes it for a blob that is not there.
const NO_BUCKET: [&str; 3] = ["NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist"];

/// Where a machine of a cloud asks for its role.
const METADATA_SERVICES: [&str; 2] = ["169.254.169.254", "metadata.google.internal"];

/// Sorts an error of an operation on `name` in `url` by what can be done about it.
pub(super) fn told(url: &str, name: &str, error: Error, settings: &StoreSettings) -> StoreError {
    let text = error.to_string();
    let (url, name, reason) = (url.to_owned(), name.to_owned(), reason(&text, settings));
    match error {
        Error::NotFound { .. } if NO_BUCKET.iter().any(|code| text.contains(code)) => {
            StoreError::Refused { url, name, reason }
        }
        Error::NotFound { .. } => StoreError::NotFound { url, name },
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => StoreError::Denied { url, name, reason },
        Error::NotSupported { .. } | Error::NotImplemented { .. } => StoreError::Unsupported { url, reason },
        Error::InvalidPath { .. } => StoreError::BadName { name },
        Error::UnknownConfigurationKey { .. } => StoreError::Misconfigured { url, reason },
        Error::AlreadyExists { .. } => StoreError::Refused { url, name, reason },
        Error::Precondition { .. } | Error::NotModified { .. } => {
            let reason = "it was replaced while it was read".to_owned();
            StoreError::Unavailable { url, name, reason, unreachable: false }
        }
        other => match status(&text) {
            Some(408 | 429 | 500..) => StoreError::Unavailable { url, name, reason, unreachable: false },
            Some(_) => StoreError::Refused { url, name, reason },
            // A redirect without a place to go: the bucket is in another region.
            None if text.contains("incorrectly configured region") => StoreError::Refused { url, name, reason },
            None => StoreError::Unavailable { url, name, reason, unreachable: !was_cut_off(&other) },
        },
    }
}

/// The HTTP status of an answer. The crate's error that holds it is not exported; its text is.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

/// Whether an answer began and did not end well: the store was reached.
fn was_cut_off(error: &Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(http) = error.downcast_ref::<HttpError>() {
            return matches!(http.kind(), HttpErrorKind::Interrupted | HttpErrorKind::Decode);
        }
        cause = error.source();
    }
    false
}

/// One line without secrets: what was asked, and of an answer in XML its code and message.
fn reason(text: &str, settings: &StoreSettings) -> String {
    let tagged = |tag: &str| {
        let (_, rest) = text.split_once(&format!("<{tag}>"))?;
        Some(rest.split_once(&format!("</{tag}>"))?.0)
    };
    let mut line = match (tagged("Code"), tagged("Message")) {
        (Some(code), message) => {
            let asked = text.split('<').next().unwrap_or_default().trim_end_matches([' ', ':']);
            format!("{asked}: {code}: {}", message.unwrap_or_default())
        }
        _ => text.to_owned(),
    };
    line = settings.hide_secrets(&line.replace(['\n', '\r'], " "));
    if line.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|&end| line.is_char_boundary(end)).unwrap_or(0);
        line.truncate(end);
        line.push('…');
    }
    if METADATA_SERVICES.iter().any(|service| text.contains(service)) {
        line.push_str(" (no credentials are in the environment, so the machine's own role was asked for)");
    }
    line
}
