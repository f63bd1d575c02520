//! What is said of a command line that kiln doesn't understand.
//!
//! Callers read the last error from the log file, in the form that they have asked for, and take
//! status 1 for a failure: so it is for a wrong command line too, as far as it could be read.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches};

use super::{Arguments, Global};
use crate::log;

/// Answers a request for help, or reports what is wrong.
pub fn report(error: &clap::Error, arguments: &[OsString]) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // Standard output that is closed has no reader to miss it.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let message = sentence(error);
    match readable_part(arguments).and_then(|global| log::start(&global, false).ok()) {
        Some(log) => log.report(&message),
        None => eprintln!("kiln: {message}"),
    }
    ExitCode::FAILURE
}

/// The global options as far as they can be read.
fn readable_part(arguments: &[OsString]) -> Option<Global> {
    let command = Arguments::command().ignore_errors(true);
    let matches = command.try_get_matches_from(arguments).ok()?;
    Global::from_arg_matches(&matches).ok()
}

/// The error as one line, with where to look.
fn sentence(error: &clap::Error) -> String {
    let text = error.to_string();
    let mut paragraph = text.lines().take_while(|line| !line.is_empty()).map(str::trim);
    let first = paragraph.next().unwrap_or_default();
    let first = first.strip_prefix("error: ").unwrap_or(first);
    // Names of missing arguments stand on lines of their own.
    let rest: Vec<_> = paragraph.collect();
    let separator = if rest.is_empty() { "" } else { " " };
    let suggestion = match error.get(ContextKind::SuggestedArg) {
        Some(ContextValue::String(argument)) => format!("; is it {argument}?"),
        _ => String::new(),
    };
    format!("{first}{separator}{}{suggestion}: see kiln --help", rest.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn said(arguments: &[&str]) -> String {
        let arguments = std::iter::once(&"kiln").chain(arguments);
        sentence(&Arguments::try_parse_from(arguments).expect_err("wrong"))
    }

    #[test]
    fn errors_are_one_line_that_names_what_is_wrong() {
        for (arguments, named) in [
            (&["run", "--kep", "x"][..], "'--kep'"),
            (&["state"][..], "<ID>"),
            (&["list", "--format", "yaml"][..], "'yaml'"),
            (&["state", "x", "y"][..], "'y'"),
            (&["nosuchverb"][..], "'nosuchverb'"),
        ] {
            let said = said(arguments);
            assert!(said.contains(named) && !said.contains('\n'), "{said}");
            assert!(said.ends_with("see kiln --help"), "{said}");
        }
        assert!(said(&["run", "--kep", "x"]).contains("is it --keep?"));
    }

    #[test]
    fn global_options_are_read_beside_errors() {
        let arguments = ["kiln", "--log", "/l", "--log-format", "json", "run", "--nosuch", "x"];
        let arguments = arguments.map(OsString::from);
        let global = readable_part(&arguments).expect("read");
        assert_eq!(global.log.as_deref(), Some(std::path::Path::new("/l")));
        assert_eq!(global.log_format, log::LogFormat::Json);
    }
}
