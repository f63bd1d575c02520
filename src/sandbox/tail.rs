//! The end of what somebody untrusted writes, for error messages.

use std::collections::VecDeque;

/// The most bytes that are kept.
const CAPACITY: usize = 16 << 10;
/// The most lines that are shown.
const SHOWN_LINES: usize = 20;
/// The most characters of a line that are shown.
const SHOWN_COLUMNS: usize = 200;

/// The last bytes of a stream.
#[derive(Debug, Default)]
pub struct Tail {
    bytes: VecDeque<u8>,
}

impl Tail {
    /// Appends; what is too old goes.
    pub fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(CAPACITY)..];
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(CAPACITY);
        self.bytes.drain(..excess);
        self.bytes.extend(bytes);
    }

    /// The last lines, without anything that a terminal would act on. Empty lines are left out.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = self.all_lines();
        lines.drain(..lines.len().saturating_sub(SHOWN_LINES));
        lines
    }

    /// All lines that are kept, likewise.
    pub fn all_lines(&self) -> Vec<String> {
        self.text().lines().map(printable).filter(|line| !line.is_empty()).collect()
    }

    /// The last line that has these words, likewise.
    pub fn last_with(&self, words: &str) -> Option<String> {
        self.text().lines().rfind(|line| line.contains(words)).map(printable)
    }

    /// All that is kept, as text.
    pub fn text(&self) -> String {
        let (front, back) = self.bytes.as_slices();
        String::from_utf8_lossy(&[front, back].concat()).into_owned()
    }
}

/// A line without control characters, cut to what is shown.
pub fn printable(line: &str) -> String {
    let clean: String = line.chars().filter(|c| !c.is_control()).take(SHOWN_COLUMNS).collect();
    clean.trim_end().to_owned()
}

/// A text of several lines, likewise.
pub fn printable_lines(text: &str) -> String {
    text.lines().take(SHOWN_LINES).map(printable).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept() {
        let mut tail = Tail::default();
        for number in 0..100_000 {
            tail.push(format!("line {number}\r\n").as_bytes());
        }
        let lines = tail.lines();
        assert_eq!(lines.len(), SHOWN_LINES);
        assert_eq!(lines.last().map(String::as_str), Some("line 99999"));
        assert_eq!(tail.last_with("line 9996").as_deref(), Some("line 99969"));
        assert_eq!(tail.last_with("line 1"), None);
        tail.push(&vec![b'x'; 10 * CAPACITY]);
        assert_eq!(tail.bytes.len(), CAPACITY);
    }

    #[test]
    fn escape_sequences_lose_their_effect() {
        let mut tail = Tail::default();
        tail.push(b"\x1b]0;title\x07\x1b[2Jhello\n\n");
        assert_eq!(tail.lines(), ["]0;title[2Jhello"]);
    }
}
