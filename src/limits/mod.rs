//! A sandbox's limits, and where each comes from.
//!
//! A limit is what the first of these says that says something: a flag; an annotation of the bundle
//! (`io.kiln.deadline`, ...); the bundle's own `linux.resources`, where that has such a limit; the
//! configuration file; the default, which is none but for the machine's size
//! ([`sizing`](crate::bundle::Size)).
//!
//! `docs/resource-limits.md` says who keeps each.

mod amount;

use kiln_vmm::config::{FileLimits, RateConfig};
use serde::{Deserialize, Serialize};

pub use amount::{Bytes, Count, Span};

use crate::bundle::{self, Bundle, BundleError};
use crate::settings::Settings;

/// The annotation of a container's state that names the limit which it has reached, by its flag.
pub const REACHED: &str = "io.kiln.limit-reached";

/// Limits as one source gives them: flags, or the configuration file's `[limits]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Given {
    /// End the step once it has run this long, as in 90s, 30m or 1h30m; time in which it is paused
    /// counts
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<Span>,
    /// End the step once it, and what is executed beside it, has written more than this to standard
    /// output and error together, as in 64M
    #[arg(long, value_name = "BYTES")]
    pub output_limit: Option<Bytes>,
    /// Let the step add no more than this to its root file system and shared directories
    #[arg(long, value_name = "BYTES")]
    pub disk_limit: Option<Bytes>,
    /// Let the step read and write no more than this a second in its root file system and shared
    /// directories
    #[arg(long, value_name = "BYTES")]
    pub disk_bandwidth: Option<Bytes>,
    /// Serve no more than this many of the guest's file requests a second
    #[arg(long, value_name = "N")]
    pub iops: Option<Count>,
    /// Let each interface send and receive no more than this a second, each way
    #[arg(long, value_name = "BYTES")]
    pub network_rate: Option<Bytes>,
    /// How much each interface may catch up on at once of what it has not used of its rate [default:
    /// a twentieth of a second's]
    #[arg(long, value_name = "BYTES")]
    pub network_burst: Option<Bytes>,
}

impl Given {
    fn of_annotations(bundle: &Bundle) -> Result<Self, BundleError> {
        Ok(Self {
            deadline: bundle.setting("io.kiln.deadline")?,
            output_limit: bundle.setting("io.kiln.output-limit")?,
            disk_limit: bundle.setting("io.kiln.disk-limit")?,
            disk_bandwidth: bundle.setting("io.kiln.disk-bandwidth")?,
            iops: bundle.setting("io.kiln.iops")?,
            network_rate: bundle.setting("io.kiln.network-rate")?,
            network_burst: bundle.setting("io.kiln.network-burst")?,
        })
    }

    /// What this gives, and where it gives nothing what `next` does.
    fn or(self, next: Self) -> Self {
        Self {
            deadline: self.deadline.or(next.deadline),
            output_limit: self.output_limit.or(next.output_limit),
            disk_limit: self.disk_limit.or(next.disk_limit),
            disk_bandwidth: self.disk_bandwidth.or(next.disk_bandwidth),
            iops: self.iops.or(next.iops),
            network_rate: self.network_rate.or(next.network_rate),
            network_burst: self.network_burst.or(next.network_burst),
        }
    }
}

/// What flags say of a sandbox.
#[derive(Debug, Clone, Copy, Default)]
pub struct Flags {
    /// The machine's size.
    pub machine: bundle::Limits,
    /// Everything else.
    pub given: Given,
}

/// The limits of a sandbox beside those of `linux.resources`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The machine's size, as far as anything before the bundle's own limits decides it.
    pub machine: bundle::Limits,
    /// What the monitor keeps.
    pub step: StepLimits,
    /// What the file system process keeps.
    pub files: FileLimits,
    /// What each network device keeps, each way.
    pub network: RateConfig,
}

/// The limits of a step that its monitor keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepLimits {
    /// How long its program may run.
    pub deadline: Option<Span>,
    /// How much it may write to standard output and error together.
    pub output: Option<Bytes>,
}

impl Limits {
    /// Collects the limits of a bundle's sandbox.
    ///
    /// # Errors
    /// An annotation that is no amount.
    pub fn collect(
        flags: Flags,
        bundle: &Bundle,
        settings: &Settings,
    ) -> Result<Self, BundleError> {
        let cpus = flags.machine.cpus.or(bundle.setting("io.kiln.cpus")?);
        let memory_mib = flags.machine.memory_mib.or(bundle.setting("io.kiln.memory-mib")?);
        let given = flags.given.or(Given::of_annotations(bundle)?).or(settings.limits);
        let number = |bytes: Option<Bytes>| bytes.map(|Bytes(number)| number);
        Ok(Self {
            machine: bundle::Limits {
                cpus: cpus.or(settings.cpus),
                memory_mib: memory_mib.or(settings.memory_mib),
            },
            step: StepLimits { deadline: given.deadline, output: given.output_limit },
            files: FileLimits {
                space: number(given.disk_limit),
                bytes_per_second: number(given.disk_bandwidth),
                requests_per_second: given.iops.map(|Count(number)| number),
            },
            network: RateConfig {
                bytes_per_second: number(given.network_rate),
                burst_bytes: number(given.network_burst),
                packets_per_second: None,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn bundle(annotations: Value) -> (tempfile::TempDir, Bundle) {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::create_dir(dir.path().join("rootfs")).expect("made");
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "annotations": annotations,
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
        let bundle = Bundle::load(dir.path()).expect("valid");
        (dir, bundle)
    }

    fn span(text: &str) -> Option<Span> {
        Some(text.parse().expect("a time"))
    }

    #[test]
    fn flags_come_before_annotations_and_those_before_the_configuration_file() {
        let settings = Settings {
            limits: Given {
                deadline: span("1h"),
                output_limit: Some("1M".parse().expect("bytes")),
                ..Given::default()
            },
            cpus: Some(3),
            ..Settings::default()
        };
        let annotations = json!({"io.kiln.deadline": "2h", "io.kiln.memory-mib": "512"});
        let (_dir, bundle) = bundle(annotations);
        let given = Given { disk_limit: Some("1G".parse().expect("bytes")), ..Given::default() };
        let mut flags = Flags { given, ..Flags::default() };
        let limits = Limits::collect(flags, &bundle, &settings).expect("amounts");
        let machine = bundle::Limits { cpus: Some(3), memory_mib: Some(512) };
        assert_eq!((limits.machine, limits.step.deadline), (machine, span("2h")));
        assert_eq!(limits.step.output.map(u64::from), Some(1 << 20));
        assert_eq!(limits.files.space.map(u64::from), Some(1 << 30));
        assert_eq!(limits.network, RateConfig::default());

        flags.given.deadline = span("3h");
        flags.machine.memory_mib = Some(256);
        let limits = Limits::collect(flags, &bundle, &settings).expect("amounts");
        assert_eq!((limits.step.deadline, limits.machine.memory_mib), (span("3h"), Some(256)));
    }

    #[test]
    fn each_limit_has_an_annotation_of_its_own() {
        let (_dir, bundle) = bundle(json!({
            "io.kiln.deadline": "1", "io.kiln.output-limit": "2", "io.kiln.disk-limit": "3",
            "io.kiln.disk-bandwidth": "4", "io.kiln.iops": "5", "io.kiln.network-rate": "6",
            "io.kiln.network-burst": "7",
        }));
        let limits = Limits::collect(Flags::default(), &bundle, &Settings::default());
        let Limits { step, files, network, .. } = limits.expect("amounts");
        assert_eq!(step.deadline, span("1"));
        let found = [
            step.output.map(|Bytes(number)| number),
            files.space,
            files.bytes_per_second,
            files.requests_per_second,
            network.bytes_per_second,
            network.burst_bytes,
        ];
        assert_eq!(found.map(|number| number.map_or(0, u64::from)), [2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn every_flag_is_an_annotation_that_bundles_may_have() {
        use clap::Args;

        let flags = Given::augment_args(clap::Command::new("kiln"));
        let names = flags.get_arguments().filter_map(|flag| flag.get_long());
        let annotations: Value =
            names.map(|name| (format!("io.kiln.{name}"), json!("1"))).collect();
        assert!(annotations.as_object().is_some_and(|all| all.len() >= 7), "{annotations}");
        let (_dir, _bundle) = bundle(annotations);
        let (_dir, _bundle) = bundle(json!({REACHED: "deadline"}));
    }

    #[test]
    fn an_annotation_that_is_no_amount_is_named_with_its_value_and_the_mend() {
        for (name, value, mend) in [
            ("io.kiln.deadline", "soon", "as in 90s"),
            ("io.kiln.disk-limit", "0", "from 1 on"),
            ("io.kiln.iops", "1K", "a whole number"),
        ] {
            let (_dir, bundle) = bundle(json!({name: value}));
            let limits = Limits::collect(Flags::default(), &bundle, &Settings::default());
            let error = limits.expect_err("no amount").to_string();
            let begin = format!("annotations[{name:?}]: {value:?}: ");
            assert!(error.starts_with(&begin) && error.contains(mend), "{error}");
        }
    }
}
