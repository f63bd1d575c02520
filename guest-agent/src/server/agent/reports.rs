//! What processes report on their way to their program, and their ends.

use std::io;
use std::os::fd::OwnedFd;

use kiln_protocol::{ExitStatus, FailurePhase, FromAgent};

use super::{Agent, launching};
use crate::console;
use crate::container::channel::Report;
use crate::container::launch;
use crate::failure::Failure;
use crate::guest::share;
use crate::server::process::{Process, ProcessName, State, exit_status};
use crate::server::streams::Endpoint;
use crate::stream::make_non_blocking;

impl Agent {
    /// Reads what a process reports, by its channel's token.
    pub(super) fn on_channel(&mut self, token: u64) -> io::Result<()> {
        match self.find(|process| process.channel_token == token) {
            Some(name) => self.read_reports(&name),
            None => Ok(()),
        }
    }

    fn read_reports(&mut self, name: &ProcessName) -> io::Result<()> {
        loop {
            let Some(process) = self.process_mut(name) else {
                return Ok(());
            };
            let Some(channel) = &process.channel else {
                return Ok(());
            };
            match channel.take_report() {
                Ok(Some((Report::Ready, master))) => self.on_ready(name, master)?,
                Ok(Some((Report::Failed(failure), _))) => self.give_up(name, failure),
                // Comes before the process is listed, and then no more.
                Ok(Some((Report::Born { .. }, _))) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Ok(None) | Err(_) => {
                    process.channel = None;
                    if process.state == State::Starting {
                        self.on_started(name)?;
                    }
                    return Ok(());
                }
            }
        }
    }

    fn on_ready(&mut self, name: &ProcessName, master: Option<OwnedFd>) -> io::Result<()> {
        let Some(process) = self.process_mut(name) else {
            return Ok(());
        };
        if let Err(failure) = launch::constrain(&process.plan, process.pid) {
            self.give_up(name, failure);
            return Ok(());
        }
        process.state = State::Created;
        if let (Some(master), Some(token)) = (master, process.tokens.first().copied()) {
            make_non_blocking(&master)?;
            process.terminal = Some(master.try_clone()?);
            self.offer(token, name, Endpoint::Terminal(master))?;
        }
        if name.exec.is_some() {
            self.process_mut(name).map(launching::execute);
            return Ok(());
        }
        console::say(format_args!("{name}: set up"));
        self.send(&FromAgent::Created { container: name.container.clone() })?;
        self.on_memory_event(&name.container)
    }

    fn on_started(&mut self, name: &ProcessName) -> io::Result<()> {
        if let Some(process) = self.process_mut(name) {
            process.state = State::Running;
        }
        console::say(format_args!("{name}: started"));
        self.send(&name.clone().started())
    }

    /// Ends a process that is not going to run its program. The host is told when it has ended.
    pub(super) fn give_up(&mut self, name: &ProcessName, failure: Failure) {
        console::say(format_args!("{name}: {failure}"));
        if let Some(process) = self.process_mut(name) {
            process.failure.get_or_insert(failure);
            process.channel = None;
            process.signal(libc::SIGKILL);
        }
    }

    /// Collects every child that has ended.
    pub(super) fn reap(&mut self) -> io::Result<()> {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        loop {
            let mut status = 0;
            // SAFETY: the pointer is to a live int.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                return Ok(());
            }
            if let Some(name) = self.find(|process| process.has_id(pid)) {
                self.on_end(name, status)?;
            }
        }
    }

    fn on_end(&mut self, name: ProcessName, status: libc::c_int) -> io::Result<()> {
        // What the process said last comes before its end.
        self.read_reports(&name)?;
        let Some(container) = self.containers.get_mut(&name.container) else {
            return Ok(());
        };
        self.relays.end_input(&name);
        let status = exit_status(status);
        match name.exec {
            None if container.plan.namespaces.shares_processes() => {
                // What it leaves lives in another container's PID namespace, and doesn't end with it.
                container.first.reaped = true;
                container.ended = Some(status);
                if let Err(error) = container.cgroup.kill() {
                    console::say(format_args!("{name}: what it leaves is not killed: {error}"));
                }
                self.end_if_over(&name.container)
            }
            None => self.on_end_of_container(name, status),
            Some(exec) => {
                let Some(process) = container.execs.remove(&exec) else { return Ok(()) };
                let container = name.container.clone();
                self.report_end(name, &process, status, false)?;
                self.end_if_over(&container)
            }
        }
    }

    /// Ends a container whose first process has ended, once nothing else of it is left.
    pub(super) fn end_if_over(&mut self, container: &str) -> io::Result<()> {
        let ended = self.containers.get(container).filter(|container| container.is_over());
        match ended.and_then(|container| container.ended) {
            Some(status) => self.on_end_of_container(ProcessName::first(container), status),
            None => Ok(()),
        }
    }

    fn on_end_of_container(&mut self, name: ProcessName, status: ExitStatus) -> io::Result<()> {
        self.on_memory_event(&name.container)?;
        let Some(container) = self.containers.remove(&name.container) else {
            return Ok(());
        };
        for request in container.pausing {
            let why = "the container has ended".to_owned();
            self.answer(&name.container, request, Err(why))?;
        }
        if !self.containers.is_empty() {
            share::forget_unused(&self.environment.share);
        }
        self.report_end(name, &container.first, status, container.oom_kills > 0)
    }

    fn report_end(
        &mut self,
        name: ProcessName,
        process: &Process,
        status: ExitStatus,
        oom_killed: bool,
    ) -> io::Result<()> {
        if let Some(failure) = failure_of(process, || format!("ended in its set-up ({status:?})")) {
            self.streams.cancel(&process.tokens);
            return self.send(&name.failed(failure));
        }
        console::say(format_args!("{name}: ended ({status:?})"));
        let ProcessName { container, exec } = name;
        self.send(&match exec {
            None => FromAgent::Exited { container, status, oom_killed },
            Some(exec) => FromAgent::ExecExited { container, exec, status },
        })
    }
}

fn failure_of(process: &Process, end: impl FnOnce() -> String) -> Option<Failure> {
    let unexplained = (process.state == State::Creating)
        .then(|| Failure::new(FailurePhase::Process, format!("the process {}", end())));
    process.failure.clone().or(unexplained)
}
