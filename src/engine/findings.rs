//! What the self-test guests said, parsed.
//!
//! The lines come from a process that ran guest code, so nothing is taken for granted: a line that
//! isn't understood, or one too few, is an error.

/// What a whole self-test found.
#[derive(Debug, PartialEq, Eq)]
pub struct Findings {
    /// The first check of the ring transitions that failed, with its reason.
    pub failed_transition: Option<String>,
    /// How many instructions ring 0 executes in a second.
    pub ring0_per_second: u64,
}

/// The last check of the ring transitions: when it is there nothing was left out.
const LAST_TRANSITION: &str = "syscall";

/// Reads the lines of the guest that crosses rings; gives the first check that failed.
///
/// # Errors
/// The guest said something else, or not all.
pub fn transitions(text: &str) -> Result<Option<String>, String> {
    let mut failed = None;
    let mut last = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("ok ") {
            last = name;
        } else if let Some(failure) = line.strip_prefix("FAIL ") {
            last = failure.split_once(':').map_or(failure, |(name, _)| name);
            failed.get_or_insert_with(|| failure.to_owned());
        } else {
            return Err(format!("the guest said {line:?}"));
        }
    }
    // A guest that gave up early said why.
    match last == LAST_TRANSITION || failed.is_some() {
        true => Ok(failed),
        false => Err(format!("the guest stopped after {last:?}")),
    }
}

/// Reads the lines of the guest that measures; gives how many instructions ring 0 executes in a
/// second when the time stamp counter counts `tsc_hz` times in it.
///
/// # Errors
/// The guest said something else.
pub fn ring0_per_second(text: &str, tsc_hz: u64) -> Result<u64, String> {
    let line = text.lines().find_map(|line| line.strip_prefix("ring0 "));
    let line = line.ok_or_else(|| format!("the guest said {text:?}"))?;
    let number = |key: &str| {
        let words = line.split_ascii_whitespace();
        let value = words.filter_map(|word| word.split_once('=')).find(|(name, _)| *name == key);
        value.and_then(|(_, value)| value.parse::<u64>().ok())
    };
    let rate = match (number("instructions"), number("ticks")) {
        (Some(instructions), Some(ticks @ 1..)) => {
            u128::from(instructions) * u128::from(tsc_hz) / u128::from(ticks)
        }
        _ => return Err(format!("the guest said {line:?}")),
    };
    Ok(u64::try_from(rate).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_ok_is_no_failure() {
        assert_eq!(transitions("ok divide error\nok syscall\n"), Ok(None));
    }

    #[test]
    fn the_first_failure_is_given() {
        let text = "ok a\nFAIL b: vector 3\nFAIL syscall: vector 14\n";
        assert_eq!(transitions(text), Ok(Some("b: vector 3".to_owned())));
    }

    #[test]
    fn a_guest_that_stops_early_is_no_success() {
        assert!(transitions("ok divide error\n").is_err());
        assert!(transitions("").is_err());
        assert!(transitions("ok syscall\nsegfault\n").is_err());
    }

    #[test]
    fn speed_is_instructions_over_time() {
        let text = "ring0 instructions=3000 ticks=2000\nring3 instructions=1 ticks=1\n";
        assert_eq!(ring0_per_second(text, 1_000_000_000), Ok(1_500_000_000));
        assert!(ring0_per_second("ring0 instructions=3000 ticks=0\n", 1).is_err());
        assert!(ring0_per_second("ring3 instructions=3000 ticks=1\n", 1).is_err());
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in "\\PC*", hz: u64) {
            let _ = transitions(&text);
            let _ = ring0_per_second(&text, hz);
            let _ = ring0_per_second(&format!("ring0 instructions={hz} ticks=1 {text}"), hz);
        }
    }
}
