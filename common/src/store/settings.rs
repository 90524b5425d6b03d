//! What the environment says of object stores.

use std::collections::BTreeMap;
use std::fmt;

/// What the names of the variables begin with, by the store they are for.
const PREFIXES: [&str; 3] = ["AWS_", "GOOGLE_", "AZURE_"];

/// The variables that the stores' own tools read: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`,
/// `AZURE_STORAGE_ACCOUNT_NAME` and so on. Their values are never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StoreSettings {
    /// By name.
    variables: BTreeMap<String, String>,
}

impl StoreSettings {
    /// Keeps the variables that are about object stores.
    pub fn from_variables(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let ours = |name: &str| PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        Self { variables: variables.into_iter().filter(|(name, value)| ours(name) && !value.is_empty()).collect() }
    }

    /// Names, in the lower case that options have, and values of the variables that begin with `prefix`.
    pub(super) fn options(&self, prefix: &str) -> impl Iterator<Item = (String, &str)> {
        let of_store = self.variables.iter().filter(move |(name, _)| name.starts_with(prefix));
        of_store.map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()))
    }

    /// Takes the values that are nobody's business out of a message.
    pub(super) fn hide_secrets(&self, message: &str) -> String {
        const SECRET: [&str; 6] = ["KEY", "SECRET", "TOKEN", "SAS", "PASSWORD", "CREDENTIAL"];
        /// Shorter ones would hide half of every message, and are no secrets.
        const SHORTEST: usize = 6;
        let secret = |name: &str| SECRET.iter().any(|word| name.contains(word));
        self.variables
            .iter()
            .filter(|(name, value)| secret(name) && value.len() >= SHORTEST)
            .fold(message.to_owned(), |text, (_, value)| text.replace(value.as_str(), "(hidden)"))
    }
}

impl fmt::Debug for StoreSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.variables.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_in_no_text() {
        let pairs = [("AWS_SECRET_ACCESS_KEY", "hunter22"), ("AWS_REGION", "us-east-1"), ("PATH", "/bin")];
        let pairs = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let settings = StoreSettings::from_variables(pairs);
        assert_eq!(format!("{settings:?}"), r#"{"AWS_REGION", "AWS_SECRET_ACCESS_KEY"}"#);
        assert_eq!(settings.hide_secrets("us-east-1 says hunter22"), "us-east-1 says (hidden)");
        let options: Vec<_> = settings.options("AWS_").collect();
        assert_eq!(options, [("aws_region".to_owned(), "us-east-1"), ("aws_secret_access_key".to_owned(), "hunter22")]);
    }
}
