//! What the self-test's findings mean.

use serde::{Deserialize, Serialize};

use super::findings::Findings;

/// Below this many instructions a second in ring 0 a Linux kernel does not boot in bearable time:
/// it needs some 500 million. Processors with virtualisation execute a thousand million and more,
/// KVM that emulates ring 0 a few million.
const SLOWEST_RING0: u64 = 30_000_000;

/// Whether a host's KVM can run a Linux guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Verdict {
    /// It can.
    RunsLinux {
        /// Instructions that ring 0 executes in a second.
        ring0_per_second: u64,
    },
    /// It can't.
    CannotRunLinux {
        /// Why: a clause without a full stop.
        reason: String,
    },
}

/// Judges what was found.
pub fn judge(findings: &Findings) -> Verdict {
    let mut reasons = Vec::new();
    if let Some(failed) = &findings.failed_transition {
        reasons.push(match failed.strip_prefix("syscall: ") {
            Some(why) => {
                format!("SYSCALL in the guest's user mode does not reach its kernel ({why})")
            }
            None => format!("the guest's user mode is not interrupted as it should be ({failed})"),
        });
    }
    if findings.ring0_per_second < SLOWEST_RING0 {
        reasons.push(format!(
            "kernel mode is emulated in software at {:.1} million instructions a second, it takes \
             {} million",
            findings.ring0_per_second as f64 / 1e6,
            SLOWEST_RING0 / 1_000_000
        ));
    }
    match reasons.is_empty() {
        true => Verdict::RunsLinux { ring0_per_second: findings.ring0_per_second },
        false => Verdict::CannotRunLinux { reason: reasons.join("; ") },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge_of(failed: Option<&str>, ring0_per_second: u64) -> Verdict {
        judge(&Findings { failed_transition: failed.map(str::to_owned), ring0_per_second })
    }

    #[test]
    fn a_processor_with_virtualisation_runs_linux() {
        let rate = 2_000_000_000;
        assert_eq!(judge_of(None, rate), Verdict::RunsLinux { ring0_per_second: rate });
    }

    #[test]
    fn each_shortcoming_is_a_reason() {
        let reason = |verdict| match verdict {
            Verdict::CannotRunLinux { reason } => reason,
            Verdict::RunsLinux { .. } => panic!("it runs"),
        };
        let slow = reason(judge_of(None, 1_400_000));
        assert!(slow.contains("1.4 million"), "{slow}");
        let broken = reason(judge_of(Some("syscall: vector 14"), 2_000_000_000));
        assert!(broken.contains("SYSCALL") && broken.contains("vector 14"), "{broken}");
        let other = reason(judge_of(Some("divide error: nothing happened"), 2_000_000_000));
        assert!(other.contains("divide error"), "{other}");
        let both = reason(judge_of(Some("syscall: vector 14"), 1_400_000));
        assert!(both.contains("SYSCALL") && both.contains("1.4 million"), "{both}");
    }
}
