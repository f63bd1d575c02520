//! A tap interface in a network namespace of the test's own, and its other side.
//!
//! Needs root, `/dev/net/tun` and `ip`. Meant to be included by tests: in `vmm/src` and `vmm/tests`.

#![allow(dead_code, reason = "no test needs all of this")]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

/// The interface's name.
pub const NAME: &str = "tap0";

/// The Ethernet type of frames that no protocol takes (IEEE's "local experimental").
pub const EXPERIMENTAL: u16 = 0x88b5;

/// How long something is waited for that must come.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// Takes the calling thread to a new network namespace in which there are a loopback interface and a
/// tap, both up, and returns the tap. Threads and processes that it starts from now on are there too.
pub fn in_a_new_namespace(mtu: u16) -> OwnedFd {
    // SAFETY: plain numbers.
    let left = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(left, 0, "needs root: {}", io::Error::last_os_error());
    let tap = attach();
    // Nothing but what the test sends shall pass the interface.
    set_ipv6(false);
    ip(&format!("link set {NAME} mtu {mtu} up"));
    ip("link set lo up");
    tap
}

/// Switches IPv6 on the interface on or off; it is off at first.
pub fn set_ipv6(on: bool) {
    let file = format!("/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6");
    fs::write(file, if on { "0" } else { "1" }).expect("the host's kernel must have IPv6");
}

fn attach() -> OwnedFd {
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    let tun = OwnedFd::from(tun.expect("these tests need /dev/net/tun"));
    // SAFETY: an interface request of zeroes is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads and fills the request, which outlives the call.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(made, 0, "no tap: {}", io::Error::last_os_error());
    tun
}

/// Runs `ip` in the namespace.
pub fn ip(arguments: &str) {
    let ran = Command::new("ip").args(arguments.split(' ')).status().expect("iproute2 is needed");
    assert!(ran.success(), "ip {arguments}");
}

/// Packets and bytes that the interface got from its tap, and gave to it.
pub fn counters() -> [(u64, u64); 2] {
    let lines = fs::read_to_string("/proc/thread-self/net/dev").expect("readable");
    let line = lines.lines().find_map(|line| line.trim().strip_prefix(&format!("{NAME}:")));
    let numbers: Vec<u64> =
        line.expect("there").split_whitespace().map(|n| n.parse().expect("number")).collect();
    [(numbers[1], numbers[0]), (numbers[9], numbers[8])]
}

/// A socket that sends frames to the tap and gets all that come from it.
pub struct Wire(OwnedFd);

impl Wire {
    /// The tap's other side, for frames of one Ethernet type.
    pub fn of(ethernet_type: u16) -> Self {
        let protocol = ethernet_type.to_be();
        // SAFETY: plain numbers.
        let socket = unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into())
        };
        assert!(socket >= 0, "needs root: {}", io::Error::last_os_error());
        // SAFETY: the call has just returned it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let name = std::ffi::CString::new(NAME).expect("no zero");
        // SAFETY: an address of zeroes is a valid one.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        // SAFETY: the name ends with a zero.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address is as long as is said.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        Self(socket)
    }

    /// Sends a frame to the tap.
    pub fn send(&self, frame: &[u8]) {
        self.try_send(frame).expect("sent");
    }

    /// The same for a tap that may have gone.
    pub fn try_send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the frame is as long as is said.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        assert_eq!(sent, frame.len() as isize);
        Ok(())
    }

    /// A frame from the tap that has come.
    pub fn try_receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: the buffer is as long as is said.
        let got = unsafe {
            libc::recv(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), flags)
        };
        frame.truncate(usize::try_from(got).ok()?);
        Some(frame)
    }

    /// The next frame from the tap.
    pub fn receive(&self) -> Vec<u8> {
        let begin = Instant::now();
        loop {
            if let Some(frame) = self.try_receive() {
                return frame;
            }
            assert!(begin.elapsed() < DEADLINE, "no frame comes");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The host's side of the `net` self-test guest: is greeted, and sends frames of many sizes that must
/// come back. Returns the address and the MTU that the guest says it has.
pub fn exchange(wire: &Wire) -> ([u8; 6], u16) {
    let greeting = wire.receive();
    let mac = <[u8; 6]>::try_from(&greeting[6..12]).expect("6 bytes");
    for (seed, length) in (1..).zip(LENGTHS) {
        let sent = frame(length, seed);
        wire.send(&sent);
        let back = wire.receive();
        assert!(back[..6] == sent[6..12] && back[6..12] == sent[..6], "addresses are swapped");
        assert!(back[12..] == sent[12..], "frame {seed} of {length} bytes");
    }
    // All of them at once: more than the guest has buffers for.
    for (seed, length) in (1..).zip(LENGTHS) {
        wire.send(&frame(length, seed));
    }
    for (seed, length) in (1..).zip(LENGTHS) {
        assert!(wire.receive()[12..] == frame(length, seed)[12..], "frame {seed} of many");
    }
    (mac, u16::from_le_bytes([greeting[14], greeting[15]]))
}

/// Sizes of the frames that [`exchange`] sends, twice.
pub const LENGTHS: [usize; 8] = [60, 1514, 588, 589, 1188, 1189, 1514, 61];

/// A frame of `length` bytes of the experimental type, for anyone.
pub fn frame(length: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 9]);
    frame.extend(EXPERIMENTAL.to_be_bytes());
    frame.extend((frame.len()..length).map(|at| (at / 3) as u8 ^ seed));
    frame
}
