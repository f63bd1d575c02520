//! `kiln run` on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::poll::{PollFd, PollFlags, poll};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::termios::{LocalFlags, tcgetattr};
use serde_json::json;

use crate::stage::Stage;

/// How long something may take on a loaded machine, in milliseconds.
const PATIENCE: u16 = 60_000;

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, Winsize);

/// The side of a terminal at which somebody sits.
pub struct Screen {
    master: File,
    seen: String,
}

impl Screen {
    /// Of a terminal with this master.
    pub fn new(master: OwnedFd) -> Self {
        Self { master: master.into(), seen: String::new() }
    }

    /// Reads until the screen shows something.
    pub fn see(&mut self, text: &str) {
        let mut buffer = [0; 1024];
        while !self.seen.contains(text) {
            let mut polled = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut polled, PATIENCE).expect("polls");
            assert_eq!(ready, 1, "{text:?} did not come, but {:?}", self.seen);
            let length = self.master.read(&mut buffer).expect("reads");
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        self.seen.clear();
    }

    /// Types something.
    pub fn write(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("writes");
    }

    /// Makes the window another size.
    pub fn resize(&self, size: &Winsize) {
        // SAFETY: the kernel reads a winsize.
        unsafe { set_window_size(self.master.as_raw_fd(), size) }.expect("resized");
    }
}

/// A user at a terminal on which kiln runs.
pub struct User {
    /// What the user sees and types.
    pub screen: Screen,
    slave: OwnedFd,
    /// The command.
    pub kiln: Child,
}

impl User {
    /// Calls a command on a terminal of this size.
    pub fn call(mut command: Command, size: Winsize) -> Self {
        let OpenptyResult { master, slave } = openpty(Some(&size), None).expect("terminal");
        let stdio = || Stdio::from(slave.try_clone().expect("descriptor"));
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        let terminal = slave.as_raw_fd();
        let control = move || {
            nix::unistd::setsid()?;
            // SAFETY: plain numbers.
            match unsafe { libc::ioctl(terminal, libc::TIOCSCTTY, 0) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: only system calls.
        unsafe { command.pre_exec(control) };
        let kiln = command.spawn().expect("kiln runs");
        Self { screen: Screen::new(master), slave, kiln }
    }

    /// The terminal is not in raw mode.
    pub fn echoes(&self) -> bool {
        tcgetattr(self.slave.as_fd()).expect("terminal").local_flags.contains(LocalFlags::ECHO)
    }
}

/// A window's size.
pub fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Has the container's process run on a terminal.
fn give_terminal(stage: &Stage) {
    stage.edit(|config| config["process"]["terminal"] = json!(true));
    give_terminals(stage);
}

/// Gives the container terminals for its processes.
pub fn give_terminals(stage: &Stage) {
    stage.edit(|config| {
        config["mounts"].as_array_mut().expect("list").push(json!({
            "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["newinstance", "ptmxmode=0666", "mode=0620"],
        }));
    });
}

#[test]
fn terminal_is_raw_has_the_users_size_and_is_restored() {
    // A signal just before the shell waits for a line is seen after the wait, which therefore ends.
    let script = "trap 'echo size $(stty size)' WINCH; stty size; echo ready; \
                  while :; do read -t 1 line && [ \"$line\" = end ] && exit 9; done";
    let stage = Stage::new(&["sh", "-c", script]);
    give_terminal(&stage);
    let mut user = User::call(stage.run(&[]), size(33, 111));
    user.screen.see("33 111\r\nready");
    assert!(!user.echoes(), "the terminal is in raw mode");
    user.screen.resize(&size(40, 90));
    user.screen.see("size 40 90");
    user.screen.write("end\r");
    assert_eq!(user.kiln.wait().expect("ends").code(), Some(9));
    assert!(user.echoes(), "the terminal is as it was");
    assert!(stage.is_clean());
}

#[test]
fn terminal_is_restored_after_a_failure() {
    let stage = Stage::new(&["no-such-program"]);
    give_terminal(&stage);
    let mut user = User::call(stage.run(&[]), size(24, 80));
    user.screen.see("no-such-program");
    assert_eq!(user.kiln.wait().expect("ends").code(), Some(127));
    assert!(user.echoes());
}
