//! What is described, as requests to the kernel (rtnetlink(7)).

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use kiln_protocol::network::{InterfaceAddress, LinkAddress, Neighbour, Route, RouteKind};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, CacheInfo,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType, RouteVia,
};

fn link(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    message
}

/// A link gets an Ethernet address.
pub fn link_address(index: u32, address: LinkAddress) -> LinkMessage {
    link(index, vec![LinkAttribute::Address(address.to_vec())])
}

/// A link gets an MTU.
pub fn mtu(index: u32, mtu: u32) -> LinkMessage {
    link(index, vec![LinkAttribute::Mtu(mtu)])
}

/// A link moves to another namespace, where it has this name.
pub fn moved(index: u32, name: &str, namespace: &File) -> LinkMessage {
    let namespace = LinkAttribute::NetNsFd(namespace.as_raw_fd());
    link(index, vec![namespace, LinkAttribute::IfName(name.to_owned())])
}

/// A link makes no IPv6 address of its own, that of the link included.
pub fn without_own_addresses(index: u32) -> LinkMessage {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    link(index, vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])])])
}

/// A link goes up.
pub fn up(index: u32) -> LinkMessage {
    let mut message = link(index, Vec::new());
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// A link gets an address, without the route to its prefix.
pub fn address(address: &InterfaceAddress, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.address);
    message.header.prefix_len = address.prefix;
    message.header.flags = AddressHeaderFlags::Nodad;
    message.header.scope = address.scope.into();
    message.header.index = index;
    let mut lifetime = CacheInfo::default();
    (lifetime.ifa_valid, lifetime.ifa_preferred) = (address.valid, address.preferred);
    message.attributes = vec![
        AddressAttribute::Local(address.address),
        AddressAttribute::Address(address.peer.unwrap_or(address.address)),
        AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute),
        AddressAttribute::CacheInfo(lifetime),
    ];
    message.attributes.extend(address.broadcast.map(AddressAttribute::Broadcast));
    message
}

/// A link gets a neighbour.
pub fn neighbour(neighbour: &Neighbour, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(neighbour.address.into()),
        NeighbourAttribute::LinkLayerAddress(neighbour.link_address.to_vec()),
    ];
    message
}

/// The main table gets a route; `indices` are those of the interfaces.
///
/// # Errors
/// `InvalidData` for an interface that there is not.
pub fn route(route: &Route, indices: &[u32]) -> io::Result<RouteMessage> {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.destination);
    header.destination_prefix_length = route.prefix;
    header.tos = route.type_of_service;
    header.table = RouteHeader::RT_TABLE_MAIN;
    header.protocol = route.protocol.into();
    header.scope = route.scope.into();
    header.kind = match route.kind {
        RouteKind::Unicast => RouteType::Unicast,
        RouteKind::Blackhole => RouteType::BlackHole,
        RouteKind::Unreachable => RouteType::Unreachable,
        RouteKind::Prohibit => RouteType::Prohibit,
        RouteKind::Throw => RouteType::Throw,
    };
    if route.on_link {
        header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    if route.prefix > 0 {
        attributes.push(RouteAttribute::Destination(route.destination.into()));
    }
    if let Some(interface) = route.interface {
        let index = indices.get(usize::from(interface)).copied();
        attributes.push(RouteAttribute::Oif(index.ok_or(io::ErrorKind::InvalidData)?));
    }
    if let Some(gateway) = route.gateway {
        attributes.push(match gateway {
            IpAddr::V6(gateway) if route.destination.is_ipv4() => {
                RouteAttribute::Via(RouteVia::Inet6(gateway))
            }
            gateway => RouteAttribute::Gateway(gateway.into()),
        });
    }
    attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
    attributes.extend(route.metric.map(RouteAttribute::Priority));
    let mtu = route.mtu.map(RouteMetric::Mtu);
    let metrics: Vec<_> =
        mtu.into_iter().chain(route.advertised_mss.map(RouteMetric::Advmss)).collect();
    if !metrics.is_empty() {
        attributes.push(RouteAttribute::Metrics(metrics));
    }
    Ok(message)
}
