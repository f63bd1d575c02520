//! Signals as callers name them.

use nix::sys::signal::Signal;

/// The first real-time signal that programs may use: glibc keeps the two before for itself.
const FIRST_REAL_TIME: i32 = 34;
/// The last signal.
const LAST: i32 = 64;

/// A signal's number from a number of 1 to 64, a name with or without `SIG` in any case, or
/// `RTMIN+n` and `RTMAX-n`.
///
/// # Errors
/// There is no such signal.
pub fn parse(text: &str) -> Result<i32, String> {
    let unknown =
        || format!("unknown signal {text:?}: use a number of 1 to {LAST} or a name as TERM");
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=LAST).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let number = if let Some(offset) = name.strip_prefix("RTMIN") {
        offset_of(offset, '+').map(|offset| FIRST_REAL_TIME.saturating_add(offset))
    } else if let Some(offset) = name.strip_prefix("RTMAX") {
        offset_of(offset, '-').map(|offset| LAST.saturating_sub(offset))
    } else {
        format!("SIG{name}").parse::<Signal>().ok().map(|signal| signal as i32)
    };
    number.filter(|number| (1..=LAST).contains(number)).ok_or_else(unknown)
}

fn offset_of(text: &str, sign: char) -> Option<i32> {
    if text.is_empty() {
        return Some(0);
    }
    text.strip_prefix(sign)?
        .parse()
        .ok()
        .filter(|offset| (0..=LAST - FIRST_REAL_TIME).contains(offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_number_and_name() {
        for (text, number) in [
            ("9", 9),
            ("64", 64),
            ("KILL", 9),
            ("SIGTERM", 15),
            ("sigwinch", 28),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
    }

    #[test]
    fn what_is_no_signal_is_refused_by_name() {
        for text in ["0", "65", "-9", "NOSUCH", "SIG", "", "RTMIN+31", "RTMAX+1", "RTMIN-1"] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
