//! What is offered to the driver, what it means for the tap, and the configuration space
//! (virtio 1.2, sections 5.1.3 and 5.1.4).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

/// Segmentation of UDP, by either side.
const USO: u64 =
    1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;

/// What every device offers.
const ALWAYS: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

/// The device's own feature bits.
pub(super) fn offered(has_mtu: bool, has_uso: bool) -> u64 {
    let mtu = if has_mtu { 1 << VIRTIO_NET_F_MTU } else { 0 };
    ALWAYS | mtu | if has_uso { USO } else { 0 }
}

/// Whether a feature bit is set.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & 1u64.checked_shl(bit).unwrap_or(0) != 0
}

/// The offloads that a tap may use towards a driver that accepted `features` (`TUNSETOFFLOAD`).
///
/// A driver that takes segments takes partial checksums, and the kernel knows UDP segmentation for
/// both versions of IP or not at all: what contradicts that is not used.
pub(super) fn tap_offloads(features: u64) -> u32 {
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let tcp4 = has(features, VIRTIO_NET_F_GUEST_TSO4);
    let tcp6 = has(features, VIRTIO_NET_F_GUEST_TSO6);
    let udp = has(features, VIRTIO_NET_F_GUEST_USO4) && has(features, VIRTIO_NET_F_GUEST_USO6);
    let ecn = has(features, VIRTIO_NET_F_GUEST_ECN) && (tcp4 || tcp6);
    let flags = [
        (tcp4, libc::TUN_F_TSO4),
        (tcp6, libc::TUN_F_TSO6),
        (ecn, libc::TUN_F_TSO_ECN),
        (udp, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    flags.iter().filter(|(is_used, _)| *is_used).fold(libc::TUN_F_CSUM, |all, (_, flag)| all | flag)
}

/// The bytes of `struct virtio_net_config`.
pub(super) fn space(mac: [u8; 6], mtu: Option<u16>) -> [u8; 12] {
    let mut space = [0; 12];
    space[..6].copy_from_slice(&mac);
    space[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
    // max_virtqueue_pairs
    space[8..10].copy_from_slice(&1u16.to_le_bytes());
    space[10..12].copy_from_slice(&mtu.unwrap_or(0).to_le_bytes());
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_are_those_that_make_sense_together() {
        let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        assert_eq!(tap_offloads(offered(true, false)), all);
        let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
        assert_eq!(tap_offloads(offered(true, true)), all | udp);
        let without_checksums = offered(true, true) & !(1 << VIRTIO_NET_F_GUEST_CSUM);
        assert_eq!(tap_offloads(without_checksums), 0);
        let one_version = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_USO4;
        assert_eq!(tap_offloads(one_version | 1 << VIRTIO_NET_F_GUEST_ECN), libc::TUN_F_CSUM);
    }

    #[test]
    fn the_configuration_is_laid_out_as_the_driver_reads_it() {
        let mac = [2, 3, 4, 5, 6, 7];
        assert_eq!(space(mac, Some(0x1234)), [2, 3, 4, 5, 6, 7, 1, 0, 1, 0, 0x34, 0x12]);
    }
}
