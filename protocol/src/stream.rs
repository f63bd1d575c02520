//! The header with which a stream connection says which stream it is.

use serde::{Deserialize, Serialize};

/// Names a stdio stream within a sandbox's life; chosen by the host, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StreamToken(pub u64);

/// The first [`StreamHeader::SIZE`] bytes that the host sends on a stream connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamHeader {
    /// The stream that this connection is.
    pub token: StreamToken,
}

impl StreamHeader {
    /// Size on the wire, in bytes.
    pub const SIZE: usize = 8;

    /// The header's bytes: the token, little-endian.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        self.token.0.to_le_bytes()
    }

    /// Reads a header. Every value is a valid one.
    pub fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        Self { token: StreamToken(u64::from_le_bytes(bytes)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trips() {
        let header = StreamHeader { token: StreamToken(0x0102_0304_0506_0708) };
        assert_eq!(StreamHeader::from_bytes(header.to_bytes()), header);
        assert_eq!(header.to_bytes()[0], 0x08);
    }
}
