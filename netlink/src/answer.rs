//! What the kernel answers: a datagram is taken apart into messages, an error into its number and its
//! explanation.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{DecodeError, ErrorBuffer, NLM_F_DUMP_INTR, NetlinkBuffer, NlasIterator};

use crate::Error;

/// `NLMSG_NOOP`, `NLMSG_ERROR`, `NLMSG_DONE` and the first type that isn't netlink's own.
const NOOP: u16 = libc::NLMSG_NOOP as u16;
const ERROR: u16 = libc::NLMSG_ERROR as u16;
const DONE: u16 = libc::NLMSG_DONE as u16;
const FIRST_OTHER: u16 = libc::NLMSG_MIN_TYPE as u16;

/// Length of a message's header.
pub const HEADER: usize = size_of::<libc::nlmsghdr>();

/// `NLMSGERR_ATTR_MSG`: the attribute of an error that explains it.
const EXPLANATION: u16 = 1;

/// Part of an answer.
#[derive(Debug)]
pub enum Part {
    /// One of a list.
    Item(Vec<u8>),
    /// The list has changed while it was read.
    Interrupted,
    /// The answer is over.
    End(Result<(), Error>),
}

/// Has the kernel explain errors, without the request in them, and check what a list is narrowed by.
///
/// # Errors
/// As setsockopt(2).
pub fn explain(socket: &OwnedFd) -> io::Result<()> {
    for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK, libc::NETLINK_GET_STRICT_CHK] {
        let on: libc::c_int = 1;
        let length = size_of_val(&on) as libc::socklen_t;
        // SAFETY: the option's value is an int that lives for the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_NETLINK,
                option,
                (&raw const on).cast(),
                length,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The parts in a datagram that answer the request of this number; others are left out.
///
/// # Errors
/// A datagram that isn't made of messages.
pub fn parts(datagram: &[u8], sequence: u32) -> Result<Vec<Part>, Error> {
    let mut parts = Vec::new();
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = NetlinkBuffer::new_checked(rest)?;
        let length = message.length() as usize;
        if message.sequence_number() == sequence {
            if message.flags() & NLM_F_DUMP_INTR != 0 {
                parts.push(Part::Interrupted);
            }
            let payload = message.payload();
            match message.message_type() {
                NOOP => {}
                ERROR | DONE => parts.push(Part::End(result(payload)?)),
                FIRST_OTHER.. => parts.push(Part::Item(payload.to_vec())),
                other => {
                    return Err(DecodeError::from(format!("message of type {other}")).into());
                }
            }
        }
        // Messages are aligned to 4 bytes; the last needn't be filled up.
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(parts)
}

/// What a request came to: the number, 0 or negative, then the explanation among other attributes.
fn result(payload: &[u8]) -> Result<Result<(), Error>, Error> {
    let error = ErrorBuffer::new_checked(payload)?;
    let Some(code) = error.code() else { return Ok(Ok(())) };
    let errno = io::Error::from_raw_os_error(code.get().saturating_neg());
    // The header of the request comes first, in an error but not at the end of a list.
    let after = [payload.get(4 + HEADER..), payload.get(4..)];
    let reason = after.into_iter().flatten().find_map(explanation);
    Ok(Err(Error::Refused { errno, reason }))
}

fn explanation(attributes: &[u8]) -> Option<String> {
    let mut attributes = NlasIterator::new(attributes).map_while(Result::ok);
    let found = attributes.find(|attribute| attribute.kind() == EXPLANATION)?;
    let text = String::from_utf8_lossy(found.value());
    Some(text.trim_end_matches('\0').to_owned()).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let length = HEADER + payload.len();
        let mut bytes = vec![0; length.next_multiple_of(4)];
        let mut header = NetlinkBuffer::new(&mut bytes);
        header.set_length(length as u32);
        header.set_message_type(kind);
        header.set_sequence_number(sequence);
        bytes[HEADER..length].copy_from_slice(payload);
        bytes
    }

    #[test]
    fn an_error_has_its_number_and_the_kernels_words() {
        let mut payload = (-libc::EINVAL).to_ne_bytes().to_vec();
        payload.extend(message(20, 7, &[]));
        payload.extend([8, 0, EXPLANATION as u8, 0]);
        payload.extend(b"no!\0");
        let parts = parts(&message(ERROR, 7, &payload), 7).expect("parses");
        let [Part::End(Err(error))] = &parts[..] else { panic!("{parts:?}") };
        assert_eq!(error.errno(), Some(libc::EINVAL));
        assert!(error.to_string().ends_with("(no!)"), "{error}");
    }

    #[test]
    fn answers_to_earlier_requests_are_left_out() {
        let mut datagram = message(ERROR, 1, &(-libc::EPERM).to_ne_bytes());
        datagram.extend(message(16, 2, b"item"));
        datagram.extend(message(DONE, 2, &0i32.to_ne_bytes()));
        let parts = parts(&datagram, 2).expect("parses");
        assert!(matches!(&parts[..], [Part::Item(item), Part::End(Ok(()))] if item == b"item"));
    }

    proptest! {
        #[test]
        fn arbitrary_datagrams_never_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            kind in 0u16..32,
        ) {
            let _ = parts(&bytes, 0);
            let _ = parts(&message(kind, 0, &bytes), 0);
        }
    }
}
