//! What is known of one sandbox, collected for whoever is to find out what is wrong with it.
//!
//! * [`archive`]: the parts, packed.
//! * [`secrets`]: what is taken out of them.
//!
//! # Promises
//! What is missing doesn't stop the rest: a sandbox may run, have stopped, or be broken in any way.
//! Nothing takes longer than a few seconds. Parts are of bounded length, and their names are kiln's
//! own. Nothing is changed.

mod archive;
mod secrets;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::slice;

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

pub use self::archive::Archive;
use self::secrets::Secrets;
use crate::bundle;
use crate::metrics::{self, Answers};
use crate::sandbox::host_processes::{HostProcess, Snapshot};
use crate::sandbox::inspection::Inspection;
use crate::state::{Container, StateError, Status};

/// How much of a log file's end is taken, in bytes.
const LOG_TAIL: u64 = 64 << 10;
/// The most that is read of a file of `/proc`, in bytes.
const MAX_PROC: u64 = 64 << 10;
/// Files of `/proc/PID` that say how a process is, and nothing of what it holds.
const OF_PROCESS: [&str; 5] = ["status", "limits", "cgroup", "wchan", "stack"];
/// What the host says of itself.
const OF_HOST: [&str; 4] = ["version", "uptime", "loadavg", "meminfo"];

/// Adds all that is known of a sandbox; `found` is what the state directory has of it.
pub fn collect(
    archive: &mut Archive,
    found: &Result<Container, StateError>,
    state: &Path,
    log: Option<&Path>,
) {
    for name in OF_HOST {
        archive.add(format!("host/{name}"), read_start(&format!("/proc/{name}")));
    }
    // First the configuration: what is a secret there is one everywhere.
    let mut secrets = Secrets::default();
    let config = match found {
        Ok(container) => config(container, &mut secrets),
        Err(_) => Err(anyhow!("the state doesn't say where the bundle is")),
    };
    let texts = Texts { are_clean: config.is_ok() };
    archive.add("config.json", config);
    archive.add("state.json", texts.record(&state.join("state.json"), &mut secrets));
    archive.add("log.txt", texts.scrub(log_tail(log), &secrets));
    match found {
        Ok(container) => collect_answers(archive, container, &texts, &secrets),
        Err(error) => {
            let reason = chain(error);
            for name in ["inspection.json", "console.txt", "metrics.txt", "processes"] {
                archive.add(name, Err::<Vec<u8>, _>(anyhow!("{reason}")));
            }
        }
    }
}

/// Texts of any content: the log, the console.
struct Texts {
    /// The configuration is known, and with it which values are secrets.
    are_clean: bool,
}

impl Texts {
    fn scrub(&self, text: anyhow::Result<String>, secrets: &Secrets) -> anyhow::Result<String> {
        let text = text?;
        match self.are_clean {
            true => Ok(secrets.scrub(&text)),
            false => bail!("without config.json it is not known which values are secrets"),
        }
    }

    /// `state.json` without secrets.
    fn record(&self, path: &Path, secrets: &mut Secrets) -> anyhow::Result<String> {
        let named = || path.display().to_string();
        let text = std::fs::read(path).with_context(named)?;
        // A text that is no JSON is not shown: what in it is a secret can't be told.
        let mut state: Value = serde_json::from_slice(&text).with_context(named)?;
        if !self.are_clean
            && let Some(end) = state.get_mut("end")
        {
            *end = "left out".into();
        }
        without_secrets(state, secrets)
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What the monitor, the guest and the host say of it now, or what the monitor said last.
fn collect_answers(archive: &mut Archive, container: &Container, texts: &Texts, secrets: &Secrets) {
    let answers = metrics::ask(container);
    let inspection = inspection(container, answers.as_ref());
    let known = || inspection.as_ref().map_err(|error| anyhow!("{error:#}"));
    let console = known().map(|known| known.console.join("\n") + "\n");
    archive.add("console.txt", texts.scrub(console, secrets));
    let known = known().and_then(|known| {
        let known = Inspection { console: Vec::new(), ..(*known).clone() };
        Ok(serde_json::to_string_pretty(&known)?)
    });
    archive.add("inspection.json", texts.scrub(known, secrets));
    let guest = match &answers {
        Some(Answers { figures: Err(error), .. }) => format!("# no figures: {error:#}\n"),
        _ => String::new(),
    };
    let execs = answers.as_ref().and_then(|answers| answers.inspection.as_ref().ok());
    let execs = execs.map(|inspection| inspection.execs.clone()).unwrap_or_default();
    let exposition = metrics::expose(slice::from_ref(container), vec![answers]);
    let figures = exposition.map(|exposition| format!("{guest}{exposition}"));
    archive.add("metrics.txt", figures.context("/proc"));
    if container.status() == Status::Stopped {
        return archive.add("processes", Err::<Vec<u8>, _>(anyhow!("the container has stopped")));
    }
    match Snapshot::take() {
        Ok(snapshot) => {
            let processes = snapshot.of(container.record.monitor, &execs);
            processes.iter().for_each(|process| add_process(archive, process));
        }
        Err(error) => {
            archive.add("processes", Err::<Vec<u8>, _>(anyhow!(error).context("/proc")));
        }
    }
}

/// What the monitor knows, or knew when the container ended.
fn inspection<'a>(
    container: &'a Container,
    answers: Option<&'a Answers>,
) -> anyhow::Result<&'a Inspection> {
    match (answers, &container.record.end) {
        (Some(answers), _) => answers.inspection.as_ref().map_err(|error| anyhow!("{error:#}")),
        (None, Some(end)) => Ok(&end.inspection),
        (None, None) => Err(anyhow!("the sandbox's monitor was killed, and left nothing behind")),
    }
}

fn add_process(archive: &mut Archive, process: &HostProcess) {
    let HostProcess { role, pid, .. } = process;
    for name in OF_PROCESS {
        let content = read_start(&format!("/proc/{pid}/{name}"));
        archive.add(format!("processes/{role}-{pid}/{name}"), content);
    }
}

/// The bundle's `config.json` without secrets.
fn config(container: &Container, secrets: &mut Secrets) -> anyhow::Result<String> {
    let path = container.record.bundle.join("config.json");
    let text = bundle::read_config(&path)?;
    let config = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    without_secrets(config, secrets)
}

fn without_secrets(mut document: Value, secrets: &mut Secrets) -> anyhow::Result<String> {
    secrets.take_out(&mut document);
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

/// The last lines of the log.
fn log_tail(path: Option<&Path>) -> anyhow::Result<String> {
    let path = path.context("name the sandbox's log file with --log before the verb")?;
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let begin = file.metadata()?.len().saturating_sub(LOG_TAIL);
        file.seek(SeekFrom::Start(begin))?;
        let mut text = Vec::new();
        file.take(LOG_TAIL).read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        // It may begin in the middle of a line.
        let whole = if begin == 0 { 0 } else { text.find('\n').map_or(0, |end| end + 1) };
        Ok(text[whole..].to_owned())
    };
    read().with_context(|| path.display().to_string())
}

/// A file of `/proc`.
fn read_start(path: &str) -> anyhow::Result<Vec<u8>> {
    let mut text = Vec::new();
    let file = File::open(path).context(path.to_owned())?;
    file.take(MAX_PROC).read_to_end(&mut text).context(path.to_owned())?;
    Ok(text)
}
