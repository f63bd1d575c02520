//! Every input that was kept is survived: those that reach something that others don't, and those
//! that once found a fault.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::Read;
use std::path::Path;

fn replay(name: &str) {
    let target = kiln_fuzz::target(name).unwrap();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(format!("{name}.tar"));
    let mut archive = tar::Archive::new(File::open(corpus).unwrap());
    let mut count = 0;
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut input = Vec::new();
        entry.read_to_end(&mut input).unwrap();
        eprintln!("{name}: {}", entry.path().unwrap().display());
        target(&input);
        count += 1;
    }
    assert!(count > 0, "{name} has no corpus");
}

macro_rules! replayed {
    ($($test:ident: $name:literal,)*) => {
        $(#[test] fn $test() { replay($name); })*

        #[test]
        fn every_target_is_replayed() {
            let replayed = [$($name),*];
            for (name, _) in kiln_fuzz::TARGETS {
                assert!(replayed.contains(&name), "{name}");
            }
        }
    };
}

replayed! {
    balloon: "balloon",
    block: "block",
    console: "console",
    network: "network",
    rng: "rng",
    vsock: "vsock",
    file_system: "file-system",
    kernel: "kernel",
    from_agent: "from-agent",
    to_agent: "to-agent",
    bundle: "bundle",
    process: "process",
    guest_spec: "guest-spec",
}
