//! What runs inside the guest: its kernel and its agent.

use std::path::Path;

use super::Check;
use crate::artefacts::Artefacts;

const KERNEL: &str = "guest kernel";
const AGENT: &str = "guest agent";
const MEND: &str = "run `make` in kiln's source tree, or reinstall kiln";

/// Checks that both are there and can be used.
pub fn checks(lib_dir: Option<&Path>) -> Vec<Check> {
    match Artefacts::find(lib_dir) {
        Ok(artefacts) => vec![kernel(&artefacts), agent(&artefacts)],
        Err(error) => {
            let text = error.to_string();
            let (explanation, mend) = text.split_once("; ").unwrap_or((&text, MEND));
            vec![Check::fail(KERNEL, explanation, mend), Check::fail(AGENT, explanation, mend)]
        }
    }
}

fn kernel(artefacts: &Artefacts) -> Check {
    if let Err(error) = artefacts.open_kernel() {
        return Check::fail(KERNEL, format!("{:#}", anyhow::Error::new(error)), MEND);
    }
    match artefacts.kernel_description() {
        Ok(description) => Check::ok(
            KERNEL,
            format!(
                "Linux {}, built from source {}",
                description.kernel_release, description.source_version
            ),
        ),
        Err(error) => {
            let explanation =
                format!("it is there but its version is unknown: {:#}", anyhow::Error::new(error));
            Check::warn(KERNEL, explanation, MEND)
        }
    }
}

fn agent(artefacts: &Artefacts) -> Check {
    if let Err(error) = artefacts.open_agent() {
        return Check::fail(AGENT, format!("{:#}", anyhow::Error::new(error)), MEND);
    }
    let ours = env!("CARGO_PKG_VERSION");
    match artefacts.agent_version() {
        // Whatever else it says of itself.
        Ok(version) if version.split_whitespace().any(|word| word == ours) => {
            Check::ok(AGENT, version)
        }
        Ok(version) => {
            let explanation = format!("it is {version:?}, and kiln is of version {ours}");
            Check::fail(AGENT, explanation, MEND)
        }
        Err(error) => Check::fail(AGENT, format!("{:#}", anyhow::Error::new(error)), MEND),
    }
}
