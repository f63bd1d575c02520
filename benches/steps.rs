//! Figures of whole steps under the emulated engine, each against a second command of the same run.
//!
//! * **start**: `kiln run` of `/bin/true` against bare QEMU that boots the same kernel into an init
//!   that does nothing but end the machine. Limit 1.5.
//! * **stdio**: a step that writes 1 GiB to its standard output, through kiln, against the same
//!   program writing into a pipe inside the same guest. Limit 2.0 (half as fast).
//! * **leaks**: what 50 sandboxes in a row leave behind. Limit nothing.
//!
//! Needs root, QEMU, busybox (static), gcc and the artefacts in `KILN_LIB_DIR`.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const START_PAIRS: usize = 7;
const STDIO_PAIRS: usize = 3;
const STDIO_MIB: usize = 1024;
const SANDBOXES: usize = 50;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let stage = Stage::new(scratch.path())?;
    let start = start(&stage)?;
    let stdio = stdio(&stage)?;
    let leaks = leaks(&stage)?;
    let met = start & stdio & leaks;
    println!("\n{}", if met { "all limits are met" } else { "a limit is NOT met" });
    Ok(())
}

/// Everything that the figures share: the binaries and a bundle on a busybox root file system.
struct Stage {
    kiln: PathBuf,
    kernel: PathBuf,
    scratch: PathBuf,
}

impl Stage {
    fn new(scratch: &Path) -> Result<Self> {
        let lib = std::env::var_os("KILN_LIB_DIR").ok_or("KILN_LIB_DIR is not set: make bench")?;
        let stage = Self {
            kiln: PathBuf::from(env!("CARGO_BIN_EXE_kiln")),
            kernel: Path::new(&lib).join("vmlinux"),
            scratch: scratch.to_owned(),
        };
        let rootfs = scratch.join("bundle/rootfs");
        for directory in ["bin", "proc", "sys", "dev", "tmp"] {
            fs::create_dir_all(rootfs.join(directory))?;
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox"))?;
        for applet in ["sh", "true", "dd", "cat"] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet))?;
        }
        checked(Command::new(&stage.kiln).arg("spec").current_dir(scratch.join("bundle")))?;
        Ok(stage)
    }

    /// A bundle's config.json that runs `script` in the shell.
    fn write_config(&self, script: &str) -> Result<()> {
        let path = self.scratch.join("bundle/config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = vec!["/bin/sh", "-c", script].into();
        config["root"]["readonly"] = false.into();
        fs::write(path, serde_json::to_vec(&config)?)?;
        Ok(())
    }

    fn run(&self, id: &str) -> Command {
        let mut command = Command::new(&self.kiln);
        command.arg("--root").arg(self.scratch.join("state"));
        command.args(["run", "--engine", "emulated", "--bundle"]);
        command.arg(self.scratch.join("bundle")).arg(id);
        command
    }
}

fn start(stage: &Stage) -> Result<bool> {
    stage.write_config("exit 0")?;
    let initrd = trivial_initrd(&stage.scratch)?;
    let bare = || {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "2048", "-smp", "2"])
            .args(["-M", "microvm,rtc=off,acpi=off", "-nodefaults", "-no-user-config"])
            .args(["-nographic", "-serial", "stdio", "-no-reboot", "-kernel"])
            .arg(&stage.kernel)
            .arg("-initrd")
            .arg(&initrd)
            .args(["-append", "console=ttyS0 panic=-1 reboot=t quiet"]);
        qemu
    };
    let mut pairs = Vec::new();
    for round in 0..=START_PAIRS {
        let ours = timed(stage.run(&format!("bench-start-{round}")))?;
        let theirs = timed(bare())?;
        if round > 0 {
            pairs.push((ours, theirs));
        }
    }
    Ok(report("start: kiln run true / bare QEMU", &pairs, 1.5))
}

fn stdio(stage: &Stage) -> Result<bool> {
    let write = format!("dd if=/dev/zero bs=64k count={} 2>/dev/null", STDIO_MIB * 16);
    // The step tells on stderr how long the writing took, by the guest's clock: boot is left out.
    let clocked = |body: &str| {
        format!("read a _ </proc/uptime; {body}; read b _ </proc/uptime; echo $a $b >&2")
    };
    let mut pairs = Vec::new();
    for round in 0..STDIO_PAIRS {
        stage.write_config(&clocked(&write))?;
        let through = guest_clock(stage.run(&format!("bench-out-{round}")), STDIO_MIB << 20)?;
        stage.write_config(&clocked(&format!("{write} | cat >/dev/null")))?;
        let inside = guest_clock(stage.run(&format!("bench-pipe-{round}")), 0)?;
        pairs.push((through, inside));
    }
    Ok(report("stdio: 1 GiB to stdout / into a pipe in the guest", &pairs, 2.0))
}

fn leaks(stage: &Stage) -> Result<bool> {
    stage.write_config("exit 0")?;
    checked(&mut stage.run("bench-leak-warm-up"))?;
    let before = Host::look(stage)?;
    for round in 0..SANDBOXES {
        checked(&mut stage.run(&format!("bench-leak-{round}")))?;
    }
    // Namespaces and memory are given back by the kernel's own workers, shortly after.
    let mut after = Host::look(stage)?;
    for _ in 0..50 {
        if after.holds_no_more_than(&before) {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        after = Host::look(stage)?;
    }
    println!("\nleaks: {SANDBOXES} sandboxes, before and after");
    println!("  {before:?}\n  {after:?}");
    let clean = after.holds_no_more_than(&before);
    println!("  {}", if clean { "nothing left behind: met" } else { "NOT met" });
    Ok(clean)
}

/// What a sandbox could leave behind, counted.
#[derive(Debug)]
struct Host {
    processes: usize,
    mounts: usize,
    unix_sockets: usize,
    state_files: usize,
    cgroups: usize,
    namespaces: usize,
    memory_mib: u64,
}

impl Host {
    /// Nothing has come to it since `before`. Others on the host may have tidied up meanwhile.
    fn holds_no_more_than(&self, before: &Self) -> bool {
        let counts = |host: &Self| {
            [
                host.processes,
                host.mounts,
                host.unix_sockets,
                host.state_files,
                host.cgroups,
                host.namespaces,
            ]
        };
        // Page cache and slabs move by themselves; 50 leaked guests would be gigabytes.
        let memory_returned = self.memory_mib + 64 >= before.memory_mib;
        memory_returned && counts(self).iter().zip(counts(before)).all(|(now, then)| *now <= then)
    }

    fn look(stage: &Stage) -> Result<Self> {
        let memory = fs::read_to_string("/proc/meminfo")?;
        let available = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"))
            .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok())
            .ok_or("no MemAvailable in /proc/meminfo")?;
        let processes = kiln_processes(&stage.kiln)?;
        Ok(Self {
            processes,
            mounts: fs::read_to_string("/proc/self/mountinfo")?.lines().count(),
            unix_sockets: kiln_sockets(&stage.scratch)?,
            state_files: walk(&stage.scratch.join("state")),
            cgroups: directories(Path::new("/sys/fs/cgroup")),
            namespaces: namespaces()?,
            memory_mib: available >> 10,
        })
    }
}

/// Processes that run this very binary, or QEMU with one of its kernels.
fn kiln_processes(kiln: &Path) -> Result<usize> {
    let kiln = fs::canonicalize(kiln)?;
    let mut count = 0;
    for entry in fs::read_dir("/proc")?.flatten() {
        let executable = fs::read_link(entry.path().join("exe")).unwrap_or_default();
        count += usize::from(executable == kiln);
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let qemu = executable.ends_with("qemu-system-x86_64");
        count += usize::from(qemu && String::from_utf8_lossy(&line).contains("bench-"));
    }
    Ok(count)
}

/// Unix sockets bound to a path of ours.
fn kiln_sockets(scratch: &Path) -> Result<usize> {
    let scratch = scratch.to_string_lossy().into_owned();
    Ok(fs::read_to_string("/proc/net/unix")?.lines().filter(|l| l.contains(&scratch)).count())
}

fn walk(directory: &Path) -> usize {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    entries.flatten().map(|entry| 1 + walk(&entry.path())).sum()
}

fn directories(path: &Path) -> usize {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| 1 + directories(&entry.path()))
        .sum()
}

/// Distinct namespaces of all processes.
fn namespaces() -> Result<usize> {
    let mut seen = std::collections::BTreeSet::new();
    for process in fs::read_dir("/proc")?.flatten() {
        let Ok(links) = fs::read_dir(process.path().join("ns")) else { continue };
        seen.extend(links.flatten().filter_map(|link| fs::read_link(link.path()).ok()));
    }
    Ok(seen.len())
}

/// An initial RAM disk whose init ends the machine at once.
fn trivial_initrd(scratch: &Path) -> Result<PathBuf> {
    let directory = scratch.join("initrd");
    fs::create_dir(&directory)?;
    let source = directory.join("init.c");
    fs::write(
        &source,
        "#include <sys/reboot.h>\nint main(void) { return reboot(RB_AUTOBOOT); }\n",
    )?;
    checked(
        Command::new("gcc")
            .args(["-O2", "-static", "-s", "-o"])
            .arg(directory.join("init"))
            .arg(source),
    )?;
    let archive = scratch.join("initrd.cpio");
    checked(
        Command::new("sh")
            .args(["-c", "cd \"$0\" && echo init | cpio --quiet -o -H newc >\"$1\""])
            .arg(&directory)
            .arg(&archive),
    )?;
    Ok(archive)
}

fn checked(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{command:?} ended with {}: {errors}", output.status).into())
}

fn timed(mut command: Command) -> Result<Duration> {
    let begin = Instant::now();
    checked(&mut command)?;
    Ok(begin.elapsed())
}

/// Runs a step, reads all of its output, which must be `expected` bytes long, and gives the time
/// between the two readings of the guest's clock on its standard error.
fn guest_clock(mut command: Command, expected: usize) -> Result<Duration> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdout = child.stdout.take().ok_or("no stdout")?;
    let received = io::copy(&mut stdout, &mut io::sink())?;
    let mut text = String::new();
    child.stderr.take().ok_or("no stderr")?.read_to_string(&mut text)?;
    if !child.wait()?.success() || received != expected as u64 {
        return Err(format!("{received} of {expected} bytes came: {text}").into());
    }
    let clock = text.lines().last().unwrap_or_default();
    let mut readings = clock.split(' ').map(str::parse::<f64>);
    match (readings.next(), readings.next()) {
        (Some(Ok(begin)), Some(Ok(end))) => Ok(Duration::from_secs_f64(end - begin)),
        _ => Err(format!("no clock in the step's output: {text}").into()),
    }
}

/// Prints both commands' medians and the median of the ratios pair by pair.
fn report(name: &str, pairs: &[(Duration, Duration)], limit: f64) -> bool {
    let seconds = |pick: fn(&(Duration, Duration)) -> f64| median(pairs.iter().map(pick).collect());
    let ours = seconds(|pair| pair.0.as_secs_f64());
    let theirs = seconds(|pair| pair.1.as_secs_f64());
    let ratio = seconds(|pair| pair.0.as_secs_f64() / pair.1.as_secs_f64());
    let verdict = if ratio <= limit { "met" } else { "NOT met" };
    println!("\n{name}: {} pairs", pairs.len());
    println!(
        "  median {ours:.3} s against {theirs:.3} s, ratio {ratio:.2}, limit {limit}: {verdict}"
    );
    ratio <= limit
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
