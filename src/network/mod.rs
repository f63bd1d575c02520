//! A sandbox's network on the host: the interfaces of its network namespace become the guest's.
//!
//! Callers prepare a network namespace, as they do for runc: with an interface, its addresses and
//! routes, mostly one end of a veth pair, and often only after the container was created. The guest
//! has to be what is at that end. So the namespace holds a tap interface for each network device of
//! the machine ([`tap`]), and at the container's start
//!
//! 1. the namespace's interfaces and main routing table are read ([`interfaces`], [`routes`]),
//! 2. each interface is joined with a tap ([`redirect`]): what arrives at the one leaves by the other,
//!    before the host's own stack has seen it,
//! 3. what was read is what the guest's agent is told to set up.
//!
//! # What it promises
//! * The guest answers for the interface, alone: the host's stack in that namespace gets no frame of
//!   it any more, although the interface keeps its addresses, by which callers recognise it.
//! * Nothing is passed over in silence: an interface or a route that the guest can't have is refused
//!   by its name, and so is an interface that another sandbox has.
//! * Afterwards nothing is left. Taps go with the processes that hold them; the redirection is
//!   removed by [`Uplinks::leave`], and one that a killed monitor left behind, by whoever removes the
//!   rest of its sandbox ([`Namespace::tidy`]), or by the next sandbox.
//!
//! # What it leaves out
//! Routing rules and other tables than the main one, and the interface's settings in
//! `/proc/sys/net`. Name servers come as a bind mount of `/etc/resolv.conf` from whoever calls.

mod interfaces;
mod namespace;
mod redirect;
mod routes;
mod tap;

use std::io;
use std::os::fd::OwnedFd;

use kiln_netlink::Connection;
use kiln_protocol::Network;
use kiln_protocol::network::{LinkAddress, MAX_INTERFACES};

pub use namespace::Namespace;
use redirect::Redirect;
use tap::Tap;

/// Why a sandbox can't have its network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// More interfaces than devices.
    #[error(
        "network interface {name}: the guest was made with {devices} network device{}, one for each \
         interface that was there and at least one: have all interfaces in place before the \
         container is created",
        if *.devices == 1 { "" } else { "s" }
    )]
    TooLate {
        /// The first that there is no device for.
        name: String,
        /// How many devices there are.
        devices: usize,
    },
    /// An interface that a guest can't have.
    #[error("network interface {name}: {reason}")]
    Interface {
        /// Its name.
        name: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A route that a guest can't have.
    #[error("route to {destination}: {reason}: remove it")]
    Route {
        /// Where to.
        destination: String,
        /// Why.
        reason: &'static str,
    },
    /// More than a guest takes.
    #[error(
        "the network namespace has more than {limit} {what}: a guest takes no more: remove some"
    )]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// No tap can be made.
    #[error("tap interface: {what}: {source} (`kiln doctor` checks /dev/net/tun)")]
    Tap {
        /// What failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused something else.
    #[error("{what}: {source}")]
    Kernel {
        /// What was asked of it.
        what: String,
        /// Why.
        source: kiln_netlink::Error,
    },
}

/// Says what the kernel was asked.
trait Asked<T> {
    fn asked<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T, NetworkError>;
}

impl<T, E: Into<kiln_netlink::Error>> Asked<T> for Result<T, E> {
    fn asked<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T, NetworkError> {
        let kernel =
            |source: E| NetworkError::Kernel { what: what().into(), source: source.into() };
        self.map_err(kernel)
    }
}

/// The host's end of a network device.
#[derive(Debug)]
pub struct Device {
    /// The tap that it sends to and receives from: `/dev/net/tun`, attached, with packet headers.
    pub tap: OwnedFd,
    /// The address that the device is made with, by which the agent knows it.
    pub address: LinkAddress,
}

/// What a sandbox has in its network namespace.
#[derive(Debug)]
pub struct Uplinks {
    connection: Connection,
    taps: Vec<Tap>,
    redirects: Vec<Redirect>,
}

impl Uplinks {
    /// Makes taps in the calling thread's network namespace: one for each interface that is there,
    /// and at least `least`. Gives the devices that belong to them.
    ///
    /// # Errors
    /// See [`NetworkError`].
    pub fn prepare(least: usize) -> Result<(Self, Vec<Device>), NetworkError> {
        let mut connection = Connection::open().asked(|| "netlink")?;
        let found = interfaces::find(&mut connection)?;
        let (mut taps, mut devices) = (Vec::new(), Vec::new());
        for number in 0..found.len().max(least).min(MAX_INTERFACES) {
            let (tap, fd) = tap::make(&mut connection)?;
            let address = device_address(number);
            tracing::debug!(tap = tap.name, "tap made");
            taps.push(tap);
            devices.push(Device { tap: fd, address });
        }
        Ok((Self { connection, taps, redirects: Vec::new() }, devices))
    }

    /// Joins the interfaces that are there now with the taps, and says what the guest is to have.
    ///
    /// # Errors
    /// See [`NetworkError`]. What was joined by then is taken back by [`Self::leave`].
    pub fn join(&mut self) -> Result<Network, NetworkError> {
        let found = interfaces::find(&mut self.connection)?;
        if let Some(late) = found.get(self.taps.len()) {
            let (name, devices) = (late.name.clone(), self.taps.len());
            return Err(NetworkError::TooLate { name, devices });
        }
        let indices: Vec<u32> = found.iter().map(|found| found.index).collect();
        let routes = routes::find(&mut self.connection, &indices)?;
        let mut interfaces = Vec::with_capacity(found.len());
        for (number, (found, tap)) in found.into_iter().zip(&self.taps).enumerate() {
            let (index, name) = (&found.index, &found.name);
            let added = &mut self.redirects;
            redirect::join(&mut self.connection, (*index, name), tap.index, added)?;
            tap.follow(&mut self.connection, found.mtu)?;
            tracing::debug!(interface = name, tap = tap.name, "interface joined");
            interfaces.push(found.into_interface(device_address(number)));
        }
        Ok(Network { interfaces, routes })
    }

    /// Takes the redirection back. What isn't there any more is no error. Says whether nothing stays
    /// behind.
    pub fn leave(&mut self) -> bool {
        let mut left = true;
        for redirect in self.redirects.drain(..) {
            if let Err(error) = redirect.remove(&mut self.connection) {
                tracing::warn!(%error, "a redirection stays behind in the network namespace");
                left = false;
            }
        }
        left
    }
}

/// A locally administered address of the device of this number: each guest is alone with its own.
fn device_address(number: usize) -> LinkAddress {
    // Lossless: there are at most MAX_INTERFACES.
    [0x02, b'k', b'i', b'l', b'n', number as u8]
}

#[cfg(test)]
mod tests;
