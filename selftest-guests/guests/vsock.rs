//! The vsock device: a connection each way, more bytes than either side has credit for, and the
//! ends of connections.
//!
//! Command line: `vsock_port=P`: connects to the host's port P, sends `vsock_bytes=N` bytes (a
//! pattern) and expects them all back, then closes. `vsock_refused=P`: a connection to that port
//! must be refused. `vsock_listen=P`: accepts one connection to the guest's port P and echoes what
//! comes until the host closes its side.
//!
//! The first time that it has no credit left it says so, at once: from then on the host may read.
//!
//! The guest grants little credit and grants it late, so that the host has to wait for it, and
//! fails when the host sends more than it was granted. It keeps to what the host grants.
#![no_std]
#![no_main]

mod connection;
mod rt;
mod virtio;

use connection::{Connection, Packet, Socket, op};
use rt::report::{check, fail, ok};
use rt::{apic, cmdline, time, trap};

const DEVICE_ID: u32 = 19;
const LOCAL_PORT: u32 = 40_000;
/// Between receiving and granting again: the host is to run into the limit.
const RELUCTANCE: u64 = 200_000;

fn main() {
    apic::enable();
    trap::enable_interrupts();
    let Some(window) = virtio::find(DEVICE_ID).next() else {
        return fail("vsock", format_args!("there is no device"));
    };
    let mut socket = match Socket::open(window) {
        Ok(socket) => socket,
        Err(error) => return fail("vsock", format_args!("{error}")),
    };
    if let Err(reason) = test(&mut socket) {
        fail("vsock", format_args!("{reason}"));
    }
}

fn test(socket: &mut Socket) -> Result<(), &'static str> {
    if let Some(port) = cmdline::number("vsock_refused") {
        refused(socket, port as u32)?;
    }
    if let Some(port) = cmdline::number("vsock_port") {
        let bytes = cmdline::number("vsock_bytes").unwrap_or(1 << 20);
        exchange(socket, port as u32, bytes)?;
    }
    if let Some(port) = cmdline::number("vsock_listen") {
        echo(socket, port as u32)?;
    }
    Ok(())
}

fn refused(socket: &mut Socket, port: u32) -> Result<(), &'static str> {
    let connection = Connection::new(LOCAL_PORT - 1, port);
    socket.send(&connection, op::REQUEST, 0, &[])?;
    let answer = socket.receive()?;
    check("refused connection", answer.op == op::RST, format_args!("answer {}", answer.op));
    Ok(())
}

/// Sends and receives at the same time, so that neither side's buffers bound the exchange.
fn exchange(socket: &mut Socket, port: u32, bytes: u64) -> Result<(), &'static str> {
    let mut connection = Connection::new(LOCAL_PORT, port);
    socket.send(&connection, op::REQUEST, 0, &[])?;
    let answer = socket.receive()?;
    if answer.op != op::RESPONSE {
        return Err("the host does not answer a connection");
    }
    connection.note_credit(&answer);
    ok("connection to the host");

    let (mut sent, mut received) = (0, 0);
    let (mut ran_out, mut asked) = (false, false);
    let mut chunk = [0; connection::MAX_PAYLOAD];
    while received < bytes {
        let room = connection.credit().min(bytes - sent).min(chunk.len() as u64);
        if room > 0 {
            let chunk = &mut chunk[..room as usize];
            chunk.iter_mut().zip(sent..).for_each(|(byte, at)| *byte = pattern(at));
            socket.send(&connection, op::RW, 0, chunk)?;
            connection.sent(room);
            sent += room;
        } else if sent < bytes && !asked {
            socket.send(&connection, op::CREDIT_REQUEST, 0, &[])?;
            if !ran_out {
                ok("host's credit ran out");
            }
            (ran_out, asked) = (true, true);
        }
        let packet = match socket.poll() {
            Some(packet) => packet,
            None if room > 0 => continue,
            None => socket.receive()?,
        };
        asked &= packet.op != op::CREDIT_UPDATE;
        connection.note_credit(&packet);
        received += take(socket, &mut connection, &packet, received)?;
    }
    if !ran_out {
        return Err("the host's credit never ran out");
    }
    ok("echo");
    close(socket, &connection)
}

/// Checks the payload of a packet and grants credit for it; its length.
fn take(
    socket: &mut Socket,
    connection: &mut Connection,
    packet: &Packet,
    from: u64,
) -> Result<u64, &'static str> {
    match packet.op {
        op::RW => {}
        op::CREDIT_UPDATE => return Ok(0),
        op::CREDIT_REQUEST => {
            socket.send(connection, op::CREDIT_UPDATE, 0, &[])?;
            return Ok(0);
        }
        _ => return Err("the host ended the connection too early"),
    }
    let right = packet.payload().iter().zip(from..).all(|(byte, at)| *byte == pattern(at));
    if !right {
        return Err("what came back is not what was sent");
    }
    let length = packet.payload().len() as u64;
    received(socket, connection, length)?;
    Ok(length)
}

/// Counts what was received against the credit that the host had, and grants more when little of
/// it is left.
fn received(
    socket: &mut Socket,
    connection: &mut Connection,
    length: u64,
) -> Result<(), &'static str> {
    if !connection.received(length) {
        return Err("the host sent more than it was granted");
    }
    if connection.little_granted() {
        time::pause(RELUCTANCE);
        connection.grant();
        socket.send(connection, op::CREDIT_UPDATE, 0, &[])?;
    }
    Ok(())
}

fn close(socket: &mut Socket, connection: &Connection) -> Result<(), &'static str> {
    socket.send(connection, op::SHUTDOWN, connection::BOTH_SIDES, &[])?;
    loop {
        match socket.receive()?.op {
            op::RST => break,
            op::CREDIT_UPDATE | op::CREDIT_REQUEST | op::SHUTDOWN => {}
            _ => return Err("the host sends on a closed connection"),
        }
    }
    ok("close");
    Ok(())
}

fn echo(socket: &mut Socket, port: u32) -> Result<(), &'static str> {
    ok("listening");
    let request = socket.receive()?;
    if request.op != op::REQUEST || request.local_port != port {
        return Err("the host does not connect");
    }
    let mut connection = Connection::new(port, request.peer_port);
    connection.note_credit(&request);
    socket.send(&connection, op::RESPONSE, 0, &[])?;
    loop {
        let packet = socket.receive()?;
        connection.note_credit(&packet);
        match packet.op {
            op::RW => {
                send_all(socket, &mut connection, packet.payload())?;
                received(socket, &mut connection, packet.payload().len() as u64)?;
            }
            op::CREDIT_REQUEST => socket.send(&connection, op::CREDIT_UPDATE, 0, &[])?,
            op::CREDIT_UPDATE => {}
            op::SHUTDOWN if packet.flags & connection::NO_MORE_SENT == 0 => {}
            op::SHUTDOWN | op::RST => break,
            _ => return Err("the host breaks the protocol"),
        }
    }
    socket.send(&connection, op::RST, 0, &[])?;
    ok("echo to the host");
    Ok(())
}

/// Sends all of `payload`, waiting for credit. The host sends nothing but credit meanwhile that
/// fits into what it was granted, so its data is kept for later.
fn send_all(
    socket: &mut Socket,
    connection: &mut Connection,
    mut payload: &[u8],
) -> Result<(), &'static str> {
    while !payload.is_empty() {
        let room = connection.credit().min(payload.len() as u64) as usize;
        if room == 0 {
            socket.send(connection, op::CREDIT_REQUEST, 0, &[])?;
            let update = socket.receive_credit()?;
            connection.note_credit(&update);
            continue;
        }
        let (now, later) = payload.split_at(room);
        socket.send(connection, op::RW, 0, now)?;
        connection.sent(room as u64);
        payload = later;
    }
    Ok(())
}

/// The byte at a place of the stream: no period that a buffer's size could hide.
fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}
