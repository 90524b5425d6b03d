//! Who may call what: the one table of methods and roles. Pure.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// What a certificate's subject alternative names hold for each role of its holder: `espalier:role:worker`.
pub const URI_PREFIX: &str = "espalier:role:";

/// What somebody may do here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Calls workers; the only one that workers and the command line take for a coordinator.
    Coordinator,
    /// Registers, reports, and serves hidden states to other workers.
    Worker,
    /// Submits and cancels runs, and sees what a viewer sees.
    Submitter,
    /// Sees runs and workers.
    Viewer,
}

/// All roles of one peer.
pub type Roles = BTreeSet<Role>;

impl Role {
    /// Every role.
    pub const ALL: [Self; 4] = [Self::Coordinator, Self::Worker, Self::Submitter, Self::Viewer];

    /// Its name in certificates and token files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
            Self::Submitter => "submitter",
            Self::Viewer => "viewer",
        }
    }

    /// Whether somebody with this role may do what is for `wanted`.
    fn includes(self, wanted: Self) -> bool {
        self == wanted || (self == Self::Submitter && wanted == Self::Viewer)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|role| role.name() == text).ok_or(())
    }
}

/// Every method of every service, and the roles that may call it. What is not here may be called by nobody.
const METHODS: [(&str, &[Role]); 21] = [
    ("/espalier.v1.Coordinator/Register", &[Role::Worker]),
    ("/espalier.v1.Coordinator/Heartbeat", &[Role::Worker]),
    ("/espalier.v1.Coordinator/Report", &[Role::Worker]),
    ("/espalier.v1.Coordinator/Leave", &[Role::Worker]),
    ("/espalier.v1.Admin/Submit", &[Role::Submitter]),
    ("/espalier.v1.Admin/Cancel", &[Role::Submitter]),
    ("/espalier.v1.Admin/Watch", &[Role::Viewer]),
    ("/espalier.v1.Admin/Status", &[Role::Viewer]),
    ("/espalier.v1.Worker/Inspect", &[Role::Coordinator]),
    ("/espalier.v1.Worker/Prepare", &[Role::Coordinator]),
    ("/espalier.v1.Worker/ForwardLayer", &[Role::Coordinator]),
    ("/espalier.v1.Worker/PruneLayer", &[Role::Coordinator]),
    ("/espalier.v1.Worker/Evaluate", &[Role::Coordinator]),
    ("/espalier.v1.Worker/SurveyLayer", &[Role::Coordinator]),
    ("/espalier.v1.Worker/Try", &[Role::Coordinator]),
    ("/espalier.v1.Worker/Abandon", &[Role::Coordinator]),
    ("/espalier.v1.Worker/Release", &[Role::Coordinator]),
    ("/espalier.v1.Activations/Fetch", &[Role::Worker, Role::Coordinator]),
    ("/espalier.v1.Assistance/Assist", &[Role::Worker, Role::Coordinator]),
    ("/grpc.health.v1.Health/Check", &Role::ALL),
    ("/grpc.health.v1.Health/Watch", &Role::ALL),
];

/// Who may look at a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody who reaches the port: a probe says one word and tells nothing of the work.
    Open,
    /// Those with one of these roles.
    For(&'static [Role]),
}

/// Every page that is served over HTTP, of either program. What is not here may be seen by nobody.
const PAGES: [(&str, Access); 8] = [
    ("/healthz", Access::Open),
    ("/readyz", Access::Open),
    ("/metrics", Access::For(&[Role::Viewer])),
    ("/", Access::For(&[Role::Viewer])),
    ("/api/state", Access::For(&[Role::Viewer])),
    ("/api/events", Access::For(&[Role::Viewer])),
    ("/api/report", Access::For(&[Role::Viewer])),
    ("/report", Access::For(&[Role::Viewer])),
];

/// Who may look at a page, by its path; nothing for one that is not ours.
pub fn access(path: &str) -> Option<Access> {
    PAGES.iter().find(|(page, _)| *page == path).map(|(_, access)| *access)
}

/// The roles that may call a method, by its path; nothing for a method that is not ours.
pub fn callers(path: &str) -> Option<&'static [Role]> {
    METHODS.iter().find(|(method, _)| *method == path).map(|(_, roles)| *roles)
}

/// Whether somebody with `roles` may do what is for `wanted`.
pub fn may(roles: &Roles, wanted: &[Role]) -> bool {
    roles.iter().any(|role| wanted.iter().any(|wanted| role.includes(*wanted)))
}

/// Roles as people read them.
pub fn list<'a>(roles: impl IntoIterator<Item = &'a Role>) -> String {
    let names: Vec<_> = roles.into_iter().map(|role| role.name()).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// Paths of all methods in the schema, read from its text.
    fn schema() -> BTreeSet<String> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto/espalier/v1");
        let mut methods = BTreeSet::new();
        for file in fs::read_dir(folder).unwrap() {
            let text = fs::read_to_string(file.unwrap().path()).unwrap();
            let mut service = String::new();
            for line in text.lines().map(str::trim) {
                if let Some(rest) = line.strip_prefix("service ") {
                    service = rest.split([' ', '{']).next().unwrap().to_owned();
                } else if let Some(rest) = line.strip_prefix("rpc ") {
                    let method = rest.split(['(', ' ']).next().unwrap();
                    methods.insert(format!("/espalier.v1.{service}/{method}"));
                }
            }
        }
        methods
    }

    #[test]
    fn the_table_has_every_method_of_the_schema_and_no_other() {
        let table: BTreeSet<String> = METHODS.iter().map(|(method, _)| (*method).to_owned()).collect();
        assert_eq!(table.len(), METHODS.len(), "a method stands twice");
        let health = ["Check", "Watch"].map(|method| format!("/grpc.health.v1.Health/{method}"));
        assert_eq!(table, schema().into_iter().chain(health).collect());
        assert!(METHODS.iter().all(|(_, roles)| !roles.is_empty()));
    }

    #[test]
    fn each_role_may_do_its_own() {
        let allowed = |role: Role| -> BTreeSet<&str> {
            let may_call = |(_, wanted): &&(&str, &[Role])| may(&Roles::from([role]), wanted);
            let ours = METHODS.iter().filter(|(method, _)| method.starts_with("/espalier."));
            ours.filter(may_call).map(|(method, _)| method.split('/').nth(2).unwrap()).collect()
        };
        assert_eq!(allowed(Role::Viewer), BTreeSet::from(["Watch", "Status"]));
        assert_eq!(allowed(Role::Submitter), BTreeSet::from(["Watch", "Status", "Submit", "Cancel"]));
        assert_eq!(
            allowed(Role::Worker),
            BTreeSet::from(["Register", "Heartbeat", "Report", "Leave", "Fetch", "Assist"])
        );
        assert!(allowed(Role::Coordinator).contains("PruneLayer") && !allowed(Role::Coordinator).contains("Submit"));
        assert!(!may(&Roles::new(), &Role::ALL));
    }

    #[test]
    fn names_are_read_back_and_unknown_methods_are_nobodys() {
        for role in Role::ALL {
            assert_eq!(role.name().parse(), Ok(role));
        }
        assert!("root".parse::<Role>().is_err());
        for path in ["/espalier.v1.Admin/submit", "/espalier.v1.Admin/", "", "/grpc.health.v1.Health/List"] {
            assert_eq!(callers(path), None, "{path}");
        }
    }

    #[test]
    fn probes_are_open_and_every_other_page_is_for_viewers() {
        for (page, access) in PAGES {
            let open = matches!(page, "/healthz" | "/readyz");
            assert_eq!(access, if open { Access::Open } else { Access::For(&[Role::Viewer]) }, "{page}");
        }
        for path in ["/metrics/", "/api", "//", "/index.html", ""] {
            assert_eq!(access(path), None, "{path}");
        }
    }
}
