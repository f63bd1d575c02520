//! The annotations that are for kiln: `io.kiln.` and a name. One that kiln doesn't know is refused, for a
//! limit that is misspelt would hold for nobody.
//!
//! A known one that does not apply is harmless: engines copy a pod's annotations to its containers, and
//! what a state says to the bundle of the next run.

use oci_spec::runtime::Spec;

use super::BundleError;

/// What the names begin with.
const PREFIX: &str = "io.kiln.";

/// What follows: of the machine, of limits, and what the state of a container says.
const NAMES: [&str; 13] = [
    "cpus",
    "engine",
    "machine",
    "memory-mib",
    "deadline",
    "disk-bandwidth",
    "disk-limit",
    "iops",
    "network-burst",
    "network-rate",
    "output-limit",
    "limit-reached",
    "oom-killed",
];

/// Refuses the first annotation that looks as if it were for kiln and isn't.
///
/// # Errors
/// Its name, and the known one that is most like it.
pub fn check(spec: &Spec) -> Result<(), BundleError> {
    let annotations = spec.annotations().as_ref();
    let unknown = annotations.into_iter().flatten().find_map(|(annotation, _)| {
        let name = annotation.strip_prefix(PREFIX)?;
        (!NAMES.contains(&name)).then_some((annotation, name))
    });
    let Some((annotation, name)) = unknown else { return Ok(()) };
    let nearest = NAMES.into_iter().min_by_key(|known| distance(name, known)).unwrap_or_default();
    let reason = format!(
        "kiln has no such annotation, and ignores none that is meant for it: use {PREFIX}{nearest}, or \
         leave it out"
    );
    Err(BundleError::field(format!("annotations[{annotation:?}]"), reason))
}

/// How many characters are to be put in, left out or changed to make one of the other (Levenshtein).
/// Of a long name the beginning counts.
fn distance(name: &str, known: &str) -> usize {
    let known: Vec<char> = known.chars().collect();
    let mut row: Vec<usize> = (0..=known.len()).collect();
    for (line, a) in name.chars().take(64).enumerate() {
        let mut diagonal = line;
        row[0] = line + 1;
        for (column, b) in known.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[column + 1];
            row[column + 1] = changed.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[known.len()]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checked(annotation: &str) -> Result<(), String> {
        let spec = json!({"ociVersion": "1.0.2", "annotations": {annotation: "1"}});
        let spec: Spec = serde_json::from_value(spec).expect("spec");
        check(&spec).map_err(|error| error.to_string())
    }

    #[test]
    fn an_unknown_one_is_refused_with_what_was_meant() {
        for (wrong, meant) in [
            ("io.kiln.deadlin", "io.kiln.deadline,"),
            ("io.kiln.memory", "io.kiln.memory-mib,"),
            ("io.kiln.output_limit", "io.kiln.output-limit,"),
            ("io.kiln.CPUs", "io.kiln.cpus,"),
            ("io.kiln.", "io.kiln."),
        ] {
            let error = checked(wrong).expect_err(wrong);
            assert!(error.contains(meant) && error.contains(&format!("{wrong:?}")), "{error}");
        }
        assert!(checked(&format!("{PREFIX}{}", "x".repeat(1 << 16))).is_err());
    }

    #[test]
    fn known_ones_and_others_are_not_looked_at() {
        for other in [
            "io.kiln.machine",
            "io.kiln.limit-reached",
            "io.kilns.deadline",
            "org.example.io.kiln.deadlin",
            "io.kiln",
        ] {
            assert_eq!(checked(other), Ok(()));
        }
    }

    #[test]
    fn distances_are_edits() {
        for (name, known, edits) in
            [("", "abc", 3), ("abc", "abc", 0), ("axc", "abc", 1), ("bca", "abc", 2)]
        {
            assert_eq!(distance(name, known), edits, "{name} {known}");
        }
    }
}
