//! The main routing table of a network namespace, as a guest can take it over.

use std::cmp::Reverse;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kiln_netlink::Connection;
use kiln_protocol::network::{MAX_ROUTES, Route, RouteKind};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType, RouteVia,
};

use super::interfaces::at_most;
use super::{Asked, NetworkError};

/// Reads the table. `interfaces` are the kernel's numbers of those that the guest gets.
///
/// # Errors
/// A route that the guest can't have, or too many.
pub fn find(connection: &mut Connection, interfaces: &[u32]) -> Result<Vec<Route>, NetworkError> {
    let list = connection.list(libc::RTM_GETROUTE, &RouteMessage::default());
    let all: Vec<RouteMessage> = list.asked(|| "list of routes")?;
    let routes = all.iter().filter_map(|message| read(message, interfaces).transpose());
    let mut routes = routes.collect::<Result<Vec<_>, _>>()?;
    // A gateway has to be on a link when its route is made.
    routes.sort_by_key(|route| (route.gateway.is_some(), Reverse(route.scope)));
    at_most(routes, MAX_ROUTES, "routes")
}

/// `None` for a route of another table or kind, and for those of the loopback interface.
fn read(message: &RouteMessage, interfaces: &[u32]) -> Result<Option<Route>, NetworkError> {
    let header = &message.header;
    let is_ip = matches!(header.address_family, AddressFamily::Inet | AddressFamily::Inet6);
    let Some(kind) = kind(header.kind) else { return Ok(None) };
    let is_cached = header.flags.contains(RouteFlags::Cloned);
    if !is_ip || is_cached || table(message) != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return Ok(None);
    }
    let mut route = Route {
        kind,
        destination: unspecified(header.address_family),
        prefix: header.destination_prefix_length,
        interface: None,
        gateway: None,
        on_link: header.flags.contains(RouteFlags::Onlink),
        source: None,
        metric: None,
        type_of_service: header.tos,
        scope: header.scope.into(),
        protocol: header.protocol.into(),
        mtu: None,
        advertised_mss: None,
    };
    let mut refused = (header.source_prefix_length > 0).then_some("depends on the source address");
    let mut index = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                route.destination = ip(to).unwrap_or(route.destination)
            }
            RouteAttribute::Gateway(gateway) => route.gateway = ip(gateway),
            RouteAttribute::Via(RouteVia::Inet(gateway)) => route.gateway = Some((*gateway).into()),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => {
                route.gateway = Some((*gateway).into())
            }
            RouteAttribute::PrefSource(source) => route.source = ip(source),
            RouteAttribute::Priority(metric) => route.metric = Some(*metric),
            RouteAttribute::Oif(found) => index = Some(*found),
            RouteAttribute::Metrics(metrics) => read_metrics(metrics, &mut route),
            RouteAttribute::MultiPath(_) => refused = Some("has several next hops"),
            RouteAttribute::Encap(_) => refused = Some("encapsulates packets"),
            _ => {}
        }
    }
    if route.kind != RouteKind::Unicast {
        return Ok(Some(route));
    }
    let position = interfaces.iter().position(|interface| Some(*interface) == index);
    // Lossless: there are at most MAX_INTERFACES.
    route.interface = position.map(|position| position as u8);
    if route.interface.is_none() && refused.is_none() {
        // Of the loopback interface, which the guest has itself.
        if header.protocol == RouteProtocol::Kernel {
            return Ok(None);
        }
        refused = Some("leads over an interface that the guest does not get");
    }
    match refused {
        None => Ok(Some(route)),
        Some(reason) => {
            let destination = format!("{}/{}", route.destination, route.prefix);
            Err(NetworkError::Route { destination, reason })
        }
    }
}

fn kind(kind: RouteType) -> Option<RouteKind> {
    match kind {
        RouteType::Unicast => Some(RouteKind::Unicast),
        RouteType::BlackHole => Some(RouteKind::Blackhole),
        RouteType::Unreachable => Some(RouteKind::Unreachable),
        RouteType::Prohibit => Some(RouteKind::Prohibit),
        RouteType::Throw => Some(RouteKind::Throw),
        _ => None,
    }
}

fn table(message: &RouteMessage) -> u32 {
    let mut tables = message.attributes.iter().filter_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    tables.next().unwrap_or_else(|| message.header.table.into())
}

fn unspecified(family: AddressFamily) -> IpAddr {
    match family {
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn read_metrics(metrics: &[RouteMetric], route: &mut Route) {
    for metric in metrics {
        match metric {
            RouteMetric::Mtu(mtu) => route.mtu = Some(*mtu),
            RouteMetric::Advmss(mss) => route.advertised_mss = Some(*mss),
            _ => {}
        }
    }
}
