//! One FUSE request, from a descriptor chain to its reply.
//!
//! The library's server decodes requests and encodes replies. What it leaves open is closed here:
//! it gives up on a request that it can't decode, without a reply, and it relies on there being room
//! for a reply's header. Here every request that expects a reply and has room for one gets one:
//! `EINVAL` where the request makes no sense.

use std::io::Write;

use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::fuse::{InHeader, OutHeader};
use virtiofsd::server::Server;
use vm_memory::ByteValued;

use super::guarded::GuardedFs;

/// Requests that have no reply (`fuse_kernel.h`: `FUSE_FORGET`, `FUSE_INTERRUPT`,
/// `FUSE_BATCH_FORGET`).
const WITHOUT_REPLY: [u32; 3] = [2, 36, 42];

/// Serves a request. Returns the number of bytes written, for the used ring.
pub fn serve(server: &Server<GuardedFs>, reader: Reader<'_>, mut writer: Writer<'_>) -> u32 {
    let header = match reader.clone().read_obj::<InHeader>() {
        Ok(header) => header,
        Err(_) => return 0,
    };
    let replies = !WITHOUT_REPLY.contains(&header.opcode);
    if replies && writer.available_bytes() < size_of::<OutHeader>() {
        return 0;
    }
    let written = match server.handle_message(reader, writer.clone(), None::<&mut ()>) {
        Ok(written) => written,
        Err(error) => {
            tracing::debug!(opcode = header.opcode, %error, "malformed file system request");
            if replies { refuse(&mut writer, header.unique, libc::EINVAL) } else { 0 }
        }
    };
    u32::try_from(written).unwrap_or(u32::MAX)
}

/// Replies with an error; the caller has checked that there is room.
fn refuse(writer: &mut Writer<'_>, unique: u64, errno: i32) -> usize {
    let length = size_of::<OutHeader>();
    let header = OutHeader { len: length as u32, error: -errno, unique };
    match writer.write_all(header.as_slice()) {
        Ok(()) => length,
        Err(_) => 0,
    }
}
