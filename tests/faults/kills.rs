//! SIGKILL to whichever process of a sandbox, at any moment of whichever verb.
//!
//! `KILN_FAULT_RUNS` and `KILN_FAULT_SEED` are the number of kills and where chance begins; the seed is
//! printed. The moments are as exact as the host's scheduler, so a seed repeats the choices, not the
//! outcome to the instruction.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::from_environment;
use crate::host::{Host, marked, role};
use crate::stage::{Stage, create, errors, eventually, kiln, processes_of, succeeds};

/// Kills of a run that nobody asked to be longer, and the time after which it makes no more.
const RUNS: u64 = 10;
const LONGEST: Duration = Duration::from_secs(150);

/// How long whoever waits for something that has died may take to hear of it on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verb {
    Create,
    Start,
    Run,
    Exec,
    Kill,
    Delete,
}

const VERBS: [Verb; 6] =
    [Verb::Create, Verb::Start, Verb::Run, Verb::Exec, Verb::Kill, Verb::Delete];

/// A sequence that a seed repeats: splitmix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }
}

/// A container as far as a verb needs it.
struct Scene {
    stage: Stage,
    before: Host,
    verb: Verb,
}

impl Scene {
    fn new(verb: Verb) -> Self {
        let script = if verb == Verb::Run { "sleep 0.2; exit 3" } else { "sleep 1000" };
        let stage = marked(&["sh", "-c", script]);
        let before = Host::look(&stage);
        if !matches!(verb, Verb::Create | Verb::Run) {
            let created = create(&stage, &[]);
            assert!(created.status.success(), "{}", errors(&created));
        }
        if matches!(verb, Verb::Exec | Verb::Kill | Verb::Delete) {
            succeeds(&stage, &["start", "test"]);
        }
        Self { stage, before, verb }
    }

    /// Calls the verb. It writes to a file.
    fn call(&self) -> Child {
        let stage = &self.stage;
        let mut command: Command = match self.verb {
            Verb::Run => stage.run(&[]),
            Verb::Create => {
                let mut command = stage.kiln();
                command.args(["create", "--engine", "emulated", "--bundle"]);
                command.arg(stage.bundle()).arg("test");
                command
            }
            other => {
                let mut command = stage.kiln();
                command.args(match other {
                    Verb::Exec => &["exec", "test", "sh", "-c", "sleep 0.1; echo said"][..],
                    Verb::Kill => &["kill", "test", "KILL"],
                    Verb::Delete => &["delete", "--force", "test"],
                    _ => &["start", "test"],
                });
                command
            }
        };
        let file = |name| fs::File::create(stage.path().join(name)).expect("file");
        command.stdin(Stdio::null()).stdout(file("said")).stderr(file("errors"));
        command.spawn().expect("kiln")
    }

    /// What the container is by `kiln state`, once that is no passing state; `None` if there is none.
    fn settled(&self) -> Option<String> {
        let mut status = None;
        eventually("a state that lasts", || {
            let output = kiln(&self.stage, &["state", "test"]);
            if !output.status.success() {
                let errors = errors(&output);
                let known = ["does not exist", "holds no container yet"];
                assert!(known.iter().any(|words| errors.contains(words)), "{errors}");
                status = None;
                return true;
            }
            let state: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            let said = state["status"].as_str().expect("a status").to_owned();
            // A pid that is no monitor's may be that of one which has just ended: then that is what is
            // said next.
            let pid = state["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
            let lasts = match said.as_str() {
                "stopped" => true,
                "creating" => false,
                _ => role(pid.expect("a pid")) == "monitor",
            };
            status = Some(said);
            lasts
        });
        status
    }
}

/// Waits for a child's end.
fn end_of(child: &mut Child) -> ExitStatus {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child") {
            return status;
        }
        assert!(begin.elapsed() < PATIENCE, "the caller still waits");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What one kill showed.
struct Strike {
    victim: &'static str,
    caller_waited: Duration,
    delete_took: Duration,
}

/// Calls a verb, kills one of the stage's processes after a while, and checks what is promised. `None`
/// if by then there was no process any more.
fn strike(verb: Verb, after: Duration, chance: &mut Chance) -> Option<Strike> {
    let scene = Scene::new(verb);
    let stage = &scene.stage;
    let mut call = scene.call();
    std::thread::sleep(after);
    let present = processes_of(stage);
    let pick = chance.below(present.len() as u64) as usize;
    let own = i32::try_from(call.id()).expect("a pid");
    let victim = present.get(pick).map(|pid| (*pid, role(*pid)));
    let begin = Instant::now();
    if let Some((pid, _)) = victim {
        // It may end by itself at this moment.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let status = end_of(&mut call);
    let caller_waited = begin.elapsed();
    let said = fs::read_to_string(stage.path().join("errors")).expect("errors");
    match (victim, status.code()) {
        (Some((pid, _)), None) if pid == own => assert_eq!(status.signal(), Some(9)),
        (_, Some(0)) => {}
        (_, Some(3)) if verb == Verb::Run => {}
        // As for runc: the program was killed.
        (_, Some(137)) if verb == Verb::Exec => {}
        (_, Some(_)) => assert!(said.contains("kiln: "), "{status}, and no word of why: {said:?}"),
        (_, None) => panic!("the caller ended by {status}: {said}"),
    }

    let victim = victim.map(|(pid, role)| (pid, role, pid == own));
    let is_machine = matches!(victim, Some((_, "monitor" | "file system" | "devices" | "QEMU", _)));
    if is_machine {
        let ended = |status: Option<String>| status.is_none_or(|status| status == "stopped");
        eventually("the sandbox's end", || ended(scene.settled()));
    }
    let settled = scene.settled();
    let own_is_spared = matches!(victim, Some((_, "exec proxy" | "command", _)) | None);
    if own_is_spared && verb == Verb::Exec {
        assert_eq!(settled.as_deref(), Some("running"), "the container has nothing to do with it");
    }
    assert!(kiln(stage, &["list", "--quiet"]).status.success());
    let begin = Instant::now();
    let deleted = kiln(stage, &["delete", "--force", "test"]);
    let delete_took = begin.elapsed();
    assert!(deleted.status.success(), "delete --force: {}", errors(&deleted));
    assert!(!kiln(stage, &["state", "test"]).status.success());
    scene.before.is_as_before(stage);
    let (_, victim, _) = victim?;
    Some(Strike { victim, caller_waited, delete_took })
}

/// How long a verb takes if nobody dies.
fn usual(verb: Verb) -> Duration {
    let scene = Scene::new(verb);
    let begin = Instant::now();
    let status = end_of(&mut scene.call());
    let took = begin.elapsed();
    assert!(status.success() || verb == Verb::Run && status.code() == Some(3), "{status}");
    succeeds(&scene.stage, &["delete", "--force", "test"]);
    took
}

#[test]
fn any_process_may_die_at_any_moment() {
    let asked = from_environment("KILN_FAULT_RUNS");
    let seed = from_environment("KILN_FAULT_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |now| now.subsec_nanos().into())
    });
    println!("KILN_FAULT_SEED={seed}");
    let mut chance = Chance(seed);
    let mut known = BTreeMap::new();
    let mut table: BTreeMap<&str, BTreeMap<Verb, u32>> = BTreeMap::new();
    let (mut kills, mut caller, mut delete) = (0, Duration::ZERO, Duration::ZERO);
    let begin = Instant::now();
    let mut round = chance.below(VERBS.len() as u64) as usize;
    while kills < asked.unwrap_or(RUNS) && (asked.is_some() || begin.elapsed() < LONGEST) {
        let verb = VERBS[round % VERBS.len()];
        round += 1;
        let usual = *known.entry(verb).or_insert_with(|| usual(verb));
        let after = Duration::from_micros(chance.below(usual.as_micros() as u64 * 5 / 4));
        println!("{kills}: {verb:?}, after {after:?} of about {usual:?}");
        let Some(strike) = strike(verb, after, &mut chance) else { continue };
        println!(
            "   {} killed: the caller knew after {:?}, delete --force took {:?}",
            strike.victim, strike.caller_waited, strike.delete_took
        );
        kills += 1;
        *table.entry(strike.victim).or_default().entry(verb).or_default() += 1;
        caller = caller.max(strike.caller_waited);
        delete = delete.max(strike.delete_took);
    }
    assert!(kills > 0, "nothing was killed");
    show(&table);
    println!("\n{kills} kills; longest wait of a caller {caller:?}, of delete --force {delete:?}");
}

fn show(table: &BTreeMap<&str, BTreeMap<Verb, u32>>) {
    println!("\n| killed | {} | all |", VERBS.map(|verb| format!("{verb:?}")).join(" | "));
    println!("|{}", " --- |".repeat(VERBS.len() + 2));
    for (victim, verbs) in table {
        let counts = VERBS.map(|verb| verbs.get(&verb).copied().unwrap_or(0));
        let shown = counts.map(|count| count.to_string()).join(" | ");
        println!("| {victim} | {shown} | {} |", counts.iter().sum::<u32>());
    }
}
