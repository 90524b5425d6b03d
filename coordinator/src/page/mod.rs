//! The page: one file with its own style and script, served live or frozen with a run's data in it. It loads nothing.

use std::sync::LazyLock;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use espalier_common::clock::unix_millis;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::view::{Cursor, RunView};

const HTML: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
/// In reading order; together they are one script.
const SCRIPT: &[&str] =
    &[include_str!("dom.js"), include_str!("charts.js"), include_str!("run.js"), include_str!("main.js")];

/// Where the parts go.
const STYLE_PLACE: &str = "<!--style-->";
const SCRIPT_PLACE: &str = "<!--script-->";
const DATA_PLACE: &str = "<!--data-->";
const POLICY_PLACE: &str = "<!--policy-->";

/// The page as it is served.
#[derive(Debug)]
pub struct Page {
    /// The file.
    pub html: String,
    /// What a browser may do with it: run this script, apply this style, ask this host, and nothing else.
    pub policy: String,
}

fn source(text: &str) -> String {
    format!("'sha256-{}'", BASE64_STANDARD.encode(Sha256::digest(text.as_bytes())))
}

fn script() -> String {
    format!("\"use strict\";\n{}", SCRIPT.concat())
}

fn policy(connect: &str) -> String {
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src {connect}; img-src data:; base-uri 'none'; form-action 'none'",
        source(&script()),
        source(STYLE)
    )
}

fn assemble(policy: &str, data: &str) -> String {
    // The data last: it holds strings from outside, which must not be taken for a place.
    HTML.replacen(POLICY_PLACE, policy, 1)
        .replacen(STYLE_PLACE, &format!("<style>{STYLE}</style>"), 1)
        .replacen(SCRIPT_PLACE, &format!("<script>{}</script>", script()), 1)
        .replacen(DATA_PLACE, data, 1)
}

/// The page that asks its host for data.
pub fn live() -> &'static Page {
    static PAGE: LazyLock<Page> = LazyLock::new(|| {
        let policy = format!("{}; frame-ancestors 'none'", policy("'self'"));
        Page { html: assemble("", ""), policy }
    });
    &PAGE
}

/// The page of one run as it is now, which needs nothing but itself.
pub fn frozen(view: &RunView) -> String {
    let update = view.since(&mut Cursor::default());
    let data = json!({ "now": unix_millis(), "version": env!("CARGO_PKG_VERSION"), "run": update });
    let policy = format!("<meta http-equiv=\"Content-Security-Policy\" content=\"{}\">", policy("'none'"));
    assemble(
        &policy,
        &format!("<script type=\"application/json\" id=\"data\">{}</script>", embedded(&data.to_string())),
    )
}

/// JSON that no parser of HTML takes for the end of a script or a comment.
fn embedded(json: &str) -> String {
    json.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::RunEvent;

    /// What stands between two marks.
    fn between<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
        text.split_once(from).unwrap().1.split_once(to).unwrap().0
    }

    #[test]
    fn the_page_has_all_its_parts_and_loads_nothing() {
        let page = live();
        for place in [STYLE_PLACE, SCRIPT_PLACE, DATA_PLACE, POLICY_PLACE] {
            assert_eq!(HTML.matches(place).count(), 1, "{place}");
            assert!(!page.html.contains(place), "{place}");
        }
        for marker in ["src=", "@import", "url(", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "style="] {
            assert!(!page.html.contains(marker), "the page has {marker}");
        }
        assert!(!page.policy.contains("unsafe"));
    }

    #[test]
    fn the_policy_names_the_script_and_the_style_that_are_in_the_page() {
        for html in [live().html.clone(), frozen(&RunView::default())] {
            let (script, style) = (between(&html, "<script>", "</script>"), between(&html, "<style>", "</style>"));
            assert!(live().policy.contains(&source(script)) && live().policy.contains(&source(style)));
        }
    }

    #[test]
    fn strings_from_outside_stay_strings_in_a_frozen_page() {
        let hostile = "</script><script>alert(1)</script><!-- <!--style--> & \u{2028}";
        let mut view = RunView::default();
        view.apply(1, &RunEvent::Ended { reason: hostile.to_owned(), exit_code: 70 });
        let html = frozen(&view);
        assert_eq!(html.matches("<script").count(), 2, "the script and the data");
        let data = between(&html, "id=\"data\">", "</script>");
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["run"]["head"]["reason"], hostile);
        assert!(html.contains("http-equiv=\"Content-Security-Policy\""));
    }
}
