//! `kiln completions`: a shell's completions, generated from the command line's own definition.

use std::io::Write;
use std::process::ExitCode;

use clap::{Command, CommandFactory, ValueEnum};
use clap_complete::Shell;

use super::Arguments;

/// Options of `kiln completions`.
#[derive(Debug, clap::Args)]
pub struct Completions {
    /// The shell that they are for
    shell: SupportedShell,
}

/// The shells whose completions are installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SupportedShell {
    /// bash, with bash-completion
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

/// Prints the script.
pub fn run(completions: &Completions) -> anyhow::Result<ExitCode> {
    let shell = match completions.shell {
        SupportedShell::Bash => Shell::Bash,
        SupportedShell::Zsh => Shell::Zsh,
        SupportedShell::Fish => Shell::Fish,
    };
    // Into memory first: the generator panics where it can't write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut visible(&Arguments::command()), "kiln", &mut script);
    std::io::stdout().lock().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}

/// The command without what is hidden: the generators show that too.
fn visible(command: &Command) -> Command {
    let arguments = command.get_arguments().filter(|argument| !argument.is_hide_set());
    let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set());
    Command::new("kiln").args(arguments).subcommands(verbs.cloned())
}
