//! `config`: what a coordinator would be configured with, and what there is to configure.

use espalier_common::config::{Overrides, Setting, reference};
use serde_json::json;

use super::args::ConfigFlags;
use super::{CliError, screen, table};
use crate::config::CoordinatorConfig;

/// What the flags say, over everything else.
pub(crate) fn overrides(log: Overrides, flags: &ConfigFlags) -> Overrides {
    log.set("coordinator.listen", flags.listen.map(|address| address.to_string()))
        .set("coordinator.runs", flags.runs.clone())
        .set("coordinator.workers", flags.workers)
}

/// Shows every key with its value and where that is from.
pub(crate) fn show(flags: &ConfigFlags, log: Overrides, json: bool) -> Result<(), CliError> {
    let (_, settings) = CoordinatorConfig::explain(flags.config.as_deref(), overrides(log, flags))
        .map_err(|error| CliError::rejected(&error))?;
    screen::out(&if json { document(&settings) } else { listing(&settings) });
    Ok(())
}

/// Lists every key with its meaning and default.
pub(crate) fn keys(json: bool) {
    let text = reference::<CoordinatorConfig>();
    screen::out(&if json {
        let schema = schemars::schema_for!(CoordinatorConfig);
        serde_json::to_string_pretty(&schema).expect("a schema is plain data")
    } else {
        text.trim().to_owned()
    });
}

fn document(settings: &[Setting]) -> String {
    let keys: serde_json::Map<_, _> = settings
        .iter()
        .map(|setting| (setting.key.clone(), json!({ "value": setting.value, "origin": setting.origin })))
        .collect();
    serde_json::to_string_pretty(&keys).expect("settings are plain data")
}

fn listing(settings: &[Setting]) -> String {
    let mut rows = table::table(&["key", "value", "from"]);
    for setting in settings {
        rows.add_row([setting.key.clone(), setting.text(), setting.origin.to_string()]);
    }
    rows.to_string()
}
