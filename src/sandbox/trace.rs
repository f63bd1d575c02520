//! A sandbox's life in the Trace Event Format, which Perfetto and Chrome show.
//!
//! The format is that of "Trace Event Format" (Google, 2016), its JSON object form: `traceEvents` has
//! complete events (`X`), with times of `CLOCK_MONOTONIC` in microseconds, and metadata events (`M`)
//! with names. Each process is one of the host's, by its id; what has no process there, such as a
//! program in the guest, has a track of its own in the monitor's.
//!
//! Each event replaces the file's last bytes with itself and them, in one write. So the file is whole
//! JSON at any moment, and who is killed loses no more than what had not ended yet.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;
use std::{fmt, io};

use serde_json::{Value, json};

use super::phases::now;

/// What the file begins with.
const BEGINNING: &str = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
/// What it ends with.
const END: &str = "\n]}\n";

/// A row of the trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Track {
    /// The process's id on the host.
    pub process: u32,
    /// Which row of the process.
    pub row: u64,
}

/// A trace that is being written; or none, which takes everything and does nothing.
#[derive(Debug, Default)]
pub struct Trace(Option<Writer>);

#[derive(Debug)]
struct Writer {
    file: File,
    /// Where [`END`] begins.
    end: u64,
    /// No event has been written yet.
    is_empty: bool,
}

impl Trace {
    /// Begins a trace in a file of this name, whose content is replaced, if there is a name. What
    /// this process does is on a row that is called `process`.
    ///
    /// # Errors
    /// The file can't be written, or is none that can be written at any place.
    pub fn create(path: Option<&Path>, process: &str) -> io::Result<Self> {
        let Some(path) = path else { return Ok(Self::default()) };
        // A FIFO would be waited for.
        let mut options = File::options();
        options.write(true).create(true).truncate(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file: name one"));
        }
        let mut trace = Self::begin(file)?;
        trace.name_process(std::process::id(), process);
        Ok(trace)
    }

    fn begin(file: File) -> io::Result<Self> {
        file.write_all_at(format!("{BEGINNING}{END}").as_bytes(), 0)?;
        Ok(Self(Some(Writer { file, end: BEGINNING.len() as u64, is_empty: true })))
    }

    /// Goes on with a trace that another process began, and leaves alone from now on.
    ///
    /// # Errors
    /// The file can't be looked at, or is no trace.
    pub fn go_on(file: File) -> io::Result<Self> {
        let no_trace = || io::Error::new(io::ErrorKind::InvalidData, "it is no trace");
        let end = file.metadata()?.len().checked_sub(END.len() as u64).ok_or_else(no_trace)?;
        let is_empty = end == BEGINNING.len() as u64;
        Ok(Self(Some(Writer { file, end, is_empty })))
    }

    /// Gives the file to another process, if there is a trace.
    pub fn hand_over(self) -> Option<File> {
        self.0.map(|writer| writer.file)
    }

    /// Does something that takes time, on this process's own row.
    pub fn timed<T>(&mut self, name: &str, work: impl FnOnce() -> T) -> T {
        let begun = now();
        let done = work();
        let process = std::process::id();
        self.span(Track { process, row: process.into() }, name, begun, now(), json!({}));
        done
    }

    /// What a process is called.
    pub fn name_process(&mut self, process: u32, name: &str) {
        self.name(Track { process, row: process.into() }, "process_name", name);
    }

    /// What a row is called.
    pub fn name_row(&mut self, track: Track, name: &str) {
        self.name(track, "thread_name", name);
    }

    fn name(&mut self, track: Track, kind: &str, name: &str) {
        self.write(|| {
            json!({
                "ph": "M", "name": kind, "pid": track.process, "tid": track.row,
                "args": {"name": name},
            })
        });
    }

    /// Something that has ended, with what else is to be known of it, an object.
    pub fn span(
        &mut self,
        track: Track,
        name: impl fmt::Display,
        begun: Duration,
        ended: Duration,
        more: Value,
    ) {
        let microseconds = |time: Duration| time.as_nanos() as f64 / 1e3;
        self.write(|| {
            json!({
                "ph": "X", "name": name.to_string(), "pid": track.process, "tid": track.row,
                "ts": microseconds(begun),
                "dur": microseconds(ended.saturating_sub(begun)),
                "args": more,
            })
        });
    }

    /// Writes an event, or gives the trace up.
    fn write(&mut self, event: impl FnOnce() -> Value) {
        let Some(writer) = &mut self.0 else { return };
        if let Err(error) = writer.write(&event()) {
            tracing::warn!(%error, "--trace: no more events are written");
            writer.mend();
            self.0 = None;
        }
    }
}

impl Writer {
    fn write(&mut self, event: &Value) -> io::Result<()> {
        let separator = if self.is_empty { "" } else { ",\n" };
        let event = format!("{separator}{event}");
        self.file.write_all_at(format!("{event}{END}").as_bytes(), self.end)?;
        self.end += event.len() as u64;
        self.is_empty = false;
        Ok(())
    }

    /// Takes back what was written of an event that could not be written to its end.
    fn mend(&self) {
        // A file system that refuses this too leaves a file that ends too early.
        let _ = self.file.set_len(self.end);
        let _ = self.file.write_all_at(END.as_bytes(), self.end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(file: &File) -> Vec<Value> {
        let mut text = vec![0; file.metadata().expect("metadata").len() as usize];
        file.read_exact_at(&mut text, 0).expect("read");
        let trace: Value = serde_json::from_slice(&text).expect("whole JSON");
        trace["traceEvents"].as_array().expect("a list").clone()
    }

    #[test]
    fn file_is_whole_after_each_event_and_whoever_writes() {
        let file = tempfile::tempfile().expect("file");
        let own = || file.try_clone().expect("descriptor");
        let mut trace = Trace::begin(own()).expect("begins");
        assert_eq!(events(&file).len(), 0);
        let track = Track { process: 7, row: 7 };
        trace.name_process(7, "kiln \"run\"");
        assert_eq!(events(&file).len(), 1);
        let handed_over = trace.hand_over().expect("a file");
        let mut trace = Trace::go_on(handed_over).expect("goes on");
        let at = Duration::from_micros;
        trace.span(track, "bundle", at(1500), at(2750), json!({"id": "x"}));
        let events = events(&file);
        assert_eq!(events[0]["args"]["name"], "kiln \"run\"");
        let expected = json!({
            "ph": "X", "name": "bundle", "pid": 7, "tid": 7, "ts": 1500.0, "dur": 1250.0,
            "args": {"id": "x"},
        });
        assert_eq!(events[1], expected);
    }

    #[test]
    fn file_that_takes_no_more_stays_whole() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("trace");
        let mut trace = Trace::begin(File::create(&path).expect("made")).expect("begins");
        trace.name_process(1, "one");
        let file = trace.hand_over().expect("a file");
        // One for reading only: every write fails.
        drop(file);
        let file = File::open(&path).expect("opens");
        let mut trace = Trace::go_on(file.try_clone().expect("descriptor")).expect("goes on");
        trace.name_process(2, "two");
        assert!(trace.hand_over().is_none());
        assert_eq!(events(&file).len(), 1);
    }

    #[test]
    fn no_trace_takes_everything() {
        let mut trace = Trace::default();
        trace.name_process(1, "one");
        assert!(trace.hand_over().is_none());
        assert!(Trace::go_on(tempfile::tempfile().expect("file")).is_err());
    }
}
