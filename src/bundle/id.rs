//! Container ids.
//!
//! The characters are runc's: letters and digits of ASCII, `_`, `+`, `,`, `-` and `.`. An id is the
//! name of a directory too, hence its length and that it isn't `.` or `..`.

const MAX_LENGTH: usize = 255;

/// Checks a container's id.
///
/// # Errors
/// A sentence that names the id and what is wrong with it.
pub fn validate(id: &str) -> Result<(), String> {
    if id.is_empty() {
        return Err("container id cannot be empty".to_owned());
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+,-.".contains(c);
    if !id.chars().all(allowed) || id == "." || id == ".." {
        return Err(format!(
            "invalid container id format {id:?}: use letters, digits, '_', '+', ',', '-' and '.'"
        ));
    }
    if id.len() > MAX_LENGTH {
        return Err(format!("container id has {} characters, the limit is {MAX_LENGTH}", id.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_as_callers_make_them_are_valid() {
        for id in ["a", "build-1.2_3+x", &"f".repeat(64), "...", "a,b"] {
            assert_eq!(validate(id), Ok(()), "{id}");
        }
    }

    #[test]
    fn ids_that_leave_the_state_directory_are_invalid() {
        for id in ["", ".", "..", "a/b", "../x", "a b", "ä", "a\n", "a\0", &"f".repeat(256)] {
            assert!(validate(id).is_err(), "{id}");
        }
    }
}
