//! The guest's clock follows the host's when that jumps. A guest's alone is set here.

use kiln_protocol::ToAgent;

use crate::booted;
use crate::guest::{Guest, shell, shell_process};

/// What the clock shows in the container, in seconds since 1970.
fn date(guest: &mut Guest) -> i64 {
    let outcome = guest.exec(&shell_process("date +%s")).expect("runs");
    outcome.stdout.trim().parse().expect("a number")
}

#[test]
fn a_container_sees_what_the_host_says() {
    if !booted::is_guest() {
        return booted::passes("clock::a_container_sees_what_the_host_says");
    }
    let mut guest = Guest::start();
    guest.run_on(&shell("sleep 1000"));
    // On and back: a host that slept for ten years, and one whose clock was wrong by that.
    for seconds in [2_000_000_000, 1_700_000_000] {
        guest.send(&ToAgent::SetClock { unix_time_ns: seconds * 1_000_000_000 });
        let shown = date(&mut guest);
        assert!((seconds..seconds + 3600).contains(&shown), "{shown}");
    }
    // What can't be is told on the console, and the agent goes on.
    guest.send(&ToAgent::SetClock { unix_time_ns: i64::MIN });
    assert!((1_700_000_000..1_700_003_600).contains(&date(&mut guest)));
    guest.kill();
}
