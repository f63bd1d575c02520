//! The hooks of a bundle.
//!
//! `prestart`, `createRuntime`, `poststart` and `poststop` run in the caller's namespaces, where
//! kiln's commands are. `createContainer` and `startContainer` run in the container's: they are
//! checked here, and the guest's agent finds them in the configuration.

use oci_spec::runtime::{Hook, Spec};
use serde::{Deserialize, Serialize};

use super::BundleError;

/// Hooks of the host, in the order in which they run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct HostHooks {
    /// Once the container's namespaces exist; deprecated.
    pub prestart: Vec<Hook>,
    /// After those.
    pub create_runtime: Vec<Hook>,
    /// Once the container's program runs.
    pub poststart: Vec<Hook>,
    /// Once the container is deleted.
    pub poststop: Vec<Hook>,
}

impl HostHooks {
    /// There are hooks that `create` has to run.
    pub fn has_create(&self) -> bool {
        !self.prestart.is_empty() || !self.create_runtime.is_empty()
    }
}

/// Finds the hooks of the host, and checks all.
///
/// # Errors
/// One that can't be run, by its field.
pub fn find(spec: &Spec) -> Result<HostHooks, BundleError> {
    let Some(hooks) = spec.hooks() else { return Ok(HostHooks::default()) };
    let checked = |name: &str, hooks: &Option<Vec<Hook>>| {
        let hooks = hooks.clone().unwrap_or_default();
        for (index, hook) in hooks.iter().enumerate() {
            check(&format!("hooks.{name}[{index}]"), hook)?;
        }
        Ok(hooks)
    };
    checked("createContainer", hooks.create_container())?;
    checked("startContainer", hooks.start_container())?;
    // The specification deprecates it, and Docker uses it.
    #[allow(deprecated)]
    let prestart = hooks.prestart();
    Ok(HostHooks {
        prestart: checked("prestart", prestart)?,
        create_runtime: checked("createRuntime", hooks.create_runtime())?,
        poststart: checked("poststart", hooks.poststart())?,
        poststop: checked("poststop", hooks.poststop())?,
    })
}

fn check(field: &str, hook: &Hook) -> Result<(), BundleError> {
    if !hook.path().is_absolute() {
        let reason = format!("{:?} is not an absolute path", hook.path());
        return Err(BundleError::field(format!("{field}.path"), reason));
    }
    if hook.timeout().is_some_and(|seconds| seconds <= 0) {
        let reason = "must be more than 0 seconds: leave it out for no limit";
        return Err(BundleError::field(format!("{field}.timeout"), reason));
    }
    for (index, variable) in hook.env().iter().flatten().enumerate() {
        if variable.split_once('=').is_none_or(|(name, _)| name.is_empty()) {
            let reason = format!("{variable:?} is not of the form NAME=VALUE");
            return Err(BundleError::field(format!("{field}.env[{index}]"), reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn find_in(hooks: Value) -> Result<HostHooks, BundleError> {
        let raw = json!({"ociVersion": "1.0.2", "hooks": hooks});
        find(&serde_json::from_value(raw).expect("spec"))
    }

    #[test]
    fn hooks_are_sorted_by_when_they_run() {
        let hook = |path: &str| json!({"path": path, "args": ["a", "b"], "env": ["A=1"]});
        let found = find_in(json!({
            "prestart": [hook("/1"), hook("/2")], "createRuntime": [hook("/3")],
            "poststart": [], "poststop": [hook("/4")],
        }))
        .expect("valid");
        let paths = |hooks: &[Hook]| hooks.iter().map(|h| h.path().clone()).collect::<Vec<_>>();
        assert_eq!(paths(&found.prestart), ["/1", "/2"].map(std::path::PathBuf::from));
        assert_eq!((found.create_runtime.len(), found.poststart.len()), (1, 0));
        assert!(found.has_create());
        assert_eq!(find_in(json!({})).expect("valid"), HostHooks::default());
    }

    #[test]
    fn what_cannot_be_run_is_refused_by_field() {
        for (hook, field) in [
            (json!({"path": "bin/x"}), "hooks.poststop[0].path: "),
            (json!({"path": "/x", "timeout": 0}), "hooks.poststop[0].timeout: "),
            (json!({"path": "/x", "env": ["A=1", "B"]}), "hooks.poststop[0].env[1]: "),
        ] {
            let error = find_in(json!({"poststop": [hook]})).expect_err("refused").to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
