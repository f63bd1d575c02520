//! `struct virtio_net_hdr_v1` (virtio 1.2, section 5.1.6), which goes before each frame, in the
//! queues and on the tap.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::MAX_FRAME;
use super::features::has;

/// Size of a header.
pub(super) const SIZE: usize = 12;

/// The shortest frame: Ethernet's own header.
const MIN_FRAME: usize = 14;

/// The smallest segment that may be asked for. Linux's TCP sends none smaller
/// (`net.ipv4.tcp_min_snd_mss`), and without a bound one frame could have the host make 65,000.
const MIN_SEGMENT: u16 = 48;

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;
const NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const UDP_L4: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;

/// A header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header(pub(super) [u8; SIZE]);

impl Header {
    fn flags(&self) -> u8 {
        self.0[0]
    }

    fn gso_type(&self) -> u8 {
        self.0[1]
    }

    fn half(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    /// How many bytes of headers a segment gets.
    fn header_length(&self) -> u16 {
        self.half(2)
    }

    fn segment_size(&self) -> u16 {
        self.half(4)
    }

    fn checksum_start(&self) -> u16 {
        self.half(6)
    }

    fn checksum_offset(&self) -> u16 {
        self.half(8)
    }

    /// In how many buffers the frame lies.
    pub(super) fn set_buffers(&mut self, count: u16) {
        self.0[10..].copy_from_slice(&count.to_le_bytes());
    }

    /// How many packets on the wire a frame of `length` bytes stands for, roughly: what is said to
    /// be headers counts as payload too.
    pub(super) fn packets(&self, length: usize) -> u64 {
        match (self.gso_type(), self.segment_size()) {
            (NONE, _) | (_, 0) => 1,
            (_, size) => (length as u64).div_ceil(size.into()),
        }
    }

    /// Checks what a driver that accepted `features` has put before a frame of `length` bytes, as
    /// far as the kernel doesn't, and takes away what the kernel need not see.
    ///
    /// # Errors
    /// Why the frame must not be sent.
    pub(super) fn check_sent(&mut self, features: u64, length: usize) -> Result<(), &'static str> {
        if length < MIN_FRAME {
            return Err("a frame shorter than its Ethernet header");
        }
        if length > MAX_FRAME {
            return Err("a frame longer than any");
        }
        // Unknown flags are to be ignored, and `DATA_VALID` is for the other direction.
        self.0[0] &= NEEDS_CSUM;
        self.set_buffers(0);
        if self.flags() != 0 {
            if !has(features, VIRTIO_NET_F_CSUM) {
                return Err("a checksum left to the host, which was not negotiated");
            }
            let field = usize::from(self.checksum_start()) + usize::from(self.checksum_offset());
            if field + 2 > length {
                return Err("a checksum outside of its frame");
            }
        }
        if self.gso_type() == NONE {
            return Ok(());
        }
        let feature = match self.gso_type() & !ECN {
            TCPV4 => VIRTIO_NET_F_HOST_TSO4,
            TCPV6 => VIRTIO_NET_F_HOST_TSO6,
            UDP_L4 => VIRTIO_NET_F_HOST_USO,
            _ => return Err("segmentation of an unknown kind"),
        };
        let ecn = self.gso_type() & ECN == 0 || has(features, VIRTIO_NET_F_HOST_ECN);
        if !has(features, feature) || !ecn {
            return Err("segmentation left to the host, which was not negotiated");
        }
        if self.flags() == 0 {
            return Err("segmentation without a checksum");
        }
        if usize::from(self.header_length()) > length {
            return Err("headers longer than their frame");
        }
        if self.segment_size() < MIN_SEGMENT {
            return Err("segments smaller than any");
        }
        Ok(())
    }

    /// Checks what the tap has put before a frame, for a driver that accepted `features`, and takes
    /// away what that one must not see. A frame that came to the tap before its offloads were set
    /// may ask for more than its driver has agreed to.
    ///
    /// # Errors
    /// Why the driver can't have the frame.
    pub(super) fn check_received(&mut self, features: u64) -> Result<(), &'static str> {
        if has(features, VIRTIO_NET_F_GUEST_CSUM) {
            self.0[0] &= NEEDS_CSUM | DATA_VALID;
        } else if self.flags() & NEEDS_CSUM != 0 {
            return Err("a checksum left to the guest, which was not negotiated");
        } else {
            self.0[0] = 0;
        }
        let ecn = self.gso_type() & ECN == 0 || has(features, VIRTIO_NET_F_GUEST_ECN);
        let known = match self.gso_type() & !ECN {
            NONE => true,
            TCPV4 => has(features, VIRTIO_NET_F_GUEST_TSO4),
            TCPV6 => has(features, VIRTIO_NET_F_GUEST_TSO6),
            UDP_L4 => {
                has(features, VIRTIO_NET_F_GUEST_USO4) && has(features, VIRTIO_NET_F_GUEST_USO6)
            }
            _ => false,
        };
        if known && ecn {
            Ok(())
        } else {
            Err("segments left to the guest, which was not negotiated")
        }
    }
}
