//! What starting kiln's machine costs: `cargo bench --bench start`.
//!
//! * wall time: `kiln vm run` of a guest that switches off with its first instructions, paired with
//!   the floor (`benches/floor`), the least that a program can do to run the same guest; the median
//!   of the pairs' ratios. Either goes first in every second pair, for each is measured in what the
//!   other leaves behind in the kernel.
//! * CPU time until the guest's first instruction: of all of kiln's processes, at the moment when a
//!   guest's first instructions have written a character to the serial port.
//! * memory: the proportional set size of all of kiln's processes while that guest waits, half a
//!   second later, when they have given back what the start needed; without the guest's own memory.
//!
//! Times are of this machine as it is; run it on an idle one.

use std::fs;
use std::io::{self, Read};
use std::iter::Sum;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kiln_selftest_guests::{Guest, IDLE, SHUTDOWN};

const KILN: &str = env!("CARGO_BIN_EXE_kiln");
const FLOOR: &str = "kiln-bench-floor";
const PAIRS: usize = 200;
const STARTS: usize = 50;
const SETTLED: usize = 10;
const SETTLING: Duration = Duration::from_millis(500);
const MEMORY_MIB: u64 = 128;

const CPU_LIMIT_MS: f64 = 5.0;
const RATIO_LIMIT: f64 = 1.35;
const MEMORY_LIMIT_MIB: f64 = 4.0;

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let [shutdown, idle] = [SHUTDOWN, IDLE].map(|guest| write(folder.path(), guest));
    let (shutdown, idle) = (shutdown?, idle?);
    let floor = build_floor()?;

    let walls = walls(&floor, &shutdown)?;
    let cpu = (0..STARTS).map(|_| started(&idle, cpu_time)).collect::<Result<Vec<_>>>()?;
    let cpu = median(cpu.into_iter().map(|time| time.as_secs_f64() * 1e3));
    let pss_later = |pid| {
        std::thread::sleep(SETTLING);
        pss_beyond_guest(pid)
    };
    let memory = (0..SETTLED).map(|_| started(&idle, pss_later)).collect::<Result<Vec<_>>>()?;
    let memory = median(memory.into_iter().map(|kib| kib as f64 / 1024.0));
    let ratio = median(walls.iter().map(|(kiln, floor)| kiln / floor));

    println!("{:44} {:>10} {:>10}", "start of the kvm engine", "measured", "limit");
    row("CPU until the guest's first instruction, ms", cpu, CPU_LIMIT_MS);
    row("wall time, start to exit, of the floor's", ratio, RATIO_LIMIT);
    row("memory beyond the guest's, MiB", memory, MEMORY_LIMIT_MIB);
    println!(
        "wall time, median of {PAIRS}: kiln {:.2} ms, floor {:.2} ms",
        median(walls.iter().map(|(kiln, _)| kiln * 1e3)),
        median(walls.iter().map(|(_, floor)| floor * 1e3)),
    );
    Ok(())
}

fn row(what: &str, measured: f64, limit: f64) {
    let verdict = if measured <= limit { "met" } else { "NOT MET" };
    println!("{what:44} {measured:>10.2} {limit:>10.2}  {verdict}");
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[length / 2],
        length => f64::midpoint(values[length / 2 - 1], values[length / 2]),
    }
}

fn write(folder: &Path, guest: Guest) -> Result<PathBuf> {
    let path = folder.join(guest.name);
    fs::write(&path, guest.image)?;
    Ok(path)
}

/// Builds the floor, which is another package's binary, beside kiln's.
fn build_floor() -> Result<PathBuf> {
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--profile", profile, "--package", FLOOR])
        .status()
        .context("cargo")?;
    ensure!(status.success(), "the floor does not build");
    let folder = Path::new(KILN).parent().context("kiln's folder")?;
    Ok(folder.join(FLOOR))
}

fn kiln(guest: &Path) -> Command {
    let mut command = Command::new(KILN);
    command.args(["vm", "run", "--engine", "kvm", "--memory", &MEMORY_MIB.to_string()]);
    command.arg("--kernel").arg(guest).stdin(Stdio::null());
    command
}

/// The seconds that kiln and the floor take for the same guest, in pairs.
fn walls(floor: &Path, guest: &Path) -> Result<Vec<(f64, f64)>> {
    let mut pairs = Vec::with_capacity(PAIRS);
    for index in 0..=PAIRS {
        let ours = || time(kiln(guest));
        let theirs = || time(floor_command(floor, guest));
        let pair = if index.is_multiple_of(2) {
            let ours = ours()?;
            (ours, theirs()?)
        } else {
            let theirs = theirs()?;
            (ours()?, theirs)
        };
        // The first pair warms the caches.
        if index > 0 {
            pairs.push(pair);
        }
    }
    Ok(pairs)
}

fn floor_command(floor: &Path, guest: &Path) -> Command {
    let mut command = Command::new(floor);
    command.arg(guest).stdin(Stdio::null());
    command
}

fn time(mut command: Command) -> Result<f64> {
    let start = Instant::now();
    let status = command.status()?;
    let wall = start.elapsed();
    ensure!(status.success(), "{command:?}: {status}");
    Ok(wall.as_secs_f64())
}

/// The sum of what `figure` finds of each of kiln's processes, from the moment on when the guest's
/// first instructions have written a character.
fn started<T: Sum>(guest: &Path, figure: impl Fn(u32) -> Result<T>) -> Result<T> {
    let mut child = kiln(guest).stdout(Stdio::piped()).spawn()?;
    let measured = measure(&mut child, figure);
    child.kill()?;
    child.wait()?;
    measured
}

fn measure<T: Sum>(child: &mut Child, figure: impl Fn(u32) -> Result<T>) -> Result<T> {
    let mut character = [0];
    let output = child.stdout.as_mut().context("standard output")?;
    output.read_exact(&mut character).context("the guest says nothing")?;
    family(child.id())?.into_iter().map(figure).sum()
}

/// A process and all that descend from it.
fn family(pid: u32) -> Result<Vec<u32>> {
    let mut pids = vec![pid];
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(other) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        match parent(other) {
            Ok(parent) if pids.contains(&parent) => pids.push(other),
            // It isn't one of ours, or has ended.
            _ => {}
        }
    }
    Ok(pids)
}

fn parent(pid: u32) -> Result<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in brackets, may hold anything.
    let rest = stat.rsplit_once(')').context("stat")?.1;
    Ok(rest.split_ascii_whitespace().nth(1).context("stat")?.parse()?)
}

/// The CPU time of all threads of a process, those that have ended included.
fn cpu_time(pid: u32) -> Result<Duration> {
    let mut clock = 0;
    // SAFETY: the call writes the clock's number.
    let error = unsafe { libc::clock_getcpuclockid(pid.try_into()?, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error)).context("CPU clock");
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes the time.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error()).context("CPU clock");
    }
    Ok(Duration::new(time.tv_sec.try_into()?, time.tv_nsec.try_into()?))
}

/// The sum of `Pss` of a process's mappings in KiB, without the guest's memory.
fn pss_beyond_guest(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&path).context(path)?;
    let (mut sum, mut is_guest) = (0, false);
    for line in smaps.lines() {
        match line.split_ascii_whitespace().collect::<Vec<_>>()[..] {
            ["Pss:", size, "kB"] if !is_guest => sum += size.parse::<u64>()?,
            [field, ..] if field.ends_with(':') => {}
            _ => is_guest = line.contains("memfd:kiln-guest-memory"),
        }
    }
    ensure!(sum > 0, "process {pid} has no memory");
    Ok(sum)
}
