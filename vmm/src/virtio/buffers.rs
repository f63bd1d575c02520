//! A descriptor chain as the guest memory behind it, and transfers between that memory and files.
//!
//! Devices see a request as two lists of bytes, what they may read and what they may write, however
//! the driver has cut it into descriptors (virtio 1.2, section 2.7.4). Data goes straight between
//! guest memory and a descriptor, without a copy in this process.
//!
//! Every address and length is checked against guest memory here, once. The memory's *content* may
//! change at any time: what a device decides on is copied first.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, GuestMemory as _, VolatileSlice};

use crate::GuestMemory;

/// Most pieces of memory that one system call takes (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

/// A descriptor chain whose every byte lies in guest memory.
#[derive(Debug)]
pub struct Buffers<'m> {
    /// What the device may read.
    pub readable: Bytes<'m>,
    /// What the device may write.
    pub writable: Bytes<'m>,
}

/// Why a descriptor chain can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor names memory that the guest doesn't have.
    #[error("descriptor outside of guest memory: {length} bytes at {address:#x}")]
    OutOfMemory {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        length: u32,
    },
    /// A readable descriptor follows a writable one (forbidden by virtio 1.2, section 2.7.4.2).
    #[error("readable descriptor behind a writable one")]
    Order,
}

impl<'m> Buffers<'m> {
    /// Collects a chain. The chain's iterator bounds its length by the size of its table, so one
    /// that loops ends.
    ///
    /// # Errors
    /// A chain that breaks virtio's rules.
    pub fn collect(
        memory: &'m GuestMemory,
        chain: impl Iterator<Item = Descriptor>,
    ) -> Result<Self, ChainError> {
        let mut buffers = Self { readable: Bytes::default(), writable: Bytes::default() };
        for descriptor in chain {
            if descriptor.is_write_only() {
                buffers.writable.append(memory, &descriptor)?;
            } else if buffers.writable.is_empty() {
                buffers.readable.append(memory, &descriptor)?;
            } else {
                return Err(ChainError::Order);
            }
        }
        Ok(buffers)
    }
}

/// Bytes of guest memory, in pieces.
#[derive(Debug, Clone, Default)]
pub struct Bytes<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    length: usize,
}

impl<'m> Bytes<'m> {
    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// In how many pieces they lie.
    pub fn piece_count(&self) -> usize {
        self.pieces.len()
    }

    /// The pieces as system calls take them. They may be used while the bytes are borrowed.
    pub fn pieces(&self) -> impl Iterator<Item = libc::iovec> {
        self.pieces.iter().map(|piece| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        })
    }

    fn append(
        &mut self,
        memory: &'m GuestMemory,
        descriptor: &Descriptor,
    ) -> Result<(), ChainError> {
        let (address, length) = (descriptor.addr(), descriptor.len());
        for piece in memory.get_slices(address, length as usize) {
            let piece = piece
                .map_err(|_| ChainError::OutOfMemory { address: address.raw_value(), length })?;
            self.push(piece);
        }
        Ok(())
    }

    fn push(&mut self, piece: VolatileSlice<'m>) {
        self.length += piece.len();
        self.pieces.push(piece);
    }

    /// Takes the first `count` bytes away, or all there are.
    #[must_use]
    pub fn take_front(&mut self, count: usize) -> Self {
        let mut front = Self::default();
        let mut whole = 0;
        for piece in &self.pieces {
            let wanted = count - front.length;
            match piece.split_at(wanted.min(piece.len())) {
                Ok((head, tail)) if !tail.is_empty() => {
                    if !head.is_empty() {
                        front.push(head);
                    }
                    self.pieces[whole] = tail;
                    break;
                }
                _ => {
                    front.push(*piece);
                    whole += 1;
                }
            }
        }
        self.pieces.drain(..whole);
        self.length -= front.length;
        front
    }

    /// Takes the last byte away.
    #[must_use]
    pub fn take_last(&mut self) -> Option<Self> {
        let all_but_one = self.length.checked_sub(1)?;
        let front = self.take_front(all_but_one);
        Some(std::mem::replace(self, front))
    }

    /// Copies the first bytes out, as many as `target` holds or there are, and takes them away.
    /// Returns how many.
    pub fn read(&mut self, target: &mut [u8]) -> usize {
        let front = self.take_front(target.len());
        let mut done = 0;
        for piece in &front.pieces {
            done += piece.copy_to(&mut target[done..]);
        }
        done
    }

    /// Copies `source` over the first bytes, as many as there are, and takes them away. Returns how
    /// many.
    pub fn write(&mut self, source: &[u8]) -> usize {
        let front = self.take_front(source.len());
        let mut done = 0;
        for piece in &front.pieces {
            let count = piece.len();
            piece.copy_from(&source[done..done + count]);
            done += count;
        }
        done
    }

    /// Sends the bytes on a stream socket without waiting and without `SIGPIPE`, and takes away
    /// what was sent. Returns how many were.
    ///
    /// # Errors
    /// `WouldBlock` if none fitted.
    pub fn send_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        self.transfer(usize::MAX, |pieces| {
            let message = message(pieces);
            // SAFETY: the message's pieces lie in guest memory, which stays mapped while it is
            // borrowed; the kernel only reads them.
            unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) }
        })
    }

    /// Receives at most `limit` bytes from a stream socket without waiting, and takes away the bytes
    /// that were filled. Returns how many were; 0 is end of file, or nothing to fill.
    ///
    /// # Errors
    /// `WouldBlock` if nothing is there.
    pub fn receive_from(&mut self, socket: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        self.transfer(limit, |pieces| {
            let mut message = message(pieces);
            // SAFETY: as in `send_to`; guest memory is written through raw pointers only, nothing
            // in this process holds a reference into it.
            unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
        })
    }

    /// Writes all the bytes to a file, from `offset` on.
    ///
    /// # Errors
    /// What `pwritev` gives; `WriteZero` if the file takes no more.
    pub fn write_all_at(mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.transfer_all(offset, io::ErrorKind::WriteZero, |pieces, count, offset| {
            // SAFETY: as in `send_to`.
            unsafe { libc::pwritev64(file.as_raw_fd(), pieces, count, offset) }
        })
    }

    /// Fills all the bytes from a file, from `offset` on.
    ///
    /// # Errors
    /// What `preadv` gives; `UnexpectedEof` if the file is shorter.
    pub fn read_all_at(mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.transfer_all(offset, io::ErrorKind::UnexpectedEof, |pieces, count, offset| {
            // SAFETY: as in `receive_from`.
            unsafe { libc::preadv64(file.as_raw_fd(), pieces, count, offset) }
        })
    }

    fn transfer_all(
        &mut self,
        mut offset: u64,
        at_end: io::ErrorKind,
        call: impl Fn(*const libc::iovec, libc::c_int, i64) -> isize,
    ) -> io::Result<()> {
        while !self.is_empty() {
            let start = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let done = self.transfer(usize::MAX, |pieces| {
                call(pieces.as_ptr(), libc::c_int::try_from(pieces.len()).unwrap_or(0), start)
            });
            match done {
                Ok(0) => return Err(at_end.into()),
                Ok(done) => offset = offset.saturating_add(done as u64),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes one system call over as many pieces as it takes, `limit` bytes at most.
    fn transfer(
        &mut self,
        mut limit: usize,
        call: impl FnOnce(&mut [libc::iovec]) -> isize,
    ) -> io::Result<usize> {
        let mut pieces: Vec<libc::iovec> = self
            .pieces()
            .take(MAX_PIECES)
            .map(|piece| {
                let iov_len = piece.iov_len.min(limit);
                limit -= iov_len;
                libc::iovec { iov_len, ..piece }
            })
            .collect();
        let done = call(&mut pieces);
        let done = usize::try_from(done).map_err(|_| io::Error::last_os_error())?;
        let _ = self.take_front(done);
        Ok(done)
    }
}

fn message(pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: a message header of zeroes is a valid one without address and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    message
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;

    const WRITE: u16 = 2;

    /// Two regions that touch at 0x4000, so that a descriptor may lie in both.
    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)])
            .expect("memory")
    }

    fn readable<'m>(memory: &'m GuestMemory, pieces: &[(u64, u32)]) -> Bytes<'m> {
        let chain = pieces.iter().map(|(address, length)| Descriptor::new(*address, *length, 0, 0));
        Buffers::collect(memory, chain).expect("valid").readable
    }

    #[test]
    fn descriptors_are_checked() {
        let memory = memory();
        let collect = |descriptors: &[Descriptor]| {
            Buffers::collect(&memory, descriptors.iter().copied()).map(|_| ())
        };
        let write = Descriptor::new(0, 8, WRITE, 0);
        let read = Descriptor::new(0, 8, 0, 0);
        assert_eq!(collect(&[read, write]), Ok(()));
        assert_eq!(collect(&[write, read]), Err(ChainError::Order));
        for (address, length) in [(0x7fff, 2), (u64::MAX, 1), (u64::MAX, u32::MAX), (0, 0x8001)] {
            assert_eq!(
                collect(&[Descriptor::new(address, length, 0, 0)]),
                Err(ChainError::OutOfMemory { address, length })
            );
        }
        assert_eq!(collect(&[Descriptor::new(u64::MAX, 0, 0, 0)]), Ok(()));
    }

    #[test]
    fn data_passes_through_files_and_sockets() {
        let memory = memory();
        let content: Vec<u8> = (0..0x2000u32).map(|n| (n / 7) as u8).collect();
        memory.write_slice(&content, GuestAddress(0x3000)).expect("in memory");

        let mut file = tempfile::tempfile().expect("file");
        let pieces = [(0x3000, 0x1800), (0x4800, 0x800)];
        readable(&memory, &pieces).write_all_at(file.as_fd(), 512).expect("writes");
        let mut back = Vec::new();
        file.rewind().expect("rewinds");
        file.read_to_end(&mut back).expect("reads");
        assert!(back[512..] == content);

        let zeroes = vec![0; 0x2000];
        memory.write_slice(&zeroes, GuestAddress(0x3000)).expect("in memory");
        readable(&memory, &pieces).read_all_at(file.as_fd(), 512).expect("reads");
        let mut back = vec![0; 0x2000];
        memory.read_slice(&mut back, GuestAddress(0x3000)).expect("in memory");
        assert!(back == content);
        let past_the_end = readable(&memory, &[(0, 0x2000)]).read_all_at(file.as_fd(), 513);
        let error = past_the_end.expect_err("short");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);

        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        let mut bytes = readable(&memory, &pieces);
        assert_eq!(bytes.send_to(theirs.as_fd()).expect("sends"), 0x2000);
        assert!(bytes.is_empty());
        let mut back = vec![0; 0x2000];
        ours.read_exact(&mut back).expect("reads");
        assert!(back == content);

        ours.write_all(b"abc").expect("writes");
        let mut bytes = readable(&memory, &[(0x10, 2), (0x20, 2)]);
        assert_eq!(bytes.receive_from(theirs.as_fd(), 100).expect("receives"), 3);
        assert_eq!(bytes.len(), 1);
        let error = bytes.receive_from(theirs.as_fd(), 100).expect_err("nothing there");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(ours);
        assert_eq!(bytes.receive_from(theirs.as_fd(), 100).expect("end of file"), 0);
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_bytes(
            lengths in prop::collection::vec(0u32..100, 0..20),
            cuts in prop::collection::vec(0usize..200, 0..20),
        ) {
            let memory = memory();
            let content: Vec<u8> = (0..2000u32).map(|n| n as u8).collect();
            memory.write_slice(&content, GuestAddress(0x3c00)).expect("in memory");
            let mut address = 0x3c00;
            let pieces: Vec<_> = lengths.iter().map(|length| {
                let piece = (address, *length);
                address += u64::from(*length);
                piece
            }).collect();
            let total = (address - 0x3c00) as usize;
            let mut bytes = readable(&memory, &pieces);
            let mut back = Vec::new();
            for cut in cuts {
                let before = bytes.len();
                let mut front = bytes.take_front(cut);
                prop_assert_eq!(front.len(), cut.min(before));
                prop_assert_eq!(bytes.len(), before - front.len());
                let mut part = vec![0; front.len()];
                prop_assert_eq!(front.read(&mut part), part.len());
                back.extend(part);
            }
            if let Some(mut last) = bytes.take_last() {
                let mut rest = vec![0; bytes.len() + 1];
                bytes.read(&mut rest);
                let length = rest.len();
                last.read(&mut rest[length - 1..]);
                back.extend(rest);
            }
            prop_assert_eq!(&back[..], &content[..total]);
        }
    }
}
