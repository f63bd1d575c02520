//! Frames: a message's length in bytes as 32 bits little-endian, then the message as JSON.
//!
//! [`Decoder`] takes bytes as they come, in pieces of any size, and gives whole messages back. It
//! never holds more than one frame of the length its cap allows, and a length above the cap is
//! refused on sight of the four length bytes.

use serde::{Serialize, de::DeserializeOwned};

const LENGTH_SIZE: usize = 4;

/// Why bytes are not a frame, or a message cannot become one.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The frame is longer than the receiver takes.
    #[error("frame of {length} bytes exceeds the limit of {limit}")]
    TooLong {
        /// Length in bytes that the frame has or claims.
        length: usize,
        /// The cap in force, in bytes.
        limit: usize,
    },
    /// The frame's content is not a message.
    #[error("malformed message")]
    Malformed(#[source] serde_json::Error),
    /// The message cannot be written as JSON.
    #[error("message cannot be serialised")]
    Unserialisable(#[source] serde_json::Error),
}

/// Encodes one message as a frame of at most `limit` bytes of content.
pub fn encode<T: Serialize>(message: &T, limit: usize) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; LENGTH_SIZE];
    serde_json::to_writer(&mut frame, message).map_err(FrameError::Unserialisable)?;
    let length = frame.len() - LENGTH_SIZE;
    let prefix = u32::try_from(length).ok().filter(|_| length <= limit);
    let Some(prefix) = prefix else {
        return Err(FrameError::TooLong { length, limit });
    };
    frame[..LENGTH_SIZE].copy_from_slice(&prefix.to_le_bytes());
    Ok(frame)
}

/// Takes a byte stream apart into messages.
#[derive(Debug)]
pub struct Decoder {
    limit: usize,
    buffer: Vec<u8>,
}

impl Decoder {
    /// A decoder that refuses frames of more than `limit` bytes of content.
    pub fn new(limit: usize) -> Self {
        Self { limit, buffer: Vec::new() }
    }

    /// Appends what has been received. Call [`Decoder::next`] until it gives `None` before
    /// appending more: that is what bounds the buffer.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether bytes of an unfinished frame are held: a connection that ends now was cut short.
    pub fn is_mid_frame(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// The next whole message, or `None` if more bytes are needed.
    ///
    /// # Errors
    /// A length above the cap or content that is no message. The stream cannot be resumed after
    /// either.
    #[allow(clippy::should_implement_trait)]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some(prefix) = self.buffer.first_chunk::<LENGTH_SIZE>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*prefix) as usize;
        if length > self.limit {
            return Err(FrameError::TooLong { length, limit: self.limit });
        }
        let end = LENGTH_SIZE + length;
        if self.buffer.len() < end {
            return Ok(None);
        }
        let message = serde_json::from_slice(&self.buffer[LENGTH_SIZE..end])
            .map_err(FrameError::Malformed)?;
        self.buffer.drain(..end);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ExitStatus, FromAgent, MAX_FROM_AGENT, ToAgent};
    use proptest::prelude::*;

    fn exited(container: &str) -> FromAgent {
        FromAgent::Exited {
            container: container.to_owned(),
            status: ExitStatus::Code(3),
            oom_killed: false,
        }
    }

    #[test]
    fn length_above_the_cap_is_refused_before_the_content_comes() {
        let mut decoder = Decoder::new(16);
        decoder.push(&17u32.to_le_bytes());
        let error = decoder.next::<FromAgent>().expect_err("too long");
        assert!(matches!(error, FrameError::TooLong { length: 17, limit: 16 }));
    }

    #[test]
    fn message_above_the_cap_is_not_encoded() {
        let error = encode(&exited(&"x".repeat(MAX_FROM_AGENT)), MAX_FROM_AGENT).expect_err("cap");
        assert!(matches!(error, FrameError::TooLong { .. }));
    }

    #[test]
    fn unknown_fields_and_types_are_malformed() {
        for json in [r#"{"nonsense":{}}"#, r#"{"created":{"container":"a","more":1}}"#] {
            let mut decoder = Decoder::new(MAX_FROM_AGENT);
            decoder.push(&(json.len() as u32).to_le_bytes());
            decoder.push(json.as_bytes());
            let error = decoder.next::<FromAgent>().expect_err("malformed");
            assert!(matches!(error, FrameError::Malformed(_)));
        }
    }

    #[test]
    fn configuration_survives_byte_for_byte() {
        let text = r#"{ "ociVersion":"1.2.0",   "x": 1.50 }"#;
        let create = ToAgent::Create(Box::new(crate::CreateContainer {
            container: "c".to_owned(),
            config: serde_json::value::RawValue::from_string(text.to_owned()).expect("json"),
            state: serde_json::value::RawValue::from_string("{}".to_owned()).expect("json"),
            rootfs: "rootfs".to_owned(),
            binds: vec![crate::BindMount { mount: 3, path: "mounts/3".to_owned(), is_file: true }],
            joined: None,
            stdio: crate::Stdio::Pipes { stdin: None, stdout: None, stderr: None },
        }));
        let mut decoder = Decoder::new(crate::MAX_TO_AGENT);
        decoder.push(&encode(&create, crate::MAX_TO_AGENT).expect("encodes"));
        let Some(ToAgent::Create(back)) = decoder.next().expect("decodes") else {
            panic!("another message came out");
        };
        assert_eq!(back.config.get(), text);
        assert_eq!(back.binds[0].mount, 3);
    }

    proptest! {
        #[test]
        fn messages_survive_any_split(ids in prop::collection::vec("[a-z]{0,40}", 1..8),
                                      piece in 1usize..50) {
            let messages: Vec<_> = ids.iter().map(|id| exited(id)).collect();
            let bytes: Vec<u8> = messages.iter()
                .flat_map(|m| encode(m, MAX_FROM_AGENT).expect("encodes"))
                .collect();
            let mut decoder = Decoder::new(MAX_FROM_AGENT);
            let mut received = Vec::new();
            for chunk in bytes.chunks(piece) {
                decoder.push(chunk);
                while let Some(message) = decoder.next::<FromAgent>().expect("decodes") {
                    received.push(message);
                }
            }
            prop_assert_eq!(received, messages);
            prop_assert!(!decoder.is_mid_frame());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::new(64);
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next::<FromAgent>() {}
        }
    }
}
