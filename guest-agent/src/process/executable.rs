//! Finding the program to execute, with the words and exit statuses that callers of runc know.
//!
//! A name without a slash is looked for in the directories of `PATH` of the container's own
//! environment. The caller has the credentials and the root of the process that will execute it.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kiln_protocol::FailurePhase;
use rustix::fs::{Access, AtFlags, FileType};
use rustix::io::Errno;

use crate::failure::Failure;

/// The status of a shell for a program that isn't found.
const NOT_FOUND: u8 = 127;

/// The status of a shell for a program that can't be executed.
const NOT_EXECUTABLE: u8 = 126;

/// Finds the program that `name` means.
///
/// # Errors
/// 127 if there is none, 126 if it can't be executed, with runc's words.
pub fn find(name: &str, env: &[String]) -> Result<PathBuf, Failure> {
    if name.contains('/') {
        return match check(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(Errno::NOENT) => {
                Err(not_found(&format!("exec: {name:?}: stat {name}: no such file or directory")))
            }
            Err(error) => Err(failure(error, &format!("exec: {name:?}: "))),
        };
    }
    let path = env.iter().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or("");
    let mut refused = None;
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = Path::new(directory).join(name);
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error @ (Errno::ACCESS | Errno::ISDIR)) => refused = refused.or(Some(error)),
            Err(_) => {}
        }
    }
    match refused {
        Some(Errno::ACCESS) => Err(failure(Errno::ACCESS, &format!("exec: {name:?}: "))),
        _ => Err(not_found(&format!("exec: {name:?}: executable file not found in $PATH"))),
    }
}

/// The failure of execve(2) itself.
pub fn exec_failure(program: &Path, error: io::Error) -> Failure {
    let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
    failure(errno, &format!("exec {}: ", program.display()))
}

fn check(path: &Path) -> Result<(), Errno> {
    let stat = rustix::fs::stat(path)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(Errno::ISDIR);
    }
    // The capability to override permissions does not reach files that nobody may execute.
    if stat.st_mode & 0o111 == 0 {
        return Err(Errno::ACCESS);
    }
    rustix::fs::accessat(rustix::fs::CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

fn not_found(message: &str) -> Failure {
    Failure { phase: FailurePhase::Exec, message: message.to_owned(), exit_code: NOT_FOUND }
}

fn failure(errno: Errno, prefix: &str) -> Failure {
    let words = match errno {
        Errno::NOENT => "no such file or directory".to_owned(),
        Errno::ACCESS => "permission denied".to_owned(),
        Errno::ISDIR => "is a directory".to_owned(),
        Errno::NOEXEC => "exec format error".to_owned(),
        Errno::PERM => "operation not permitted".to_owned(),
        Errno::NOTDIR => "not a directory".to_owned(),
        Errno::TOOBIG => "argument list too long".to_owned(),
        other => io::Error::from(other).to_string(),
    };
    let exit_code =
        if matches!(errno, Errno::NOENT | Errno::NOTDIR) { NOT_FOUND } else { NOT_EXECUTABLE };
    Failure { phase: FailurePhase::Exec, message: format!("{prefix}{words}"), exit_code }
}

/// The value of `HOME` for a user where the environment has none: the home directory in
/// `/etc/passwd`, else `/`, as runc has it.
pub fn home(passwd: &[u8], uid: u32) -> String {
    let wanted = uid.to_string();
    passwd
        .split(|byte| *byte == b'\n')
        .map(|line| line.split(|byte| *byte == b':').collect::<Vec<_>>())
        .find(|fields| fields.len() >= 6 && fields[2] == wanted.as_bytes())
        .map(|fields| OsStr::from_bytes(fields[5]).to_string_lossy().into_owned())
        .filter(|home| !home.is_empty())
        .unwrap_or_else(|| "/".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn directory_with(name: &str, mode: u32) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::write(dir.path().join(name), "").expect("file");
        let permissions = fs::Permissions::from_mode(mode);
        fs::set_permissions(dir.path().join(name), permissions).expect("mode");
        dir
    }

    #[test]
    fn path_of_the_environment_is_searched_in_order() {
        let (first, second) = (directory_with("tool", 0o644), directory_with("tool", 0o755));
        let path = format!("PATH={}:{}", first.path().display(), second.path().display());
        assert_eq!(find("tool", &[path]).expect("found"), second.path().join("tool"));
    }

    #[test]
    fn failures_have_the_words_and_statuses_of_runc() {
        let dir = directory_with("tool", 0o644);
        let path = format!("PATH={}", dir.path().display());
        let failure = find("nothing", std::slice::from_ref(&path)).expect_err("not found");
        assert_eq!(failure.message, "exec: \"nothing\": executable file not found in $PATH");
        assert_eq!(failure.exit_code, 127);
        let failure = find("tool", &[path]).expect_err("not executable");
        assert_eq!(failure.message, "exec: \"tool\": permission denied");
        assert_eq!(failure.exit_code, 126);
        let failure = find("/no/such", &[]).expect_err("not found");
        assert_eq!(failure.message, "exec: \"/no/such\": stat /no/such: no such file or directory");
        assert_eq!(failure.exit_code, 127);
        let failure = find("/etc", &[]).expect_err("a directory");
        assert_eq!(
            (failure.message.as_str(), failure.exit_code),
            ("exec: \"/etc\": is a directory", 126)
        );
    }

    #[test]
    fn home_comes_from_passwd_and_is_root_otherwise() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbroken:line\nu:x:7:7::/home/u:/bin/sh\n";
        assert_eq!(home(passwd, 0), "/root");
        assert_eq!(home(passwd, 7), "/home/u");
        assert_eq!(home(passwd, 8), "/");
        assert_eq!(home(b"\xff\x00:::", 0), "/");
    }
}
