//! `kiln update`: change a running container's limits.
//!
//! They are the guest's cgroup's: what can't be had there, and memory beyond the guest's, which is
//! fixed at its start, is refused.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::Global;
use super::request::{self, not_running};
use crate::bundle::resources;
use crate::sandbox::control::Request;
use crate::sandbox::document;
use crate::state::{self, Status};

/// Options of `kiln update`.
#[derive(Debug, clap::Args)]
pub struct Update {
    /// Take the limits from this file, or from standard input if it is -: an OCI linux.resources
    /// object; the options below don't count then
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Weight of block input and output, 10 to 1000
    #[arg(long, value_name = "N")]
    blkio_weight: Option<u16>,
    /// The CPU quota's period, in microseconds
    #[arg(long, value_name = "N")]
    cpu_period: Option<u64>,
    /// CPU time in each period, in microseconds
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// CPU time that may be saved up beyond the quota, in microseconds
    #[arg(long, value_name = "N")]
    cpu_burst: Option<u64>,
    /// CPU weight against other containers
    #[arg(long, value_name = "N")]
    cpu_share: Option<u64>,
    /// Refused: the guest's cgroups have no real-time limits
    #[arg(long, value_name = "N")]
    cpu_rt_period: Option<u64>,
    /// Refused: the guest's cgroups have no real-time limits
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cpu_rt_runtime: Option<i64>,
    /// 1: run only when nothing else does
    #[arg(long, value_name = "N")]
    cpu_idle: Option<i64>,
    /// CPUs of the guest to use
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes of the guest to use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Obsolete: does nothing
    #[arg(long, hide = true)]
    kernel_memory: Option<String>,
    /// Obsolete: does nothing
    #[arg(long, hide = true)]
    kernel_memory_tcp: Option<String>,
    /// Memory limit in bytes, or with a unit, as 512m; -1 for none
    #[arg(long, value_name = "N", value_parser = parse_bytes, allow_negative_numbers = true)]
    memory: Option<i64>,
    /// Memory that is taken back last, likewise
    #[arg(long, value_name = "N", value_parser = parse_bytes, allow_negative_numbers = true)]
    memory_reservation: Option<i64>,
    /// Limit of memory and swap together, likewise
    #[arg(long, value_name = "N", value_parser = parse_bytes, allow_negative_numbers = true)]
    memory_swap: Option<i64>,
    /// The most processes and threads; -1 for any number
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Refused: guests have no cache allocation
    #[arg(long, value_name = "SCHEMA")]
    l3_cache_schema: Option<String>,
    /// Refused: guests have no memory bandwidth allocation
    #[arg(long, value_name = "SCHEMA")]
    mem_bw_schema: Option<String>,
    /// The container's id
    id: String,
}

/// Changes the limits.
pub fn run(global: &Global, update: &Update) -> anyhow::Result<ExitCode> {
    let container = state::find(&global.root, &update.id)?;
    if container.status() == Status::Stopped {
        return Err(not_running().into());
    }
    let resources = update.resources()?;
    let document = document::write(&resources).context("limits")?;
    request::perform(&container, Request::Update, &[document])
}

impl Update {
    fn resources(&self) -> anyhow::Result<Value> {
        if let Some(path) = &self.resources {
            let name = path.display().to_string();
            let text = read(path).with_context(|| name.clone())?;
            return Ok(resources::parse(&name, &text)?);
        }
        for (option, schema) in
            [("l3-cache-schema", &self.l3_cache_schema), ("mem-bw-schema", &self.mem_bw_schema)]
        {
            if let Some(schema) = schema.as_ref().filter(|schema| !schema.is_empty()) {
                bail!("--{option}={schema}: guests have no such allocation: leave it out");
            }
        }
        for (option, value) in
            [("kernel-memory", &self.kernel_memory), ("kernel-memory-tcp", &self.kernel_memory_tcp)]
        {
            if value.is_some() {
                tracing::warn!("--{option} does nothing");
            }
        }
        Ok(resources::check(json!({
            "memory": {
                "limit": self.memory,
                "reservation": self.memory_reservation,
                "swap": self.memory_swap,
            },
            "cpu": {
                "shares": self.cpu_share,
                "quota": self.cpu_quota,
                "burst": self.cpu_burst,
                "period": self.cpu_period,
                "realtimeRuntime": self.cpu_rt_runtime,
                "realtimePeriod": self.cpu_rt_period,
                "cpus": self.cpuset_cpus,
                "mems": self.cpuset_mems,
                "idle": self.cpu_idle,
            },
            "pids": {"limit": self.pids_limit},
            "blockIO": {"weight": self.blkio_weight},
        }))?)
    }
}

/// Reads a file, or standard input, as far as a document may go.
fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let limit = document::MAX_DOCUMENT;
    if path == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_string(&mut text)?;
    } else {
        std::fs::File::open(path)?.take(limit).read_to_string(&mut text)?;
    }
    Ok(text)
}

/// Bytes as runc's options have them: a number, which may have a fraction and a binary unit.
fn parse_bytes(text: &str) -> Result<i64, String> {
    let malformed = || format!("{text:?} is no size: use bytes, or a unit as in 512m");
    if text == "-1" {
        return Ok(-1);
    }
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim_start().to_ascii_lowercase();
    let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit);
    let shift = ["", "k", "m", "g", "t", "p"].iter().position(|known| *known == unit);
    let scale = 1u64 << (10 * shift.ok_or_else(malformed)?);
    if let Ok(whole) = number.parse::<i64>() {
        let scale = i64::try_from(scale).map_err(|_| malformed())?;
        return whole.checked_mul(scale).ok_or_else(malformed);
    }
    let bytes = number.parse::<f64>().map_err(|_| malformed())? * scale as f64;
    if bytes < i64::MAX as f64 { Ok(bytes as i64) } else { Err(malformed()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_bytes_or_have_a_unit() {
        for (text, bytes) in [
            ("1048576", 1 << 20),
            ("512m", 512 << 20),
            ("1.5G", 3 << 29),
            ("2GiB", 2 << 30),
            ("7kb", 7 << 10),
            ("0", 0),
            ("-1", -1),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "m", "-2", "1x", "1.2.3m", "9999999999p", "1 2"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_size_or_an_error(text in ".{0,20}") {
            if let Ok(bytes) = parse_bytes(&text) {
                prop_assert!(bytes >= -1);
            }
        }
    }
}
