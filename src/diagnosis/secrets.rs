//! Takes secrets out of what is handed to others.
//!
//! A secret is the value of every environment variable but a few ([`HARMLESS`]), and what stands
//! behind a name that sounds like one's: of an annotation, of an argument's option, before `=` or `:`
//! in a text, and what stands before `@` in a URL. What was a secret in the configuration is taken
//! out wherever else it shows. Rather too much is taken out than too little.

use std::collections::BTreeSet;

use serde_json::Value;

/// What stands in a secret's place.
const MASK: &str = "***";

/// Environment variables whose values are shown.
const HARMLESS: [&str; 14] = [
    "PATH",
    "HOME",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "TERM",
    "TZ",
    "USER",
    "LOGNAME",
    "SHELL",
    "SHLVL",
    "PWD",
    "HOSTNAME",
    "container",
];

/// Parts of names behind which secrets stand, in small letters.
const TELLING: [&str; 14] = [
    "secret",
    "token",
    "passw",
    "passphrase",
    "pwd",
    "credential",
    "key",
    "private",
    "auth",
    "cookie",
    "session",
    "bearer",
    "signature",
    "cert",
];

/// Values that are shorter stand for themselves in too many places.
const LEAST_LENGTH: usize = 6;

/// The secrets that have been found.
#[derive(Debug, Default)]
pub struct Secrets {
    values: BTreeSet<String>,
}

impl Secrets {
    /// Takes the secrets out of a configuration or a state, and remembers them.
    pub fn take_out(&mut self, document: &mut Value) {
        self.find(document);
        self.scrub_all(document);
    }

    /// A text without what has been found, and without what looks like a secret.
    pub fn scrub(&self, text: &str) -> String {
        // The longest first: one may be part of another.
        let mut values: Vec<&String> = self.values.iter().collect();
        values.sort_by_key(|value| std::cmp::Reverse(value.len()));
        let known = values.into_iter().fold(text.to_owned(), |text, value| {
            if text.contains(value.as_str()) { text.replace(value.as_str(), MASK) } else { text }
        });
        let lines = known.split_inclusive('\n');
        lines.map(|line| mask_named(&mask_users(line))).collect()
    }

    fn find(&mut self, value: &mut Value) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    match (name.as_str(), value) {
                        ("env", Value::Array(variables)) => self.mask_variables(variables),
                        ("annotations", Value::Object(annotations)) => {
                            let telling =
                                annotations.iter_mut().filter(|(name, _)| is_telling(name));
                            telling.for_each(|(_, value)| self.mask(value));
                        }
                        (_, value) => self.find(value),
                    }
                }
            }
            Value::Array(values) => {
                // An option, and its value behind it.
                for at in 1..values.len() {
                    let option = values[at - 1].as_str().unwrap_or_default();
                    let is_option = option.starts_with('-') && !option.contains('=');
                    if is_option && is_telling(option) {
                        self.mask(&mut values[at]);
                    }
                }
                values.iter_mut().for_each(|value| self.find(value));
            }
            _ => {}
        }
    }

    /// Of an environment every value is a secret but those of harmless names.
    fn mask_variables(&mut self, variables: &mut [Value]) {
        for variable in variables {
            let text = variable.as_str().unwrap_or_default();
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            if !HARMLESS.contains(&name) {
                self.remember(value);
                *variable = format!("{name}={MASK}").into();
            }
        }
    }

    fn mask(&mut self, value: &mut Value) {
        if let Value::String(text) = value {
            self.remember(text);
        }
        *value = MASK.into();
    }

    fn remember(&mut self, value: &str) {
        if value.len() >= LEAST_LENGTH {
            self.values.insert(value.to_owned());
        }
        // What is quoted or split over lines elsewhere is found by its lines.
        for line in value.lines().map(str::trim).filter(|line| line.len() >= LEAST_LENGTH) {
            self.values.insert(line.to_owned());
        }
    }

    fn scrub_all(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.scrub(text),
            Value::Array(values) => values.iter_mut().for_each(|value| self.scrub_all(value)),
            Value::Object(fields) => fields.values_mut().for_each(|value| self.scrub_all(value)),
            _ => {}
        }
    }
}

/// Whether a secret stands behind a name.
fn is_telling(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let is_author = name.ends_with("author") || name.ends_with("authors");
    !is_author && TELLING.iter().any(|part| name.contains(part))
}

/// Masks what stands between a URL's scheme and an `@`.
fn mask_users(line: &str) -> String {
    let mut masked = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        masked.push_str(before);
        let ends = |c: char| c.is_whitespace() || "/?#\"'".contains(c);
        let authority = &after[..after.find(ends).unwrap_or(after.len())];
        rest = match authority.rfind('@') {
            Some(at) => {
                masked.push_str(MASK);
                &after[at..]
            }
            None => after,
        };
    }
    masked + rest
}

/// Masks what stands behind telling names and `=` or `:`.
fn mask_named(line: &str) -> String {
    let mut masked = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find(['=', ':']) {
        let (before, after) = rest.split_at(at + 1);
        masked.push_str(before);
        rest = after;
        if !is_telling(last_name(&before[..at])) {
            continue;
        }
        let (opening, value) = open(after);
        let length = length_of(value, opening, before.ends_with(':'));
        masked.push_str(opening);
        if length > 0 {
            masked.push_str(MASK);
        }
        rest = &value[length..];
    }
    masked + rest
}

/// The name at a text's end, without the quotes around it.
fn last_name(text: &str) -> &str {
    let text = text.trim_end_matches(['"', '\'', '\\', ' ']);
    let in_name = |c: char| c.is_alphanumeric() || "_-.".contains(c);
    &text[text.trim_end_matches(in_name).len()..]
}

/// Splits off the spaces and the quote before a value. A quote may be escaped, within another text.
fn open(text: &str) -> (&str, &str) {
    let value = text.trim_start_matches(' ');
    let quote = match value.as_bytes() {
        [b'\\', b'"', ..] => 2,
        [b'"' | b'\'', ..] => 1,
        _ => 0,
    };
    text.split_at(text.len() - value.len() + quote)
}

/// How long a value is: up to its closing quote; without quotes, of a header (`Name: value`) to the
/// end of the line, of anything else to the end of the word.
fn length_of(value: &str, opening: &str, is_header: bool) -> usize {
    let line = value.trim_end_matches(['\n', '\r']).len();
    if opening.ends_with("\\\"") {
        return value.find("\\\"").unwrap_or(line);
    }
    if let Some(quote) = opening.chars().last().filter(|c| matches!(c, '"' | '\'')) {
        let mut escaped = false;
        let closes = |c: char| {
            let closes = c == quote && !escaped;
            escaped = c == '\\' && !escaped;
            closes
        };
        return value.find(closes).unwrap_or(line);
    }
    let ends = |c: char| {
        matches!(c, '"' | '\'' | '\n' | '\r')
            || !is_header && (c.is_whitespace() || c == ',' || c == '&')
    };
    value.find(ends).unwrap_or(value.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn configuration_keeps_its_form_and_loses_its_secrets() {
        let mut config = json!({
            "process": {
                "args": ["tool", "--token", "hidden-1", "--level=3", "--api-key=hidden-2", "hidden-6"],
                "env": ["PATH=/bin:/usr/bin", "DB=hidden-3", "EMPTY=", "hidden-7", "N=12"],
            },
            "hooks": {"poststop": [{"path": "/x", "env": ["T=hidden-6"], "args": ["x", "-v"]}]},
            "annotations": {"io.kiln.cpus": "2", "com.example.password": "hidden-4"},
            "mounts": [{"options": ["mode=755", "password=hidden-5"]}],
            "linux": {"namespaces": [{"type": "pid"}]},
        });
        let mut secrets = Secrets::default();
        secrets.take_out(&mut config);
        let expected = json!({
            "process": {
                "args": ["tool", "--token", "***", "--level=3", "--api-key=***", "***"],
                "env": ["PATH=/bin:/usr/bin", "DB=***", "EMPTY=***", "hidden-7=***", "N=***"],
            },
            "hooks": {"poststop": [{"path": "/x", "env": ["T=***"], "args": ["x", "-v"]}]},
            "annotations": {"io.kiln.cpus": "2", "com.example.password": "***"},
            "mounts": [{"options": ["mode=755", "password=***"]}],
            "linux": {"namespaces": [{"type": "pid"}]},
        });
        assert_eq!(config, expected);
        let text = "error: hidden-3 and hidden-4, 12 times";
        assert_eq!(secrets.scrub(text), "error: *** and ***, 12 times");
    }

    #[test]
    fn what_looks_like_a_secret_is_masked_in_texts() {
        let secrets = Secrets::default();
        for (text, expected) in [
            ("GET https://user:pw@host/x?token=abc&n=1", "GET https://***@host/x?token=***&n=1"),
            ("Authorization: Bearer abc def\nnext", "Authorization: ***\nnext"),
            (r#"{"password": "a b", "id": "x"}"#, r#"{"password": "***", "id": "x"}"#),
            (r#"{"m":"say \"secret\":\"a\" now"}"#, r#"{"m":"say \"secret\":\"***\" now"}"#),
            (r#"{"pwd": "", "a": "a\"b"}"#, r#"{"pwd": "", "a": "a\"b"}"#),
            (r#"{"pwd": "a\"b", "a": 1}"#, r#"{"pwd": "***", "a": 1}"#),
            ("API_KEY='a b' LEVEL=3", "API_KEY='***' LEVEL=3"),
            ("ssh://git@host and mail@host", "ssh://***@host and mail@host"),
            ("author=me level=info time=10:20", "author=me level=info time=10:20"),
            ("token=", "token="),
            ("äsecret=ä", "äsecret=***"),
        ] {
            assert_eq!(secrets.scrub(text), expected);
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in any::<String>()) {
            let _ = Secrets::default().scrub(&text);
        }

        #[test]
        fn nor_one_that_is_nearly_right(text in "([a-z]{0,2}|token|://|[=:@\"'\\\\ ,\nä]){0,20}") {
            let _ = Secrets::default().scrub(&text);
        }

        #[test]
        fn values_of_variables_show_nowhere(
            value in "[!-)+-~]{6,40}", before in "[ -~]{0,10}", after in "[ -~]{0,10}",
        ) {
            let mut secrets = Secrets::default();
            let mut config = json!({"process": {"env": [format!("X={value}")]}});
            secrets.take_out(&mut config);
            prop_assert!(!config.to_string().contains(&value));
            let scrubbed = secrets.scrub(&format!("{before}{value}{after}"));
            prop_assert!(!scrubbed.contains(&value));
        }
    }
}
