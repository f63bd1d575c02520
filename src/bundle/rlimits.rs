//! The names of resource limits, checked before the rest so that an unknown one is named by its field.

use serde_json::Value;

use super::BundleError;

const KNOWN: [&str; 16] = [
    "RLIMIT_AS",
    "RLIMIT_CORE",
    "RLIMIT_CPU",
    "RLIMIT_DATA",
    "RLIMIT_FSIZE",
    "RLIMIT_LOCKS",
    "RLIMIT_MEMLOCK",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_NOFILE",
    "RLIMIT_NPROC",
    "RLIMIT_RSS",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
    "RLIMIT_SIGPENDING",
    "RLIMIT_STACK",
];

/// Refuses the first limit of a process that Linux doesn't have.
///
/// # Errors
/// Its path and name.
pub fn check(process: &Value) -> Result<(), BundleError> {
    let limits = process["rlimits"].as_array().into_iter().flatten();
    let kinds = limits.map(|limit| limit["type"].as_str()).enumerate();
    for (index, kind) in kinds {
        if let Some(kind) = kind.filter(|kind| !KNOWN.contains(kind)) {
            let reason = format!("{kind:?} is no resource limit of Linux: see getrlimit(2)");
            return Err(BundleError::field(format!("process.rlimits[{index}].type"), reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::PosixRlimitType;
    use serde_json::json;

    #[test]
    fn known_names_are_those_that_are_parsed() {
        for name in KNOWN {
            serde_json::from_value::<PosixRlimitType>(json!(name)).expect(name);
            check(&json!({"rlimits": [{"type": name}]})).expect(name);
        }
    }

    #[test]
    fn unknown_limits_are_named() {
        let process = json!({"rlimits": [{"type": "RLIMIT_CPU"}, {"type": "RLIMIT_LUNCH"}]});
        let error = check(&process).expect_err("unknown").to_string();
        assert!(error.starts_with("process.rlimits[1].type: \"RLIMIT_LUNCH\""), "{error}");
        check(&json!(null)).expect("no limits");
    }
}
