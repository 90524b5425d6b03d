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

    /// The same, with the keys of the file that `AWS_SHARED_CREDENTIALS_FILE` names, of the profile that `AWS_PROFILE` names or
    /// of `default`; keys that stand in the environment itself come first. So keys can be given as a file, which a process' table
    /// does not show.
    ///
    /// # Errors
    /// What is wrong with the file; nothing that it holds.
    pub(super) fn with_credentials_file(&self) -> Result<Self, String> {
        const FILE: &str = "AWS_SHARED_CREDENTIALS_FILE";
        let Some(path) = self.variables.get(FILE).filter(|_| !self.variables.contains_key("AWS_ACCESS_KEY_ID")) else {
            return Ok(self.clone());
        };
        let profile = self.variables.get("AWS_PROFILE").map_or("default", String::as_str);
        let text = std::fs::read_to_string(path).map_err(|error| format!("{FILE} {path}: {error}"))?;
        let mut settings = self.clone();
        for (key, value) in profile_of(&text, profile) {
            if CREDENTIALS.contains(&key.to_ascii_lowercase().as_str()) {
                settings.variables.insert(key.to_ascii_uppercase(), value.to_owned());
            }
        }
        let is_given = |key: &str| settings.variables.contains_key(key);
        match is_given("AWS_ACCESS_KEY_ID") && is_given("AWS_SECRET_ACCESS_KEY") {
            true => Ok(settings),
            false => {
                Err(format!("{FILE} {path}: profile {profile} has no aws_access_key_id and aws_secret_access_key"))
            }
        }
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

/// What is taken from a file of credentials.
const CREDENTIALS: [&str; 3] = ["aws_access_key_id", "aws_secret_access_key", "aws_session_token"];

/// Keys and values below `[profile]` in the text of a file of credentials.
fn profile_of<'a>(text: &'a str, profile: &str) -> Vec<(&'a str, &'a str)> {
    let mut is_ours = false;
    let mut found = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            is_ours = name.trim() == profile;
        } else if let Some((key, value)) = line.split_once('=').filter(|_| is_ours) {
            found.push((key.trim(), value.trim()));
        }
    }
    found
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
    fn keys_are_read_from_a_file_by_profile_and_no_message_repeats_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("credentials");
        std::fs::write(
            &path,
            "# of a robot\n[other]\naws_access_key_id = nobody\n[default]\naws_access_key_id = robot-7\n\
             aws_secret_access_key = hunter22=\nregion = mars\n",
        )
        .unwrap();
        let named = |more: &[(&str, &str)]| {
            let file = ("AWS_SHARED_CREDENTIALS_FILE".to_owned(), path.display().to_string());
            let more = more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            StoreSettings::from_variables(more.chain([file]))
        };
        let settings = named(&[]).with_credentials_file().unwrap();
        assert_eq!(settings.variables["AWS_ACCESS_KEY_ID"], "robot-7");
        assert_eq!(settings.variables["AWS_SECRET_ACCESS_KEY"], "hunter22=");
        assert!(!settings.variables.contains_key("REGION"));
        assert!(!settings.hide_secrets("said hunter22= of").contains("hunter22"));
        let own = named(&[("AWS_ACCESS_KEY_ID", "mine")]).with_credentials_file().unwrap();
        assert_eq!(own.variables["AWS_ACCESS_KEY_ID"], "mine");
        let error = named(&[("AWS_PROFILE", "other")]).with_credentials_file().unwrap_err();
        assert!(error.contains("profile other has no") && !error.contains("nobody"), "{error}");
        std::fs::remove_file(&path).unwrap();
        assert!(named(&[]).with_credentials_file().unwrap_err().contains("credentials: "));
    }

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
