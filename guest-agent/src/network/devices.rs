//! The network devices of a namespace.

use kiln_netlink::{Connection, Error};
use kiln_protocol::network::LinkAddress;
use netlink_packet_core::{DecodeError, NlasIterator, Parseable, parse_string};
use netlink_packet_route::link::LinkMessage;

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address, if it has one.
    pub address: Option<LinkAddress>,
}

/// The devices of the connection's namespace.
///
/// # Errors
/// As netlink(7).
pub fn list(connection: &mut Connection) -> Result<Vec<Device>, Error> {
    connection.list(libc::RTM_GETLINK, &LinkMessage::default())
}

/// The whole of a link's message says far more than is needed here.
impl Parseable<[u8]> for Device {
    fn parse(message: &[u8]) -> Result<Self, DecodeError> {
        const INDEX: usize = std::mem::offset_of!(libc::ifinfomsg, ifi_index);
        let (header, attributes) = message
            .split_at_checked(size_of::<libc::ifinfomsg>())
            .ok_or_else(|| DecodeError::from("a link's message that is too short"))?;
        let index = header[INDEX..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        let mut device = Self { index, name: String::new(), address: None };
        for attribute in NlasIterator::new(attributes).map_while(Result::ok) {
            match attribute.kind() {
                libc::IFLA_ADDRESS => device.address = attribute.value().try_into().ok(),
                libc::IFLA_IFNAME => device.name = parse_string(attribute.value())?,
                _ => {}
            }
        }
        Ok(device)
    }
}
