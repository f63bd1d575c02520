//! Changes of a running container's limits: an OCI `linux.resources` object.
//!
//! As runc has it, zero and nothing mean that a limit stays as it is, and devices are not changed.
//! Everything else is checked as in config.json.

use oci_spec::runtime::LinuxResources;
use serde_json::{Value, json};

use super::{BundleError, fields, refusals};

/// Limits of which 0 is no value. Of the others (a burst, the idle policy, swappiness) it is one.
const ZERO_IS_NONE: [(&str, &str); 9] = [
    ("memory", "limit"),
    ("memory", "reservation"),
    ("memory", "swap"),
    ("cpu", "shares"),
    ("cpu", "quota"),
    ("cpu", "period"),
    ("pids", "limit"),
    ("blockIO", "weight"),
    ("blockIO", "leafWeight"),
];

/// Reads changes as a caller wrote them to `name`.
///
/// # Errors
/// See [`BundleError`].
pub fn parse(name: &str, text: &str) -> Result<Value, BundleError> {
    let malformed = |source| BundleError::Malformed { path: name.into(), source };
    let resources: Value = serde_json::from_str(text).map_err(malformed)?;
    // Positions are those of the text.
    let _: LinuxResources = serde_json::from_str(text).map_err(malformed)?;
    check(resources)
}

/// Checks changes and leaves out what changes nothing.
///
/// # Errors
/// The first field that isn't known or can't be honoured.
pub fn check(mut resources: Value) -> Result<Value, BundleError> {
    fields::check_resources(&resources)?;
    refusals::check_resources(&json!({"linux": {"resources": resources}}))?;
    if let Some(members) = resources.as_object_mut() {
        members.remove("devices");
    }
    for (parent, name) in ZERO_IS_NONE {
        if let Some(limits) = resources[parent].as_object_mut()
            && limits.get(name).is_some_and(|limit| limit.as_i64() == Some(0))
        {
            limits.remove(name);
        }
    }
    // What is without limit in memory is so with swap, unless that is said.
    let memory = &mut resources["memory"];
    if memory["limit"] == json!(-1) && memory["swap"].is_null() {
        memory["swap"] = json!(-1);
    }
    tidy(&mut resources);
    Ok(resources)
}

/// Removes nulls, empty texts and empty objects.
fn tidy(value: &mut Value) {
    if let Value::Object(members) = value {
        members.values_mut().for_each(tidy);
        members.retain(|_, member| match member {
            Value::Null => false,
            Value::String(text) => !text.is_empty(),
            Value::Object(members) => !members.is_empty(),
            _ => true,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_nothing_is_left_out() {
        let text = r#"{
            "devices": [{"allow": true, "access": "rwm"}], "unified": {},
            "memory": {"limit": 5, "swap": 0, "swappiness": 0}, "pids": {"limit": 0},
            "cpu": {"cpus": "", "shares": 0, "quota": -1, "burst": 0}, "blockIO": null
        }"#;
        assert_eq!(
            parse("-", text).expect("valid"),
            json!({"memory": {"limit": 5, "swappiness": 0}, "cpu": {"quota": -1, "burst": 0}})
        );
        let unlimited = check(json!({"memory": {"limit": -1}})).expect("valid");
        assert_eq!(unlimited, json!({"memory": {"limit": -1, "swap": -1}}));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("{\n\"memory\": }", "-: expected value at line 2 column 11"),
            (r#"{"memory": {"limit": "1g"}}"#, "line 1 column"),
            (r#"{"memory": {"limits": 1}}"#, "linux.resources.memory.limits: not supported"),
            (r#"{"cpu": {"realtimeRuntime": 1}}"#, "linux.resources.cpu.realtimeRuntime: "),
        ] {
            let error = parse("-", text).expect_err("refused").to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
