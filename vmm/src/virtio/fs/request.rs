//! One FUSE request, from a descriptor chain to its reply.
//!
//! The library's server decodes requests and encodes replies. What it leaves open is closed here:
//! it gives up on a request that it can't decode, without a reply, and it relies on there being room
//! for a reply's header. Here every request that expects a reply and has room for one gets one:
//! `EINVAL` where the request makes no sense. `FUSE_TMPFILE`, which the library doesn't know, is
//! decoded here; so are the requests without a reply, which need no room for one: the library reads
//! each header again, by when the guest may have made another request of it.

use std::io::{self, Write};

use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse::{
    BatchForgetIn, CreateIn, EntryOut, ForgetIn, ForgetOne, InHeader, OpenOut, OutHeader,
};
use virtiofsd::server::Server;
use vm_memory::ByteValued;

use super::guarded::GuardedFs;

/// Requests of `fuse_kernel.h`: the first three have no reply.
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const TMPFILE: u32 = 51;

/// The most nodes that a request may have forgotten. Linux names 2048.
const MAX_FORGOTTEN: usize = 1 << 16;

/// Decodes requests and passes them to a file system.
pub struct RequestServer {
    library: Server<GuardedFs>,
    file_system: GuardedFs,
}

impl RequestServer {
    /// Serves requests to `file_system`.
    pub fn new(file_system: GuardedFs) -> Self {
        Self { library: Server::new(file_system.clone()), file_system }
    }

    /// Forgets everything about the guest.
    pub fn reset(&self) {
        self.library.destroy();
    }

    /// Serves a request. Returns the number of bytes written, for the used ring.
    pub fn serve(&self, mut reader: Reader<'_>, mut writer: Writer<'_>) -> u32 {
        let header = match reader.clone().read_obj::<InHeader>() {
            Ok(header) => header,
            Err(_) => return 0,
        };
        if let FORGET | INTERRUPT | BATCH_FORGET = header.opcode {
            if let Err(error) = self.forget(&mut reader) {
                tracing::debug!(opcode = header.opcode, %error, "malformed request");
            }
            return 0;
        }
        if writer.available_bytes() < size_of::<OutHeader>() {
            return 0;
        }
        let written = if header.opcode == TMPFILE {
            self.make_nameless(&mut reader, &mut writer).unwrap_or_else(|error| {
                refuse(&mut writer, header.unique, error.raw_os_error().unwrap_or(libc::EINVAL))
            })
        } else {
            match self.library.handle_message(reader, writer.clone(), None::<&mut ()>) {
                Ok(written) => written,
                Err(error) => {
                    tracing::debug!(opcode = header.opcode, %error, "malformed request");
                    refuse(&mut writer, header.unique, libc::EINVAL)
                }
            }
        };
        u32::try_from(written).unwrap_or(u32::MAX)
    }

    /// Serves a request without a reply.
    fn forget(&self, reader: &mut Reader<'_>) -> io::Result<()> {
        let header: InHeader = reader.read_obj()?;
        let context = Context::from(header);
        match header.opcode {
            FORGET => {
                let ForgetIn { nlookup } = reader.read_obj()?;
                self.file_system.forget(context, header.nodeid, nlookup);
            }
            BATCH_FORGET => {
                let BatchForgetIn { count, .. } = reader.read_obj()?;
                let nodes = (0..count).take(MAX_FORGOTTEN).map(|_| {
                    let ForgetOne { nodeid, nlookup } = reader.read_obj()?;
                    Ok((nodeid, nlookup))
                });
                let nodes = nodes.collect::<io::Result<_>>()?;
                self.file_system.batch_forget(context, nodes);
            }
            // What is interrupted has been served by the time this is read.
            _ => {}
        }
        Ok(())
    }

    /// Serves `FUSE_TMPFILE`, whose request and reply are `FUSE_CREATE`'s; the name in it means
    /// nothing.
    fn make_nameless(&self, reader: &mut Reader<'_>, writer: &mut Writer<'_>) -> io::Result<usize> {
        let header: InHeader = reader.read_obj()?;
        let request: CreateIn = reader.read_obj()?;
        let length = size_of::<OutHeader>() + size_of::<EntryOut>() + size_of::<OpenOut>();
        if writer.available_bytes() < length {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let (entry, handle, options) =
            self.file_system.make_nameless(Context::from(header), header.nodeid, &request)?;
        let out = OutHeader { len: length as u32, error: 0, unique: header.unique };
        let open = OpenOut { fh: handle, open_flags: options.bits(), ..OpenOut::default() };
        writer.write_all(out.as_slice())?;
        writer.write_all(EntryOut::from(entry).as_slice())?;
        writer.write_all(open.as_slice())?;
        Ok(length)
    }
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
