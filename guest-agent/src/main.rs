//! PID 1 of a kiln guest.

use std::path::PathBuf;

use anyhow::Context;
use kiln_agent::cgroup::Hierarchy;
use kiln_agent::console::say;
use kiln_agent::guest::{boot, clock, power};
use kiln_agent::server::{Agent, Ending, Environment};
use kiln_agent::stream;
use kiln_protocol::{CONTROL_PORT, STREAM_PORT};

fn main() {
    if std::process::id() != 1 {
        if std::env::args().nth(1).as_deref() == Some("--version") {
            println!("kiln-agent {}", env!("CARGO_PKG_VERSION"));
            return;
        }
        eprintln!("kiln-agent {} runs as PID 1 of a kiln guest", env!("CARGO_PKG_VERSION"));
        std::process::exit(1);
    }
    match serve() {
        Ok(Ending::Shutdown) => say(format_args!("shutting down")),
        Ok(Ending::Disconnected(why)) => say(format_args!("lost the host: {why}")),
        Err(error) => say(format_args!("cannot go on: {error:#}")),
    }
    power::end();
}

fn serve() -> anyhow::Result<Ending> {
    say(format_args!("version {}", env!("CARGO_PKG_VERSION")));
    boot::run()?;
    let hierarchy = Hierarchy::at(PathBuf::from(boot::CGROUP));
    hierarchy.settle_agent().context("settle into a cgroup")?;
    let listener = stream::listen(STREAM_PORT).context("listen for streams")?;
    let control = stream::connect_to_host(CONTROL_PORT).context("connect to the host")?;
    say(format_args!("connected to the host"));
    let environment = Environment {
        share: boot::SHARE.into(),
        mount_point: boot::ROOTFS.into(),
        devices: boot::DEVICES.into(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        set_clock,
        credit_entropy,
    };
    let agent = Agent::new(environment, hierarchy, control, listener)?;
    Ok(agent.run())
}

fn set_clock(unix_time_ns: i64) {
    if let Err(error) = clock::set(unix_time_ns) {
        say(format_args!("set the clock: {error}"));
    }
}

fn credit_entropy(entropy: [u8; 32]) {
    if let Err(error) = clock::credit_entropy(entropy) {
        say(format_args!("credit entropy: {error}"));
    }
}
