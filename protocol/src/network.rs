//! The network that a container gets.
//!
//! Names and addresses are those of the host's interfaces that stand behind the guest's network
//! devices, so that whoever looks from outside sees no difference. It goes with the start of a
//! container, not with its creation: callers may prepare the host's side in between.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use crate::bounded;

/// Interfaces of a [`Network`].
pub const MAX_INTERFACES: usize = 16;

/// Addresses of an [`Interface`].
pub const MAX_ADDRESSES: usize = 64;

/// Neighbours of an [`Interface`].
pub const MAX_NEIGHBOURS: usize = 256;

/// Routes of a [`Network`].
pub const MAX_ROUTES: usize = 1024;

/// Longest name of an interface in bytes: the kernel's `IFNAMSIZ` less the byte that ends it.
pub const MAX_INTERFACE_NAME: usize = 15;

/// An Ethernet address.
pub type LinkAddress = [u8; 6];

/// A container's network, beside its loopback interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The interfaces.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_INTERFACES>")]
    pub interfaces: Vec<Interface>,
    /// The main routing table, in an order in which it can be filled: what a gateway is reached by
    /// comes before what it leads to. The kernel adds no route of its own to it.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_ROUTES>")]
    pub routes: Vec<Route>,
}

/// An interface of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// Which of the guest's network devices it is: the Ethernet address that the device was made
    /// with.
    pub device: LinkAddress,
    /// Its name.
    #[serde(deserialize_with = "bounded::text::<_, MAX_INTERFACE_NAME>")]
    pub name: String,
    /// The Ethernet address that it is to have.
    pub link_address: LinkAddress,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// It is up.
    pub up: bool,
    /// Its addresses. None is looked for on the link (duplicate address detection): the host has done
    /// so.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_ADDRESSES>")]
    pub addresses: Vec<InterfaceAddress>,
    /// Its permanent neighbours.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_NEIGHBOURS>")]
    pub neighbours: Vec<Neighbour>,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceAddress {
    /// The address.
    pub address: IpAddr,
    /// Bits of its prefix; those of `peer` if there is one.
    pub prefix: u8,
    /// The other end of a point-to-point link.
    pub peer: Option<IpAddr>,
    /// The broadcast address.
    pub broadcast: Option<Ipv4Addr>,
    /// Its scope, as `rtm_scope` of rtnetlink(7).
    pub scope: u8,
    /// Seconds that it is valid for from now; `u32::MAX` is for ever.
    pub valid: u32,
    /// Seconds that it is preferred for from now, at most as many.
    pub preferred: u32,
}

/// A neighbour whose Ethernet address is known for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its Ethernet address.
    pub link_address: LinkAddress,
}

/// A route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// What becomes of a packet.
    pub kind: RouteKind,
    /// Where it leads to; the unspecified address for the default route, whose prefix is 0.
    pub destination: IpAddr,
    /// Bits of the destination's prefix.
    pub prefix: u8,
    /// The interface, as an index into [`Network::interfaces`]; none for a packet that goes nowhere.
    pub interface: Option<u8>,
    /// The next hop; none if the destination is on the link. It may be of the other family.
    pub gateway: Option<IpAddr>,
    /// The gateway is on the link whatever the other routes say.
    pub on_link: bool,
    /// The address that packets are sent from if their sender has chosen none.
    pub source: Option<IpAddr>,
    /// Among routes to the same destination the one with the least is taken.
    pub metric: Option<u32>,
    /// `rtm_tos` of rtnetlink(7).
    pub type_of_service: u8,
    /// `rtm_scope`.
    pub scope: u8,
    /// Who made it, `rtm_protocol`.
    pub protocol: u8,
    /// MTU of the path in bytes.
    pub mtu: Option<u32>,
    /// The segment size that TCP announces, in bytes.
    pub advertised_mss: Option<u32>,
}

/// What becomes of the packets that take a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouteKind {
    /// They are sent.
    Unicast,
    /// They vanish.
    Blackhole,
    /// Their sender is told that there is no way.
    Unreachable,
    /// Their sender is told that there may be no way.
    Prohibit,
    /// They are looked up in another table.
    Throw,
}
