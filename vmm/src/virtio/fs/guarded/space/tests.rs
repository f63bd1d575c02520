//! Operations on files whose blocks the tests say.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use super::*;

const FILE: u64 = 7;
const DIRECTORY: u64 = 8;

/// A file whose blocks the tests say.
#[derive(Default)]
struct Model {
    blocks: Cell<u64>,
    covers: bool,
}

impl Blocks for Model {
    fn now(&self) -> io::Result<u64> {
        Ok(self.blocks.get())
    }

    fn covers(&self, _offset: u64, _length: u64) -> bool {
        self.covers
    }
}

fn space(limit: u64) -> (Space, Arc<AtomicU32>) {
    let full = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&full);
    let on_full = move || {
        count.fetch_add(1, Ordering::Relaxed);
    };
    (Space::new(limit, Box::new(on_full)), full)
}

fn write(space: &Space, file: &Model, length: u64) -> io::Result<()> {
    let grown = file.blocks.get().saturating_add(length);
    space.grow(FILE, Growth::Written((0, length)), file, || {
        file.blocks.set(grown);
        Ok(())
    })
}

/// Makes the file, whose directory grows by so much.
fn make(space: &Space, directory: &Model, growth: u64) -> io::Result<()> {
    let grown = directory.blocks.get() + growth;
    let made = || {
        directory.blocks.set(grown);
        Ok(())
    };
    space.make(DIRECTORY, directory, made, |()| file(0), &|_| None)
}

/// The guest gets to know the directory, or the file.
fn know(space: &Space, given: Given) {
    space.look_up(|| Ok(()), |()| given, &|_| None).unwrap();
}

fn file(handles: u64) -> Given {
    Given { node: FILE, number: 70, blocks: 0, handles }
}

fn is_refused<T: std::fmt::Debug>(result: io::Result<T>) -> bool {
    result.unwrap_err().raw_os_error() == Some(libc::EDQUOT)
}

#[test]
fn what_goes_beyond_is_refused_before_it_is_done_and_told_once() {
    let (space, full) = space(16 << 10);
    let file = Model::default();
    write(&space, &file, 12 << 10).unwrap();
    assert_eq!(space.room(), 4 << 10);
    assert!(is_refused(write(&space, &file, 5 << 10)));
    assert!(is_refused(write(&space, &file, u64::MAX)));
    assert_eq!((file.blocks.get(), full.load(Ordering::Relaxed)), (12 << 10, 1));
    write(&space, &file, 4 << 10).unwrap();
    assert!(is_refused(make(&space, &Model::default(), 0)));
    assert!(is_refused(space.attach(FILE, 1, &file, || Ok(()))));
}

#[test]
fn what_is_there_already_can_be_written_again() {
    let (space, _) = space(4 << 10);
    let file = Model { covers: true, ..Model::default() };
    write(&space, &file, 4 << 10).unwrap();
    let range = (0, 4 << 10);
    space.grow(FILE, Growth::Written(range), &file, || Ok(())).unwrap();
    assert_eq!(space.room(), 0);
    assert!(is_refused(space.grow(FILE, Growth::Allocated(range), &file, || Ok(()))));
    // One that then grows all the same is the last.
    write(&space, &file, 4 << 10).unwrap();
    assert!(is_refused(write(&space, &file, 4 << 10)));
}

#[test]
fn some_of_it_is_written_where_all_is_too_much() {
    let (space, _) = space(64 << 10);
    let file = Model::default();
    let copy = |length| {
        space.grow_some(FILE, length, &file, |length| {
            file.blocks.set(file.blocks.get() + length);
            Ok(length)
        })
    };
    assert_eq!(copy(1 << 40).unwrap(), 56 << 10);
    assert!(is_refused(copy(1)));
}

#[test]
fn a_file_that_is_gone_gives_back_what_was_added() {
    let (space, _) = space(64 << 10);
    let model = Model { blocks: Cell::new(1 << 20), ..Model::default() };
    make(&space, &Model::default(), 0).unwrap();
    space.open(FILE, || Ok(())).unwrap();
    write(&space, &model, 32 << 10).unwrap();
    let used = (32 << 10) + INODE;
    assert_eq!(space.room(), (64 << 10) - used);
    // The guest still has a reference.
    space.forget(FILE, || true, || true);
    // Its name is gone, but it is open.
    space.forget(FILE, || true, || false);
    assert_eq!(space.room(), (64 << 10) - used);
    space.closed(FILE);
    assert_eq!(space.room(), 64 << 10);
    space.closed(FILE);
    assert_eq!(space.room(), 64 << 10);
}

#[test]
fn a_file_that_still_has_a_name_gives_nothing_back() {
    let (space, _) = space(64 << 10);
    know(&space, file(0));
    write(&space, &Model::default(), 32 << 10).unwrap();
    space.forget(FILE, || false, || false);
    assert_eq!(space.room(), 32 << 10);
    // Known again, it has nothing that the guest is known to have added.
    know(&space, file(0));
    space.forget(FILE, || true, || false);
    assert_eq!(space.room(), 32 << 10);
}

#[test]
fn a_handle_that_is_being_given_keeps_the_file() {
    let (space, _) = space(64 << 10);
    know(&space, file(0));
    write(&space, &Model::default(), 32 << 10).unwrap();
    let (begun, begins) = channel();
    let (ended, ends) = channel();
    std::thread::scope(|scope| {
        let space = &space;
        scope.spawn(move || {
            begins.recv().unwrap();
            space.forget(FILE, || true, || false);
            ended.send(()).unwrap();
        });
        let open = || {
            begun.send(()).unwrap();
            // It waits for the open to be done.
            let early = ends.recv_timeout(Duration::from_millis(200));
            early.unwrap_err();
            Ok(())
        };
        space.open(FILE, open).unwrap();
    });
    assert_eq!(space.room(), 32 << 10);
    space.closed(FILE);
    assert_eq!(space.room(), 64 << 10);
}

#[test]
fn what_is_made_counts_with_its_blocks_and_its_directorys() {
    let (space, _) = space(64 << 10);
    let directory = Model::default();
    know(&space, Given { node: DIRECTORY, number: 80, ..file(0) });
    make(&space, &directory, 4096).unwrap();
    assert_eq!(space.room(), (60 << 10) - INODE);
    let with_blocks = |_: &()| Given { node: 9, number: 90, blocks: 4096, handles: 0 };
    space.make(DIRECTORY, &directory, || Ok(()), with_blocks, &|_| None).unwrap();
    assert_eq!(space.room(), (56 << 10) - 2 * INODE);
    // The directory keeps its size until it is gone itself.
    space.forget(FILE, || true, || false);
    space.forget(9, || true, || false);
    assert_eq!(space.room(), 60 << 10);
    space.forget(DIRECTORY, || true, || false);
    assert_eq!(space.room(), 64 << 10);
}

#[test]
fn what_may_have_been_made_counts_although_it_failed() {
    let (space, _) = space(64 << 10);
    let fail = |error| {
        let directory = Model::default();
        let made = || Err::<(), _>(errno(error));
        space.make(DIRECTORY, &directory, made, |()| file(0), &|_| None).unwrap_err();
        space.room()
    };
    assert_eq!(fail(libc::EEXIST), 64 << 10);
    assert_eq!(fail(libc::ENFILE), (60 << 10) - INODE);
}

#[test]
fn a_file_that_is_forgotten_while_it_is_written_counts_at_the_most() {
    struct Forgotten(Cell<bool>);
    impl Blocks for Forgotten {
        fn now(&self) -> io::Result<u64> {
            if self.0.replace(true) { Err(errno(libc::EBADF)) } else { Ok(0) }
        }

        fn covers(&self, _offset: u64, _length: u64) -> bool {
            false
        }
    }
    let (space, _) = space(64 << 10);
    let growth = Growth::Written((0, 5000));
    space.grow(FILE, growth, &Forgotten(Cell::new(false)), || Ok(())).unwrap();
    assert_eq!(space.room(), 56 << 10);
}

#[test]
fn names_are_moved_until_the_limit_is_exceeded() {
    let (space, _) = space(4 << 10);
    let directory = Model::default();
    let rename = |makes| {
        let grown = directory.blocks.get() + 4096;
        space.rename(DIRECTORY, makes, &directory, || {
            directory.blocks.set(grown);
            Ok(())
        })
    };
    assert!(is_refused(rename(true)));
    rename(false).unwrap();
    rename(false).unwrap();
    assert!(is_refused(rename(false)));
}

#[test]
fn attributes_count_with_their_blocks() {
    let (space, _) = space(64 << 10);
    let model = Model::default();
    know(&space, file(0));
    let set = || {
        model.blocks.set(4096);
        Ok(())
    };
    space.attach(FILE, 100, &model, set).unwrap();
    assert_eq!(space.room(), (60 << 10) - 100);
    space.forget(FILE, || true, || false);
    assert_eq!(space.room(), (64 << 10) - 100);
}

#[test]
fn cutting_gives_back_no_more_than_was_added() {
    let (space, _) = space(64 << 10);
    know(&space, file(0));
    let file = Model { blocks: Cell::new(1 << 20), ..Model::default() };
    write(&space, &file, 8 << 10).unwrap();
    let cut = |to| {
        space.cut(FILE, &file, || {
            file.blocks.set(to);
            Ok(())
        })
    };
    cut((1 << 20) + 4096).unwrap();
    assert_eq!(space.room(), 60 << 10);
    cut(0).unwrap();
    assert_eq!(space.room(), 64 << 10);
}
