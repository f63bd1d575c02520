//! What is left out of a process's configuration because the step gains nothing by it; each is
//! noted in the log.
//!
//! * Capabilities that kiln doesn't know, as runc does: a newer engine that asks for all of them gets
//!   all that there are.
//! * The AppArmor profiles that engines give to every container on a host with AppArmor. They keep a
//!   container from the host's `/proc`, `/sys` and mounts, and from signals to other containers; a
//!   guest has none of these. Any other profile was written for what it says, so it is refused:
//!   Kata's silence about them is what its users were surprised by.

use std::str::FromStr;

use capctl::caps::Cap;
use serde_json::Value;

/// Default profiles by name, or by the start of a name that ends in a version.
const DEFAULT_PROFILES: [&str; 4] =
    ["docker-default", "cri-containerd.apparmor.d", "crio-default", "nerdctl-default"];
const DEFAULT_PROFILE_PREFIX: &str = "containers-default-";

/// Leaves it out; gives a sentence about each.
pub fn leave_out(process: &mut Value) -> Vec<String> {
    let mut notes = Vec::new();
    let sets = process.get_mut("capabilities").and_then(Value::as_object_mut);
    for (set, names) in sets.into_iter().flatten() {
        let Some(names) = names.as_array_mut() else { continue };
        names.retain(|name| {
            let known = name.as_str().is_none_or(|name| Cap::from_str(name).is_ok());
            if !known {
                notes.push(format!("process.capabilities.{set}: unknown {name} is ignored"));
            }
            known
        });
    }
    if let Some(profile) = process.get_mut("apparmorProfile")
        && profile.as_str().is_some_and(is_default_profile)
    {
        notes.push(format!("process.apparmorProfile: {profile} is replaced by the guest"));
        *profile = Value::Null;
    }
    notes
}

fn is_default_profile(name: &str) -> bool {
    DEFAULT_PROFILES.contains(&name) || name.starts_with(DEFAULT_PROFILE_PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn known_capabilities_stay_and_unknown_ones_go_with_a_note() {
        let mut process = json!({"capabilities": {
            "bounding": ["CAP_CHOWN", "CAP_OF_TOMORROW"], "effective": ["CAP_SYS_ADMIN"],
        }});
        let notes = leave_out(&mut process);
        assert_eq!(
            notes,
            ["process.capabilities.bounding: unknown \"CAP_OF_TOMORROW\" is ignored"]
        );
        let expected =
            json!({"capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_SYS_ADMIN"]}});
        assert_eq!(process, expected);
    }

    #[test]
    fn default_profiles_go_and_others_stay() {
        for (profile, goes) in [
            ("docker-default", true),
            ("containers-default-0.50.1", true),
            ("cri-containerd.apparmor.d", true),
            ("my-profile", false),
            ("", false),
        ] {
            let mut process = json!({"apparmorProfile": profile});
            assert_eq!(leave_out(&mut process).len(), usize::from(goes), "{profile}");
            assert_eq!(process["apparmorProfile"].is_null(), goes, "{profile}");
        }
    }

    #[test]
    fn what_is_no_process_is_left_alone() {
        for mut value in [json!(null), json!([1]), json!({"capabilities": 3, "apparmorProfile": 4})]
        {
            let before = value.clone();
            assert_eq!(leave_out(&mut value), Vec::<String>::new());
            assert_eq!(value, before);
        }
    }
}
