//! Tap interfaces: what a network device of a guest sends leaves them, as if it had arrived there.
//!
//! A tap has no addresses and makes none, so that the host's stack has nothing to say on it. It stays
//! down until it is joined with an interface, and goes when its last descriptor is closed.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use kiln_netlink::Connection;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};

use super::interfaces;
use super::{Asked, NetworkError};

/// What a tap's name begins with; the kernel puts the first free number after it.
const NAME: &str = "kiln";

/// A tap interface.
#[derive(Debug)]
pub struct Tap {
    /// Its name.
    pub name: String,
    /// The kernel's number for it.
    pub index: u32,
}

/// Makes a tap in the calling thread's namespace, which is that of the connection too.
///
/// # Errors
/// No `/dev/net/tun`, or no right to.
pub fn make(connection: &mut Connection) -> Result<(Tap, OwnedFd), NetworkError> {
    const DEVICE: &str = "/dev/net/tun";
    let failed = |what| move |source| NetworkError::Tap { what, source };
    let file = File::options().read(true).write(true).open(DEVICE).map_err(failed(DEVICE))?;
    let name = attach(&file).map_err(failed("attach"))?;
    let links = interfaces::links(connection)?;
    let own = links.iter().find(|link| interfaces::name(link) == name);
    let Some(index) = own.map(|link| link.header.index) else {
        return Err(failed("find")(io::ErrorKind::NotFound.into()));
    };
    let mut quiet = LinkMessage::default();
    quiet.header.index = index;
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    quiet.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])])];
    match connection.change(libc::RTM_SETLINK, 0, &quiet) {
        // A kernel without IPv6.
        Err(error) if error.errno() == Some(libc::EAFNOSUPPORT) => {}
        other => other.asked(|| name.clone())?,
    }
    Ok((Tap { name, index }, file.into()))
}

/// Attaches a descriptor of the device to a new tap; gives the tap's name.
fn attach(file: &File) -> io::Result<String> {
    // SAFETY: all-zero bytes are a valid `struct ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes().chain(*b"%d")) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // Lossless: the flags have 16 bits.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request takes a `struct ifreq`, which lives for the call and gets the name.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.iter().map(|byte| byte.cast_unsigned());
    Ok(String::from_utf8_lossy(&name.take_while(|byte| *byte != 0).collect::<Vec<_>>())
        .into_owned())
}

/// Whether a link is the tap of a sandbox, of this or another one.
pub fn is_tap(link: &LinkMessage) -> bool {
    let number = interfaces::name(link).strip_prefix(NAME);
    let named = number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
    let is_tun = |attribute: &LinkAttribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Tun)),
        _ => false,
    };
    named && link.attributes.iter().any(is_tun)
}

impl Tap {
    /// Takes the MTU of the interface that it is joined with, and goes up.
    pub fn follow(&self, connection: &mut Connection, mtu: u32) -> Result<(), NetworkError> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![LinkAttribute::Mtu(mtu)];
        let done = connection.change(libc::RTM_SETLINK, 0, &message);
        done.asked(|| format!("{}: MTU {mtu}", self.name))
    }
}
