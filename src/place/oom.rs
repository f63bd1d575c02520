//! The score by which the host's OOM killer chooses, proc_pid_oom_score_adj(5).

use std::fs;
use std::io;

use anyhow::Context;

const SCORE: &str = "/proc/self/oom_score_adj";

/// Gives the calling process, and all that it starts, the score. A lower one than the caller's that
/// the caller has no right to is left out, with a warning: inside of its guest the step has it all the
/// same.
///
/// # Errors
/// It isn't between -1000 and 1000.
pub fn take_score(score: i32) -> anyhow::Result<()> {
    match fs::write(SCORE, score.to_string()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!("process.oomScoreAdj: no right to lower it to {score} on the host");
            Ok(())
        }
        result => result.with_context(|| format!("process.oomScoreAdj: {score}")),
    }
}
