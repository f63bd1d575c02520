//! What can be done about an error of the operating system, wherever it shows.
//!
//! Errors reach the user as text, some of it from other processes and from QEMU. So it is the text
//! that is looked at: it ends in `(os error N)`, or has the C library's words.

/// An error's number, its words, and what can be done.
struct Mend {
    number: i32,
    words: &'static str,
    mend: &'static str,
}

const MENDS: [Mend; 10] = [
    Mend {
        number: libc::ENOMEM,
        words: "Cannot allocate memory",
        mend: "the host has no memory left for that: give the guest less (--memory, \
               linux.resources.memory.limit), raise the caller's own limit (ulimit -v), or end other \
               programs",
    },
    Mend {
        number: libc::ENOSPC,
        words: "No space left on device",
        mend: "free space or inodes on that file system",
    },
    Mend {
        number: libc::EDQUOT,
        words: "Disk quota exceeded",
        mend: "free space, or raise the caller's quota",
    },
    Mend {
        number: libc::EMFILE,
        words: "Too many open files",
        mend: "raise the caller's limit on open files (ulimit -n)",
    },
    Mend {
        number: libc::ENFILE,
        words: "Too many open files in system",
        mend: "raise the host's limit on open files (sysctl fs.file-max)",
    },
    Mend {
        number: libc::EAGAIN,
        words: "Resource temporarily unavailable",
        mend: "raise the caller's limits on processes and locked memory (ulimit -u, ulimit -l, \
               pids.max of its cgroup)",
    },
    Mend {
        number: libc::EACCES,
        words: "Permission denied",
        mend: "give the caller access to it, or run kiln as root; `kiln doctor` says what is missing",
    },
    Mend {
        number: libc::EPERM,
        words: "Operation not permitted",
        mend: "run kiln as root, and not in a container that forbids it; `kiln doctor` says what is \
               missing",
    },
    Mend {
        number: libc::EROFS,
        words: "Read-only file system",
        mend: "mount that file system for writing, or use another folder",
    },
    Mend {
        number: libc::EIO,
        words: "Input/output error",
        mend: "see the kernel's log (dmesg) for faults of that device",
    },
];

/// What can be done about the error that a text ends with or speaks of.
pub fn of(text: &str) -> Option<&'static str> {
    // The longest words: some begin with others.
    let said = MENDS.iter().filter(|mend| text.contains(mend.words));
    by_number(text).or_else(|| said.max_by_key(|mend| mend.words.len()).map(|mend| mend.mend))
}

fn by_number(text: &str) -> Option<&'static str> {
    let has = |mend: &&Mend| text.contains(&format!("(os error {})", mend.number));
    MENDS.iter().find(has).map(|mend| mend.mend)
}

/// A text whose first line ends in what can be done about the error of this process that it ends with.
/// Words alone may be anybody's.
pub fn append(text: &str) -> String {
    match by_number(text) {
        Some(mend) => extend_first_line(text, &format!(": {mend}")),
        None => text.to_owned(),
    }
}

/// A text with more at the end of its first line.
pub fn extend_first_line(text: &str, more: &str) -> String {
    let (first, rest) = text.split_at(text.find('\n').unwrap_or(text.len()));
    format!("{first}{more}{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn errors_are_known_by_number_and_by_words() {
        let error = io::Error::from_raw_os_error(libc::ENOSPC);
        let text = append(&format!("state directory /x: {error}\n  a line"));
        let expected = "state directory /x: No space left on device (os error 28): free space or \
                        inodes on that file system\n  a line";
        assert_eq!(text, expected);
        let qemu = "qemu: cannot set up guest memory 'memory': Cannot allocate memory";
        assert!(of(qemu).is_some_and(|mend| mend.contains("--memory")));
        let of_system = of("Too many open files in system");
        assert!(of_system.is_some_and(|mend| mend.contains("fs.file-max")));
        assert_eq!(of("it is broken (os error 120)"), None);
    }

    #[test]
    fn the_words_are_the_c_librarys() {
        for Mend { number, words, .. } in MENDS {
            let said = io::Error::from_raw_os_error(number).to_string();
            assert_eq!(said, format!("{words} (os error {number})"));
        }
    }
}
