//! Amounts as users write them: bytes, time, and plain numbers.
//!
//! Each is at least 1: a limit of nothing is left out, not set to 0.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A number of bytes: `1048576`, `1024K`, `1M`; `K`, `M`, `G` and `T` are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "u64")]
pub struct Bytes(pub NonZeroU64);

/// A time: `90`, `90s`, `30m`, `1h30m`; a number without a unit is seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "u64")]
pub struct Span(NonZeroU64);

/// A number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "u64")]
pub struct Count(pub NonZeroU64);

/// Why a text is no amount. It is shown beside the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AmountError {
    /// No number of bytes.
    #[error("use a whole number of bytes from 1 on, or one with K, M, G or T behind it, as in 64M")]
    Bytes,
    /// No time.
    #[error(
        "use a whole number of seconds from 1 on, or a time with units, as in 90s, 30m or 1h30m"
    )]
    Time,
    /// No number.
    #[error("use a whole number from 1 on")]
    Number,
}

/// An amount in a configuration file: a number, or a text for one with a unit.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u64),
    Text(String),
}

impl Written {
    fn into_text(self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text,
        }
    }
}

/// Splits a text behind its leading digits.
fn split(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

impl FromStr for Bytes {
    type Err = AmountError;

    fn from_str(text: &str) -> Result<Self, AmountError> {
        let (number, unit) = split(text);
        let unit: u64 = match unit.to_ascii_uppercase().as_str() {
            "" | "B" => 1,
            "K" | "KIB" => 1 << 10,
            "M" | "MIB" => 1 << 20,
            "G" | "GIB" => 1 << 30,
            "T" | "TIB" => 1 << 40,
            _ => return Err(AmountError::Bytes),
        };
        let number = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
        number.and_then(NonZeroU64::new).map(Self).ok_or(AmountError::Bytes)
    }
}

impl FromStr for Span {
    type Err = AmountError;

    fn from_str(text: &str) -> Result<Self, AmountError> {
        let parts = || {
            let mut rest = text;
            let mut total: u64 = 0;
            while !rest.is_empty() {
                let (number, behind) = split(rest);
                let unit = match behind.chars().next() {
                    // Seconds alone go without a unit: in `1h30` they could be minutes.
                    None if number.len() == text.len() => 1,
                    Some('s') => 1,
                    Some('m') => 60,
                    Some('h') => 3600,
                    Some('d') => 86_400,
                    _ => return None,
                };
                total = total.checked_add(number.parse::<u64>().ok()?.checked_mul(unit)?)?;
                rest = behind.get(1..).unwrap_or_default();
            }
            NonZeroU64::new(total)
        };
        parts().map(Self).ok_or(AmountError::Time)
    }
}

impl Span {
    /// As the clock counts it.
    pub fn duration(self) -> Duration {
        Duration::from_secs(self.0.get())
    }
}

impl FromStr for Count {
    type Err = AmountError;

    fn from_str(text: &str) -> Result<Self, AmountError> {
        text.parse().map(Self).map_err(|_| AmountError::Number)
    }
}

/// Writes an amount in the largest unit of which it is a whole number.
fn in_units(amount: u64, units: &[(u64, &str)], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match units.iter().find(|(size, _)| amount.is_multiple_of(*size)) {
        Some((size, name)) => write!(f, "{} {name}", amount / size),
        None => write!(f, "{amount}"),
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units =
            [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes")];
        in_units(self.0.get(), &units, f)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        in_units(self.0.get(), &[(3600, "h"), (60, "min"), (1, "s")], f)
    }
}

macro_rules! as_written {
    ($amount:ident) => {
        impl TryFrom<Written> for $amount {
            type Error = AmountError;

            fn try_from(written: Written) -> Result<Self, AmountError> {
                written.into_text().parse()
            }
        }

        impl From<$amount> for u64 {
            fn from(amount: $amount) -> Self {
                amount.0.get()
            }
        }
    };
}

as_written!(Bytes);
as_written!(Span);
as_written!(Count);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(text: &str) -> Result<u64, AmountError> {
        text.parse::<Bytes>().map(u64::from)
    }

    fn seconds(text: &str) -> Result<u64, AmountError> {
        text.parse::<Span>().map(|span| span.duration().as_secs())
    }

    #[test]
    fn bytes_have_units_of_1024() {
        for (text, expected) in [
            ("1", 1),
            ("512B", 512),
            ("4k", 4096),
            ("64M", 64 << 20),
            ("64MiB", 64 << 20),
            ("3G", 3 << 30),
            ("2t", 2 << 40),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "0M", "-1", "1.5G", "M", "1 M", "1MB", "16777216T", "1mm"] {
            assert_eq!(bytes(text), Err(AmountError::Bytes), "{text}");
        }
    }

    #[test]
    fn times_have_units_and_seconds_may_go_without() {
        for (text, expected) in
            [("90", 90), ("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1d1s", 86_401)]
        {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
        for text in
            ["", "0", "0s", "1h30", "s", "1.5h", "1 h", "-3", "1w", "1é", "999999999999999999d"]
        {
            assert_eq!(seconds(text), Err(AmountError::Time), "{text}");
        }
    }

    #[test]
    fn amounts_are_shown_in_the_unit_that_fits() {
        let shown = |text: &str| text.parse::<Bytes>().expect("bytes").to_string();
        assert_eq!(
            [shown("64M"), shown("1000"), shown("1025K")],
            ["64 MiB", "1000 bytes", "1025 KiB"]
        );
        let shown = |text: &str| text.parse::<Span>().expect("time").to_string();
        assert_eq!([shown("90"), shown("120"), shown("2h")], ["90 s", "2 min", "2 h"]);
    }

    #[test]
    fn files_have_numbers_or_texts() {
        let read = |json: &str| serde_json::from_str::<Bytes>(json).map(u64::from).ok();
        assert_eq!(
            [read("4096"), read("\"4K\""), read("0"), read("-1")],
            [Some(4096), Some(4096), None, None]
        );
        let json = serde_json::to_string(&"1h".parse::<Span>().expect("time")).expect("JSON");
        assert_eq!(json, "3600");
    }

    proptest! {
        #[test]
        fn any_text_is_an_amount_or_an_error(text: String) {
            let _ = (bytes(&text), seconds(&text), text.parse::<Count>());
        }

        #[test]
        fn what_is_shown_of_plain_numbers_is_read_again(number in 1u64..) {
            prop_assert_eq!(bytes(&number.to_string()), Ok(number));
            prop_assert_eq!(seconds(&number.to_string()), Ok(number));
        }
    }
}
