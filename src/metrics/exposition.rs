//! The text format of Prometheus, version 0.0.4
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).

use std::fmt::{self, Display, Write};

/// What a family's values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// They only grow.
    Counter,
    /// They go up and down.
    Gauge,
}

/// Metrics of one name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    /// Its name: letters, digits and underscores.
    pub name: &'static str,
    /// What its values are.
    pub kind: Kind,
    /// What it says, for people.
    pub help: &'static str,
}

/// A value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// Exact.
    Whole(u64),
    /// Anything else, such as seconds.
    Real(f64),
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Whole(value)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl Display for Value {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(value) => value.fmt(to),
            Self::Real(value) if value.is_infinite() => {
                to.write_str(if *value > 0.0 { "+Inf" } else { "-Inf" })
            }
            Self::Real(value) => value.fmt(to),
        }
    }
}

/// Families with their samples, each family's together, in the order in which they came first.
#[derive(Debug, Default)]
pub struct Exposition {
    families: Vec<(Family, String)>,
}

impl Exposition {
    /// Adds a sample. Its labels' names are letters, digits and underscores; their values anything.
    pub fn add(&mut self, family: Family, labels: &[(&str, &str)], value: impl Into<Value>) {
        let known = self.families.iter().position(|(known, _)| known.name == family.name);
        let at = known.unwrap_or_else(|| {
            self.families.push((family, String::new()));
            self.families.len() - 1
        });
        let labels: Vec<_> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{}\"", Escaped { text: value, quote: true }))
            .collect();
        let labels = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", labels.join(",")),
        };
        // Writing to a string can't fail.
        let _ = writeln!(self.families[at].1, "{}{labels} {}", family.name, value.into());
    }
}

impl Display for Exposition {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (Family { name, kind, help }, samples) in &self.families {
            let kind = match kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
            };
            writeln!(to, "# HELP {name} {}", Escaped { text: help, quote: false })?;
            writeln!(to, "# TYPE {name} {kind}\n{}", samples.trim_end())?;
        }
        Ok(())
    }
}

/// A text with backslashes and line feeds escaped, in label values double quotes too.
struct Escaped<'a> {
    text: &'a str,
    quote: bool,
}

impl Display for Escaped<'_> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.text.chars() {
            match character {
                '\\' => to.write_str("\\\\")?,
                '\n' => to.write_str("\\n")?,
                '"' if self.quote => to.write_str("\\\"")?,
                other => to.write_char(other)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UP: Family = Family { name: "up", kind: Kind::Gauge, help: "Is up.\\ \"So\"\nit is." };
    const SECONDS: Family = Family { name: "seconds_total", kind: Kind::Counter, help: "Time." };

    #[test]
    fn families_stay_together_and_texts_are_escaped() {
        let mut exposition = Exposition::default();
        exposition.add(UP, &[("id", "a\"b\\c\nd"), ("engine", "kvm")], 1u64);
        exposition.add(SECONDS, &[], 0.25);
        exposition.add(UP, &[("id", "ä")], u64::MAX);
        exposition.add(SECONDS, &[("x", "")], f64::INFINITY);
        let expected = "\
# HELP up Is up.\\\\ \"So\"\\nit is.
# TYPE up gauge
up{id=\"a\\\"b\\\\c\\nd\",engine=\"kvm\"} 1
up{id=\"ä\"} 18446744073709551615
# HELP seconds_total Time.
# TYPE seconds_total counter
seconds_total 0.25
seconds_total{x=\"\"} +Inf
";
        assert_eq!(exposition.to_string(), expected);
    }

    proptest! {
        #[test]
        fn any_label_value_stays_on_its_line_and_in_its_quotes(value in any::<String>()) {
            let mut exposition = Exposition::default();
            exposition.add(UP, &[("id", &value)], 1u64);
            let text = exposition.to_string();
            prop_assert_eq!(text.split('\n').count(), 4);
            let sample = text.split('\n').nth(2).expect("three lines");
            let quoted = sample.strip_prefix("up{id=\"").and_then(|rest| rest.strip_suffix("\"} 1"));
            let mut unescaped = String::new();
            let mut rest = quoted.expect("one label").chars();
            while let Some(character) = rest.next() {
                prop_assert_ne!(character, '"');
                unescaped.push(match character {
                    '\\' => match rest.next() {
                        Some('n') => '\n',
                        Some(other) => other,
                        None => panic!("an escape of nothing"),
                    },
                    other => other,
                });
            }
            prop_assert_eq!(unescaped, value);
        }
    }
}
