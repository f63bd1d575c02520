//! The virtio devices, between a hostile driver and a host that does this and that.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use kiln_vmm::config::RateConfig;
use kiln_vmm::virtio::balloon::Balloon;
use kiln_vmm::virtio::block::Block;
use kiln_vmm::virtio::console::{Console, Size};
use kiln_vmm::virtio::net::{Net, Settings};
use kiln_vmm::virtio::rng::Rng;
use kiln_vmm::virtio::vsock::Vsock;
use kiln_vmm::virtio::vsock::broker::Broker;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::driver::Driver;
use crate::input::Input;

/// Size of the disk: some sectors and a part of one.
const DISK: u64 = 64 * 512 + 100;
/// The guest's context id, and the port of the host that it may connect to.
const CID: u64 = 3;
const PORT: u32 = 1024;
/// The most bytes that the host reads or writes at once.
const PIECE: usize = 4096;
/// The most connections that the host holds.
const CONNECTIONS: usize = 8;

/// virtio-balloon.
pub fn balloon(script: &[u8]) {
    let mut device = Balloon::new();
    Driver::new(&mut device).play(script, &mut |_| {});
}

/// virtio-blk; the first byte says whether the disk is read-only.
pub fn block(script: &[u8]) {
    let read_only = script.first().is_some_and(|byte| byte & 1 != 0);
    let disk = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
    let disk = File::from(disk);
    disk.set_len(DISK).expect("sized");
    let kept = disk.try_clone().expect("cloned");
    let mut device = Block::new(disk, read_only, "fuzzed").expect("a disk");
    Driver::new(&mut device).play(script.get(1..).unwrap_or_default(), &mut |_| {});
    assert_eq!(kept.metadata().expect("its size").len(), DISK, "the disk has another size");
}

/// virtio-console.
pub fn console(script: &[u8]) {
    let (input, mut to_guest) = UnixStream::pair().expect("sockets");
    let (output, mut from_guest) = UnixStream::pair().expect("sockets");
    for stream in [&to_guest, &from_guest] {
        stream.set_nonblocking(true).expect("non-blocking");
    }
    let size = Some(Size { columns: 80, rows: 25 });
    let mut device = Console::new(Some(input.into()), Some(output.into()), size).expect("made");
    let mut host = |script: &mut Input<'_>| match script.below(4) {
        0 | 1 => {
            let count = script.below(64);
            let _ = to_guest.write(script.bytes(count));
        }
        2 => {
            let _ = from_guest.read(&mut [0; PIECE]);
        }
        _ => {
            let _ = to_guest.shutdown(Shutdown::Both);
        }
    };
    Driver::new(&mut device).play(script, &mut host);
}

/// virtio-net, on a tap in a network namespace of this thread's own.
pub fn network(script: &[u8]) {
    let tap = TAP.with(|tap| tap.try_clone().expect("cloned"));
    let settings = Settings {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1500),
        receive: RateConfig::default(),
        transmit: RateConfig::default(),
    };
    let mut device = Net::new(tap.into(), settings).expect("a device");
    Driver::new(&mut device).play(script, &mut |_| {});
}

thread_local! {
    static TAP: File = make_tap();
}

fn make_tap() -> File {
    // SAFETY: no file descriptor table is unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("needs root");
    let tap = File::options().read(true).write(true).open("/dev/net/tun").expect("a tap");
    // SAFETY: all-zero bytes are a valid `struct ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request takes a `struct ifreq`, which lives for the call.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    tap
}

/// virtio-rng.
pub fn rng(script: &[u8]) {
    let mut device = Rng::new();
    Driver::new(&mut device).play(script, &mut |_| {});
}

/// virtio-vsock.
pub fn vsock(script: &[u8]) {
    let (broker, device_end) = Broker::pair().expect("sockets");
    let mut device = Vsock::new(CID, &[PORT], device_end).expect("made");
    let mut host = Monitor { broker, streams: Vec::new() };
    Driver::new(&mut device).play(script, &mut |script| host.act(script));
}

/// The monitor's side of vsock.
struct Monitor {
    broker: Broker,
    streams: Vec<UnixStream>,
}

impl Monitor {
    fn act(&mut self, script: &mut Input<'_>) {
        let action = script.below(7);
        if action < 2 && self.streams.len() < CONNECTIONS {
            let stream = match action {
                0 => self.broker.try_connect(u32::from(script.u8())),
                _ => self.broker.try_accept().map(|accepted| accepted.expect("it lives").1),
            };
            let Ok(stream) = stream else { return };
            stream.set_nonblocking(true).expect("non-blocking");
            self.streams.push(stream);
            return;
        }
        if self.streams.is_empty() {
            return;
        }
        let chosen = script.below(self.streams.len());
        let mut stream = &self.streams[chosen];
        match action {
            2 => drop(self.streams.swap_remove(chosen)),
            3 => {
                let _ = stream.shutdown(Shutdown::Write);
            }
            4 => {
                let _ = stream.read(&mut [0; PIECE]);
            }
            _ => {
                let piece = [script.u8(); PIECE];
                let _ = stream.write(&piece[..usize::from(script.u16()) % PIECE]);
            }
        }
    }
}
