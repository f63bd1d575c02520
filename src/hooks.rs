//! Runs hooks of the host, as kiln's commands do: in the caller's namespaces and cgroup.
//!
//! Each gets the container's state as JSON on standard input, its own arguments, its own environment or,
//! if it has none, the command's, as under runc, and as much time as the bundle gives it; what it writes
//! is part of the error. They run one after the other, in the bundle's directory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use oci_spec::runtime::Hook;
use serde_json::{Value, json};

use crate::process::{Launch, describe, memory_file};
use crate::readiness::readable_by;
use crate::state::{Record, Status};

/// As much of a hook's output as an error shows, in bytes: the last.
const SHOWN: u64 = 2048;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
#[error("hooks.{field}: {}: {cause}{}", .path.display(), said(.output))]
pub struct HookError {
    field: String,
    path: std::path::PathBuf,
    cause: String,
    output: String,
}

fn said(output: &str) -> String {
    match output.trim() {
        "" => String::new(),
        text => format!("; its output ends with: {text}"),
    }
}

/// A container's state as hooks get it.
pub fn state_of(record: &Record, status: Status, pid: Option<u32>) -> Value {
    let mut state = json!({
        "ociVersion": record.oci_version,
        "id": record.id,
        "status": status.name(),
        "bundle": record.bundle,
        "annotations": record.annotations,
    });
    if let Some(pid) = pid {
        state["pid"] = pid.into();
    }
    state
}

/// Runs the hooks of a field of `hooks` in order, until one fails.
///
/// # Errors
/// A hook that can't be executed, fails or takes too long.
pub fn run(field: &str, hooks: &[Hook], state: &Value) -> Result<(), HookError> {
    for (index, hook) in hooks.iter().enumerate() {
        let field = format!("{field}[{index}]");
        run_one(&field, hook, state)?;
    }
    Ok(())
}

/// Runs all hooks of a field; failures are warnings.
pub fn run_all(field: &str, hooks: &[Hook], state: &Value) {
    for (index, hook) in hooks.iter().enumerate() {
        if let Err(error) = run_one(&format!("{field}[{index}]"), hook, state) {
            tracing::warn!("{error}");
        }
    }
}

fn run_one(field: &str, hook: &Hook, state: &Value) -> Result<(), HookError> {
    let mut output = None;
    let result = execute(hook, state, &mut output);
    result.map_err(|error| HookError {
        field: field.to_owned(),
        path: hook.path().clone(),
        cause: error.to_string(),
        output: output.map(last).unwrap_or_default(),
    })
}

/// Runs a hook to its end. `output` becomes the file that it writes to.
fn execute(hook: &Hook, state: &Value, output: &mut Option<File>) -> io::Result<()> {
    let mut input = memory_file("kiln-state")?;
    input.write_all(&serde_json::to_vec(state)?)?;
    input.rewind()?;
    let written = output.insert(memory_file("kiln-hook-output")?);
    let writer = || io::Result::Ok(Stdio::from(written.as_fd().try_clone_to_owned()?));

    let mut launch = Launch::program(hook.path());
    let mut arguments = hook.args().iter().flatten();
    launch.called(arguments.next().map_or(hook.path().as_os_str(), |name| name.as_ref()));
    launch.args(arguments);
    if let Some(variables) = hook.env() {
        launch.environment(variables.iter().filter_map(|variable| variable.split_once('=')));
    }
    if let Some(bundle) = state["bundle"].as_str().filter(|bundle| Path::new(bundle).is_dir()) {
        launch.directory(bundle);
    }
    launch.stdio(input.into(), writer()?, writer()?);
    let mut process = launch.spawn_with(|| Ok(SigSet::all().thread_unblock()?))?;
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
    let deadline =
        limit.and_then(|seconds| Instant::now().checked_add(Duration::from_secs(seconds)));
    if !readable_by(process.pidfd(), deadline)? {
        process.kill_group();
        process.wait()?;
        let seconds = limit.unwrap_or_default();
        return Err(io::Error::other(format!("did not end within its timeout of {seconds} s")));
    }
    let status = process.wait()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(describe(status))) }
}

/// The end of a file as text.
fn last(mut file: File) -> String {
    let mut bytes = Vec::new();
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let start = SeekFrom::Start(length.saturating_sub(SHOWN));
    if file.seek(start).is_ok() {
        // What can't be read isn't shown.
        let _ = file.take(SHOWN).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, more: Value) -> Hook {
        let mut hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        hook.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
        serde_json::from_value(hook).expect("hook")
    }

    fn run_in(dir: &Path, hooks: &[Hook]) -> Result<(), HookError> {
        run("prestart", hooks, &json!({"bundle": dir, "id": "c1"}))
    }

    #[test]
    fn hooks_run_in_order_with_state_arguments_and_environment_and_no_more() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let hooks = [
            shell("cat > state; /usr/bin/env > env; echo $0 >> order", json!({"env": ["A=b=c"]})),
            shell("echo second >> order; /usr/bin/env > inherited", json!({})),
        ];
        run_in(dir.path(), &hooks).expect("succeed");
        let read = |name| std::fs::read_to_string(dir.path().join(name)).expect("written");
        assert_eq!(read("order"), "sh\nsecond\n");
        let state: Value = serde_json::from_str(&read("state")).expect("JSON");
        assert_eq!(state["id"], "c1");
        // The shell adds its own working directory and depth.
        let env = read("env");
        let given: Vec<_> = env
            .lines()
            .filter(|l| !["PWD=", "SHLVL=", "_="].iter().any(|s| l.starts_with(s)))
            .collect();
        assert_eq!(given, ["A=b=c"]);
        let path = std::env::var("PATH").expect("a search path");
        assert!(read("inherited").lines().any(|line| line == format!("PATH={path}")));
    }

    #[test]
    fn failure_names_the_hook_with_its_output_and_ends_the_series() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let hooks = [
            shell("true", json!({})),
            shell("echo why >&2; exit 3", json!({})),
            shell("echo > x", json!({})),
        ];
        let error = run_in(dir.path(), &hooks).expect_err("fails").to_string();
        assert!(error.starts_with("hooks.prestart[1]: /bin/sh: exited with status 3"), "{error}");
        assert!(error.ends_with("why"), "{error}");
        assert!(!dir.path().join("x").exists());
        run_all("poststop", &hooks, &json!({"bundle": dir.path()}));
        assert!(dir.path().join("x").exists());
        let missing = serde_json::from_value(json!({"path": "/no/such"})).expect("hook");
        let error = run_in(dir.path(), &[missing]).expect_err("fails").to_string();
        assert!(error.contains("/no/such") && error.contains("No such file"), "{error}");
    }

    #[test]
    fn hook_that_takes_too_long_is_killed_with_what_it_started() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let hook = shell("sleep 1000 & echo $! > pid; wait", json!({"timeout": 1}));
        let error = run_in(dir.path(), &[hook]).expect_err("fails").to_string();
        assert!(error.contains("timeout of 1 s"), "{error}");
        let pid = std::fs::read_to_string(dir.path().join("pid")).expect("pid");
        let status = format!("/proc/{}/status", pid.trim());
        let is_gone =
            || std::fs::read_to_string(&status).map_or(true, |text| text.contains("State:\tZ"));
        while !is_gone() {
            std::thread::yield_now();
        }
    }
}
