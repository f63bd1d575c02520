//! Limits on what the guest may put into a message, checked while it is read.
//!
//! The cap on a frame bounds memory; these bound what the rest of the program has to deal with: the
//! length of a text, the number of items. A message beyond them does not parse.

use std::collections::BTreeMap;

use serde::de::{Deserialize, Deserializer, Error};

use crate::statistics::MEMORY_STAT_KEYS;

/// A text of at most `MAX` bytes.
pub fn text<'de, D: Deserializer<'de>, const MAX: usize>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    match text.len() <= MAX {
        true => Ok(text),
        false => Err(D::Error::custom(format_args!("a text of more than {MAX} bytes"))),
    }
}

/// At most `MAX` items.
pub fn list<'de, D, T, const MAX: usize>(from: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let list = Vec::deserialize(from)?;
    match list.len() <= MAX {
        true => Ok(list),
        false => Err(D::Error::custom(format_args!("more than {MAX} items"))),
    }
}

/// A command line: at most `MAX` bytes in all its arguments, and as many arguments.
pub fn command<'de, D, const MAX: usize>(from: D) -> Result<Vec<String>, D::Error>
where
    D: Deserializer<'de>,
{
    let command: Vec<String> = list::<_, _, MAX>(from)?;
    match command.iter().map(String::len).sum::<usize>() <= MAX {
        true => Ok(command),
        false => Err(D::Error::custom(format_args!("a command of more than {MAX} bytes"))),
    }
}

/// Figures of memory.stat, by the names that the kernel has for them.
pub fn memory_stat<'de, D>(from: D) -> Result<BTreeMap<String, u64>, D::Error>
where
    D: Deserializer<'de>,
{
    let stat = BTreeMap::<String, u64>::deserialize(from)?;
    match stat.keys().all(|key| MEMORY_STAT_KEYS.contains(&key.as_str())) {
        true => Ok(stat),
        false => Err(D::Error::custom("a figure that memory.stat doesn't have")),
    }
}
