//! The tap: checked, set up, read and written.
//!
//! Source: `include/uapi/linux/if_tun.h`, `drivers/net/tun.c`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::header::{self, Header};
use crate::virtio::buffers::{Bytes, MAX_PIECES};

/// The offloads of every tap.
const OFFLOADS: u32 = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
/// Those that came with Linux 6.2.
const UDP_OFFLOADS: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// Why a network device can't be made.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// The address is a group's or that of nobody.
    #[error(
        "mac {0:02x?} is no address of one interface: its first byte must be even, and not all be 0"
    )]
    Mac([u8; 6]),
    /// Not an MTU.
    #[error("mtu {0} is less than 68, the least that IPv4 works with")]
    Mtu(u16),
    /// The descriptor is something else.
    #[error(
        "the descriptor is no tap with packet headers: attach it with IFF_TAP, IFF_NO_PI and \
         IFF_VNET_HDR"
    )]
    NotTap,
    /// The host.
    #[error("can't {what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl NewError {
    pub(super) fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// A tap interface's descriptor.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    offloads: u32,
    has_uso: bool,
}

impl Tap {
    /// Takes a descriptor that is attached to a tap interface, and finds out what it can do. It
    /// begins without offloads.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, NewError> {
        if !is_tap(fd.as_fd()) {
            return Err(NewError::NotTap);
        }
        rustix::io::ioctl_fionbio(&fd, true)
            .map_err(|error| NewError::host("make the tap non-blocking")(error.into()))?;
        let size = header::SIZE as libc::c_int;
        // SAFETY: the kernel reads an int, which outlives the call.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
        outcome(done).map_err(NewError::host("set the size of the tap's headers"))?;
        let mut tap = Self { fd, offloads: 0, has_uso: true };
        tap.has_uso = tap.set_offloads(OFFLOADS | UDP_OFFLOADS).is_ok();
        tap.set_offloads(0).map_err(NewError::host("set the tap's offloads"))?;
        Ok(tap)
    }

    pub(super) fn has_uso(&self) -> bool {
        self.has_uso
    }

    pub(super) fn offloads(&self) -> u32 {
        self.offloads
    }

    /// Sets what the kernel may leave to the reader.
    pub(super) fn set_offloads(&mut self, offloads: u32) -> io::Result<()> {
        let flags = libc::c_ulong::from(offloads);
        // SAFETY: the argument is a number.
        outcome(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, flags) })?;
        self.offloads = offloads;
        Ok(())
    }

    /// Sends a frame. The header is this process's own, so that what was checked is what is sent.
    ///
    /// # Errors
    /// `WouldBlock` if the tap takes no more now; anything else is about this frame.
    pub(super) fn send(&self, header: &Header, frame: &Bytes<'_>) -> io::Result<()> {
        let header =
            libc::iovec { iov_base: header.0.as_ptr().cast_mut().cast(), iov_len: header.0.len() };
        let pieces: Vec<_> = [header].into_iter().chain(frame.pieces()).collect();
        self.transfer(&pieces, |fd, pieces, count| {
            // SAFETY: the header outlives the call, the other pieces lie in guest memory, which
            // stays mapped while it is borrowed; the kernel only reads them.
            unsafe { libc::writev(fd, pieces, count) }
        })?;
        Ok(())
    }

    /// Takes a frame: its header, as much of it as there is room for, and what is left in `rest`.
    /// Returns its length, or that of the room if that is less.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; anything else means that there will be none any more.
    pub(super) fn receive<'m>(
        &self,
        header: &mut Header,
        room: impl Iterator<Item = &'m Bytes<'m>>,
        rest: &mut [u8],
    ) -> io::Result<usize> {
        let own = |bytes: &mut [u8]| libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let mut pieces = vec![own(&mut header.0)];
        pieces.extend(room.flat_map(Bytes::pieces));
        pieces.push(own(rest));
        let length = self.transfer(&pieces, |fd, pieces, count| {
            // SAFETY: header and rest are exclusively borrowed; the other pieces lie in guest
            // memory, which is written through raw pointers only.
            unsafe { libc::readv(fd, pieces, count) }
        })?;
        length.checked_sub(header::SIZE).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn transfer(
        &self,
        pieces: &[libc::iovec],
        call: impl Fn(libc::c_int, *const libc::iovec, libc::c_int) -> isize,
    ) -> io::Result<usize> {
        // Lossless: nobody passes more pieces than the system call takes.
        debug_assert!(pieces.len() <= MAX_PIECES);
        let count = pieces.len() as libc::c_int;
        loop {
            let done = call(self.fd.as_raw_fd(), pieces.as_ptr(), count);
            match usize::try_from(done) {
                Ok(done) => return Ok(done),
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn is_tap(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: an interface request of zeroes is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the request, which outlives the call.
    let got = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    // SAFETY: the kernel has filled this member; before, it was a valid one of zeroes.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    got == 0 && flags & needed == needed
}

fn outcome(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
