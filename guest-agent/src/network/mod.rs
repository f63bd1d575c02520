//! A container's network: the guest's devices become the interfaces that the host describes.
//!
//! A guest is booted with devices for interfaces that its caller may not have made yet. So a device
//! has an address of its own, stays down and out of every container's sight, in the agent's network
//! namespace, until a container is started: [`set_up`] then gives it the name, the address and the
//! MTU of the host's interface, moves it into the container's namespace, and makes its addresses,
//! neighbours and routes there. A device that no interface is behind stays where it is.
//!
//! # What it promises
//! The container has what the host described and nothing else: the kernel adds no addresses and no
//! routes of its own (but those of its local and multicast tables), and looks for no duplicates of an
//! address that the host has used already. It all happens before the program is executed. If anything
//! can't be done, the container is not started.
//!
//! Where the container has switched IPv6 off (`net.ipv6.conf.all.disable_ipv6` in `linux.sysctl`),
//! its interfaces have what is IPv4.

mod devices;
mod loopback;
mod requests;

use std::fs::File;
use std::net::IpAddr;

use kiln_netlink::{Connection, Error};
use kiln_protocol::FailurePhase;
use kiln_protocol::network::{Interface, Network};
use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_REPLACE};
use nix::sched::{CloneFlags, setns};

use crate::failure::{During, Failure};
pub use loopback::bring_loopback_up;

const PHASE: FailurePhase = FailurePhase::Network;

/// Gives the network to the container whose first process is `pid`, a child of the caller's. It has a
/// network namespace of its own.
///
/// # Errors
/// What can't be done, naming the interface or the route.
pub fn set_up(network: &Network, pid: libc::pid_t) -> Result<(), Failure> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))
        .during(PHASE, || "the container's network namespace")?;
    let mut guest = Connection::open().during(PHASE, || "netlink")?;
    let mut container = connect_in(&namespace)?;
    for interface in &network.interfaces {
        move_in(&mut guest, interface, &namespace)
            .during(PHASE, || format!("network interface {}", interface.name))?;
    }
    let devices = devices::list(&mut container).during(PHASE, || "network interfaces")?;
    let mut setting = Setting { container, indices: Vec::new(), has_ipv6: true };
    for interface in &network.interfaces {
        let found = devices.iter().find(|device| device.name == interface.name);
        let Some(index) = found.map(|device| device.index) else {
            let name = &interface.name;
            return Err(Failure::new(PHASE, format!("network interface {name} has vanished")));
        };
        setting.indices.push(index);
        setting.configure(interface, index)?;
    }
    for route in &network.routes {
        let what = || format!("route to {}/{}", route.destination, route.prefix);
        let message = requests::route(route, &setting.indices).during(PHASE, what)?;
        // An IPv4 route may lead over an IPv6 gateway.
        let family = route.gateway.unwrap_or(route.destination);
        setting.make(libc::RTM_NEWROUTE, family, &message).during(PHASE, what)?;
    }
    Ok(())
}

/// A connection to another network namespace.
fn connect_in(namespace: &File) -> Result<Connection, Failure> {
    let what = || "the container's network namespace";
    let own = File::open("/proc/self/ns/net").during(PHASE, what)?;
    setns(namespace, CloneFlags::CLONE_NEWNET).during(PHASE, what)?;
    let connection = Connection::open();
    setns(own, CloneFlags::CLONE_NEWNET).during(PHASE, || "back to the agent's namespace")?;
    connection.during(PHASE, || "netlink")
}

/// Moves the device behind an interface into the container's namespace, with its name and address.
fn move_in(guest: &mut Connection, interface: &Interface, namespace: &File) -> Result<(), Failure> {
    let devices = devices::list(guest).during(PHASE, || "network devices")?;
    let found = devices.iter().find(|device| device.address == Some(interface.device));
    let Some(index) = found.map(|device| device.index) else {
        let address = interface.device.map(|byte| format!("{byte:02x}")).join(":");
        return Err(Failure::new(PHASE, format!("no device has the address {address}")));
    };
    let mut change = |what: &'static str, message| {
        guest.change(libc::RTM_SETLINK, 0, &message).during(PHASE, || what)
    };
    change("address", requests::link_address(index, interface.link_address))?;
    change("MTU", requests::mtu(index, interface.mtu))?;
    change("name", requests::moved(index, &interface.name, namespace))
}

/// The container's namespace while it is being set up.
struct Setting {
    container: Connection,
    /// The kernel's numbers of the interfaces.
    indices: Vec<u32>,
    /// IPv6 hasn't turned out to be switched off.
    has_ipv6: bool,
}

impl Setting {
    fn configure(&mut self, interface: &Interface, index: u32) -> Result<(), Failure> {
        let name = &interface.name;
        let of_interface = |what: &str| format!("network interface {name}: {what}");
        // An interface whose MTU is too small for IPv6 has none of its settings.
        match self.container.change(libc::RTM_SETLINK, 0, &requests::without_own_addresses(index)) {
            Err(error) if error.errno() == Some(libc::EAFNOSUPPORT) => self.has_ipv6 = false,
            other => other.during(PHASE, || of_interface("IPv6"))?,
        }
        if interface.up {
            let up = requests::up(index);
            let done = self.container.change(libc::RTM_SETLINK, 0, &up);
            done.during(PHASE, || of_interface("bring up"))?;
        }
        for address in &interface.addresses {
            let what = || of_interface(&format!("{}/{}", address.address, address.prefix));
            let message = requests::address(address, index);
            self.make(libc::RTM_NEWADDR, address.address, &message).during(PHASE, what)?;
        }
        for neighbour in &interface.neighbours {
            let what = || of_interface(&format!("neighbour {}", neighbour.address));
            let message = requests::neighbour(neighbour, index);
            self.make(libc::RTM_NEWNEIGH, neighbour.address, &message).during(PHASE, what)?;
        }
        Ok(())
    }

    /// Makes what belongs to the family of `address`. IPv6 that is switched off is passed over.
    fn make(&mut self, kind: u16, address: IpAddr, body: &impl Emitable) -> Result<(), Error> {
        if address.is_ipv6() && !self.has_ipv6 {
            return Ok(());
        }
        match self.container.change(kind, NLM_F_CREATE | NLM_F_REPLACE, body) {
            // What the kernel says of an address where IPv6 is off.
            Err(error) if address.is_ipv6() && error.errno() == Some(libc::EACCES) => {
                self.has_ipv6 = false;
                Ok(())
            }
            other => other,
        }
    }
}
