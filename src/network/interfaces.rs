//! The interfaces of a network namespace that a guest is to have: those that are up or have an
//! address.

use std::net::IpAddr;

use kiln_netlink::Connection;
use kiln_protocol::network::{
    Interface, InterfaceAddress, LinkAddress, MAX_ADDRESSES, MAX_INTERFACES, MAX_NEIGHBOURS,
    Neighbour,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    LinkAttribute, LinkExtentMask, LinkFlags, LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use super::{Asked, NetworkError, tap};

/// An interface of the namespace.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    up: bool,
    link_address: LinkAddress,
    addresses: Vec<InterfaceAddress>,
    neighbours: Vec<Neighbour>,
}

impl Found {
    /// As the guest is to have it, on the device of this address.
    pub fn into_interface(self, device: LinkAddress) -> Interface {
        Interface {
            device,
            name: self.name,
            link_address: self.link_address,
            mtu: self.mtu,
            up: self.up,
            addresses: self.addresses,
            neighbours: self.neighbours,
        }
    }
}

/// Finds them, in the order of the kernel's numbers.
///
/// # Errors
/// An interface that a guest can't have, or more of anything than it takes.
pub fn find(connection: &mut Connection) -> Result<Vec<Found>, NetworkError> {
    let links = links(connection)?;
    let list = connection.list(libc::RTM_GETADDR, &AddressMessage::default());
    let addresses: Vec<AddressMessage> = list.asked(|| "list of addresses")?;
    let list = connection.list(libc::RTM_GETNEIGH, &NeighbourMessage::default());
    let neighbours: Vec<NeighbourMessage> = list.asked(|| "list of neighbours")?;
    let mut found = Vec::new();
    for link in &links {
        let index = link.header.index;
        let own = addresses.iter().filter(|address| address.header.index == index);
        let own: Vec<_> = own.filter_map(read_address).collect();
        let up = link.header.flags.contains(LinkFlags::Up);
        let is_port = link.attributes.iter().any(|a| matches!(a, LinkAttribute::Controller(_)));
        let is_loopback = link.header.flags.contains(LinkFlags::Loopback);
        if is_loopback || is_port || tap::is_tap(link) || (!up && own.is_empty()) {
            continue;
        }
        let own_neighbours = neighbours.iter().filter(|one| one.header.ifindex == index);
        found.push(Found {
            index,
            name: name(link).to_owned(),
            mtu: mtu(link),
            up,
            link_address: ethernet_address(link)?,
            addresses: at_most(own, MAX_ADDRESSES, "addresses on an interface")?,
            neighbours: at_most(
                own_neighbours.filter_map(read_neighbour).collect(),
                MAX_NEIGHBOURS,
                "permanent neighbours on an interface",
            )?,
        });
    }
    found.sort_by_key(|found| found.index);
    refuse_stacked(&links, &found)?;
    at_most(found, MAX_INTERFACES, "interfaces")
}

/// All links of the connection's namespace.
pub fn links(connection: &mut Connection) -> Result<Vec<LinkMessage>, NetworkError> {
    let mut request = LinkMessage::default();
    request.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    connection.list(libc::RTM_GETLINK, &request).asked(|| "list of interfaces")
}

/// A link's name.
pub fn name(link: &LinkMessage) -> &str {
    let mut names = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    });
    names.next().unwrap_or_default()
}

fn mtu(link: &LinkMessage) -> u32 {
    let mut mtus = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    mtus.next().unwrap_or_default()
}

/// `list`, unless it is longer than `limit`.
pub fn at_most<T>(list: Vec<T>, limit: usize, what: &'static str) -> Result<Vec<T>, NetworkError> {
    if list.len() <= limit { Ok(list) } else { Err(NetworkError::TooMany { what, limit }) }
}

fn ethernet_address(link: &LinkMessage) -> Result<LinkAddress, NetworkError> {
    let mut addresses = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::Address(address) => LinkAddress::try_from(&address[..]).ok(),
        _ => None,
    });
    let is_ethernet = link.header.link_layer_type == LinkLayerType::Ether;
    addresses.next().filter(|_| is_ethernet).ok_or_else(|| NetworkError::Interface {
        name: name(link).to_owned(),
        reason:
            "is not an Ethernet interface, and a guest has no others: take it down or give the \
                 container a network without it"
                .to_owned(),
    })
}

/// The lower of two interfaces on top of each other would take the frames of both.
fn refuse_stacked(links: &[LinkMessage], found: &[Found]) -> Result<(), NetworkError> {
    for link in links {
        let upper = found.iter().any(|found| found.index == link.header.index);
        let (mut lower, mut elsewhere) = (None, false);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Link(index) => {
                    lower = found.iter().find(|found| found.index == *index);
                }
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                _ => {}
            }
        }
        if let Some(lower) = lower
            && upper
            && !elsewhere
        {
            let reason = format!(
                "lies on {}, and a guest can have only one of them: take one down",
                lower.name
            );
            return Err(NetworkError::Interface { name: name(link).to_owned(), reason });
        }
    }
    Ok(())
}

/// `None` for what is no address of the internet, or one that another host has.
fn read_address(message: &AddressMessage) -> Option<InterfaceAddress> {
    let (mut local, mut other, mut broadcast) = (None, None, None);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let (mut valid, mut preferred) = (u32::MAX, u32::MAX);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            AddressAttribute::Broadcast(address) => broadcast = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::CacheInfo(info) => {
                (valid, preferred) = (info.ifa_valid, info.ifa_preferred);
            }
            _ => {}
        }
    }
    if flags.contains(AddressFlags::Dadfailed) {
        return None;
    }
    let address = local.or(other)?;
    Some(InterfaceAddress {
        address,
        prefix: message.header.prefix_len,
        peer: other.filter(|other| *other != address),
        broadcast,
        scope: message.header.scope.into(),
        valid,
        preferred: preferred.min(valid),
    })
}

/// `None` for a neighbour whose address is not there for good.
fn read_neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let header = &message.header;
    if header.state != NeighbourState::Permanent || header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let (mut address, mut link_address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                address = Some(IpAddr::from(*found));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => {
                address = Some(IpAddr::from(*found));
            }
            NeighbourAttribute::LinkLayerAddress(found) => {
                link_address = LinkAddress::try_from(&found[..]).ok();
            }
            _ => {}
        }
    }
    Some(Neighbour { address: address?, link_address: link_address? })
}
