//! Further programs in a container: an OCI `process` object of its own, checked as the one in
//! config.json is, or the container's own with changes.
//!
//! What runc takes from the container when such an object doesn't say it is taken from there:
//! capabilities and resource limits.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Process;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::{BundleError, fields, read, refusals, rlimits, tolerated};

/// A checked `process` object.
#[derive(Debug)]
pub struct Program {
    /// As JSON.
    pub json: Box<RawValue>,
    /// What it says.
    pub process: Process,
}

/// What differs from the container's own process.
#[derive(Debug, Default)]
pub struct Changes {
    /// The program and its arguments.
    pub args: Vec<String>,
    /// The working directory.
    pub cwd: Option<PathBuf>,
    /// Further variables, as `NAME=value`; the last of a name counts.
    pub env: Vec<String>,
    /// It has a terminal.
    pub terminal: bool,
    /// It can't gain privileges.
    pub no_new_privileges: bool,
    /// The user, and the group if it is another.
    pub user: Option<(u32, Option<u32>)>,
    /// Further groups.
    pub additional_gids: Vec<u32>,
    /// Further capabilities.
    pub capabilities: Vec<String>,
}

impl Program {
    /// Reads an object from a file.
    ///
    /// # Errors
    /// See [`BundleError`].
    pub fn load(path: &Path, container: &Value) -> Result<Self, BundleError> {
        let text = read(path, "name a file with an OCI process object")?;
        let malformed = |source| BundleError::Malformed { path: path.to_owned(), source };
        let mut json: Value = serde_json::from_str(&text).map_err(malformed)?;
        rlimits::check(&json)?;
        // Positions are those of the text.
        let _: Process = serde_json::from_str(&text).map_err(malformed)?;
        fields::check_process(&json)?;
        for name in ["capabilities", "rlimits"] {
            let given = &json[name];
            if given.is_null() || given.as_array().is_some_and(Vec::is_empty) {
                json[name] = container[name].clone();
            }
        }
        Self::check(json)
    }

    /// The container's own process with changes.
    ///
    /// # Errors
    /// See [`BundleError`].
    pub fn derive(mut container: Value, changes: Changes) -> Result<Self, BundleError> {
        let json = &mut container;
        json["args"] = json!(changes.args);
        json["terminal"] = json!(changes.terminal);
        if let Some(cwd) = changes.cwd {
            json["cwd"] = json!(cwd);
        }
        if changes.no_new_privileges {
            json["noNewPrivileges"] = json!(true);
        }
        if let Some((uid, gid)) = changes.user {
            json["user"]["uid"] = json!(uid);
            if let Some(gid) = gid {
                json["user"]["gid"] = json!(gid);
            }
        }
        extend(&mut json["env"], changes.env);
        extend(&mut json["user"]["additionalGids"], changes.additional_gids);
        // What isn't inheritable can't be ambient.
        let inheritable = json["capabilities"]["inheritable"].as_array();
        let ambient = inheritable.is_some_and(|set| !set.is_empty());
        let sets = ["bounding", "effective", "permitted", "ambient"];
        for set in &sets[..if ambient { 4 } else { 3 }] {
            extend(&mut json["capabilities"][*set], changes.capabilities.clone());
        }
        Self::check(container)
    }

    fn check(mut json: Value) -> Result<Self, BundleError> {
        for note in tolerated::leave_out(&mut json) {
            tracing::warn!("{note}");
        }
        let wrong = |error: serde_json::Error| BundleError::field("process", error.to_string());
        fields::check_process(&json)?;
        let process: Process = serde_json::from_value(json.clone()).map_err(wrong)?;
        refusals::check_program(&process)?;
        refusals::check_labels(&json!({ "process": json }))?;
        let json = serde_json::value::to_raw_value(&json).map_err(wrong)?;
        Ok(Self { json, process })
    }
}

/// Appends to a list, which may be absent.
fn extend<T: Into<Value>>(list: &mut Value, items: Vec<T>) {
    if items.is_empty() {
        return;
    }
    if list.is_null() {
        *list = json!([]);
    }
    if let Some(list) = list.as_array_mut() {
        list.extend(items.into_iter().map(Into::into));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container() -> Value {
        json!({
            "terminal": true, "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
            "args": ["own"], "env": ["A=1"], "cwd": "/own",
            "capabilities": {"bounding": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 9, "soft": 9}],
        })
    }

    fn load(text: &str) -> Result<Value, String> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("process.json");
        std::fs::write(&path, text).expect("written");
        let program = Program::load(&path, &container()).map_err(|error| error.to_string())?;
        Ok(serde_json::from_str(program.json.get()).expect("JSON"))
    }

    #[test]
    fn flags_change_the_containers_own_process() {
        let changes = Changes {
            args: vec!["x".to_owned()],
            env: vec!["B=2".to_owned()],
            user: Some((7, None)),
            additional_gids: vec![8],
            capabilities: vec!["CAP_CHOWN".to_owned()],
            ..Changes::default()
        };
        let program = Program::derive(container(), changes).expect("valid");
        let json: Value = serde_json::from_str(program.json.get()).expect("JSON");
        assert_eq!(
            json,
            json!({
                "terminal": false, "user": {"uid": 7, "gid": 2, "additionalGids": [3, 8]},
                "args": ["x"], "env": ["A=1", "B=2"], "cwd": "/own",
                "capabilities": {
                    "bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_CHOWN"],
                    "permitted": ["CAP_CHOWN"],
                },
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 9, "soft": 9}],
            })
        );
    }

    #[test]
    fn what_a_file_does_not_say_is_the_containers_where_runc_has_it_so() {
        let json = load(r#"{"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}}"#);
        let json = json.expect("valid");
        assert_eq!(json["capabilities"], json!({"bounding": ["CAP_KILL"]}));
        assert_eq!(json["rlimits"], container()["rlimits"]);
        assert!(json["env"].is_null());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let user = r#""user": {"uid": 0, "gid": 0}"#;
        for (text, words) in [
            ("{\n\"args\": }".to_owned(), "process.json: expected value at line 2 column 9"),
            (format!(r#"{{"args": "x", "cwd": "/", {user}}}"#), "line 1 column"),
            (format!(r#"{{"args": ["x"], "cwd": "x", {user}}}"#), "process.cwd: \"x\""),
            (format!(r#"{{"args": [], "cwd": "/", {user}}}"#), "process.args: empty"),
            (format!(r#"{{"arg": [], "cwd": "/", {user}}}"#), "process.arg: not supported"),
            (
                format!(r#"{{"args": ["x"], "cwd": "/", "selinuxLabel": "l", {user}}}"#),
                "process.selinuxLabel: ",
            ),
        ] {
            let error = load(&text).expect_err("refused");
            assert!(error.contains(words), "{text}: {error}");
        }
        let error = Program::load(Path::new("/no/such"), &container()).expect_err("absent");
        assert!(error.to_string().contains("/no/such: not found"), "{error}");
    }
}
