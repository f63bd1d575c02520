//! The messages between monitor and agent, each as its receiver reads them: in pieces.

use kiln_protocol::frame::Decoder;
use kiln_protocol::{ExecId, FromAgent, MAX_FROM_AGENT, MAX_TO_AGENT, ToAgent};

use crate::conversation::Conversation;

/// What the monitor hears. The first byte is the size of the pieces; with it come, in place of the
/// monitor's turns, a create, and a start and an exec, after so many messages.
pub fn from_agent(bytes: &[u8]) {
    let [piece, create_after, start_after, frames @ ..] = bytes else { return };
    let mut conversation = Conversation::new("container");
    let mut decoder = Decoder::new(MAX_FROM_AGENT);
    let mut heard = 0;
    for piece in frames.chunks(usize::from(*piece) + 1) {
        decoder.push(piece);
        loop {
            match decoder.next::<FromAgent>() {
                Ok(Some(message)) => {
                    if conversation.hear(message).is_err() {
                        return;
                    }
                    heard += 1;
                    if heard == u32::from(*create_after) {
                        conversation.creating();
                    } else if heard == u32::from(*start_after) {
                        conversation.starting();
                        conversation.executing(ExecId(1));
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// What the agent hears. The first byte is the size of the pieces.
pub fn to_agent(bytes: &[u8]) {
    let [piece, frames @ ..] = bytes else { return };
    let mut decoder = Decoder::new(MAX_TO_AGENT);
    for piece in frames.chunks(usize::from(*piece) + 1) {
        decoder.push(piece);
        loop {
            match decoder.next::<ToAgent>() {
                Ok(Some(ToAgent::Create(create))) => {
                    let _ = kiln_agent::container::Plan::new(&create, 2);
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}
