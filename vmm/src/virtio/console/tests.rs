use std::os::unix::net::UnixStream;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::ring::Ring;

struct Guest<'m> {
    memory: &'m GuestMemory,
    receive: Ring<'m>,
    transmit: Ring<'m>,
}

impl<'m> Guest<'m> {
    fn new(memory: &'m GuestMemory) -> Self {
        let (receive, transmit) = (Ring::new(memory, 0x1000, 16), Ring::new(memory, 0x8000, 16));
        Self { memory, receive, transmit }
    }

    fn process(&mut self, console: &mut Console, event: Event) -> Used {
        let queues = &mut [&mut self.receive.queue, &mut self.transmit.queue];
        console.process(event, &mut Queues { memory: self.memory, queues }).unwrap()
    }

    fn host_is_waiting(&self, console: &Console) -> bool {
        is_ready(console.host_events().unwrap(), PollFlags::IN).unwrap()
    }
}

fn pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    std::io::pipe().unwrap()
}

#[test]
fn output_goes_out_in_order_across_descriptors() {
    let memory = crate::memory::allocate(1).unwrap();
    let mut guest = Guest::new(&memory);
    let (mut reader, writer) = pipe();
    let mut console = Console::new(None, Some(writer.into()), None).unwrap();
    memory.write_slice(b"hello world", GuestAddress(0x2_0000)).unwrap();
    guest.transmit.offer(&[(0x2_0000, 6, false), (0x2_0006, 5, false)]);
    assert!(guest.process(&mut console, Event::Queue(TRANSMIT)).contains(TRANSMIT));
    let mut bytes = [0; 11];
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello world");
    assert_eq!(guest.transmit.used(), [(0, 0)]);
}

#[test]
fn a_stalled_reader_stalls_the_queue_and_nothing_is_lost() {
    let memory = crate::memory::allocate(1).unwrap();
    let mut guest = Guest::new(&memory);
    let (mut reader, writer) = pipe();
    let mut console = Console::new(None, Some(writer.into()), None).unwrap();
    let sent: Vec<u8> = (0..200_000u32).map(|i| (i % 253) as u8).collect();
    memory.write_slice(&sent, GuestAddress(0x2_0000)).unwrap();
    guest.transmit.offer(&[(0x2_0000, 200_000, false)]);
    assert_eq!(guest.process(&mut console, Event::Queue(TRANSMIT)), Used::NONE);
    assert!(!guest.host_is_waiting(&console));
    let mut received: Vec<u8> = Vec::new();
    while received.len() < sent.len() {
        let mut bytes = [0; 8192];
        let count = reader.read(&mut bytes).unwrap();
        received.extend(&bytes[..count]);
        if guest.host_is_waiting(&console) {
            guest.process(&mut console, Event::Host);
        }
    }
    assert!(received == sent);
    assert_eq!(guest.transmit.used(), [(0, 0)]);
}

#[test]
fn output_that_nobody_reads_is_thrown_away() {
    let memory = crate::memory::allocate(1).unwrap();
    let mut guest = Guest::new(&memory);
    let (reader, writer) = pipe();
    drop(reader);
    let mut console = Console::new(None, Some(writer.into()), None).unwrap();
    guest.transmit.offer(&[(0x2_0000, 6, false)]);
    guest.transmit.offer(&[(0x2_0000, 6, false)]);
    assert!(guest.process(&mut console, Event::Queue(TRANSMIT)).contains(TRANSMIT));
    assert_eq!(guest.transmit.used_count(), 2);
    assert!(!guest.host_is_waiting(&console));
}

#[test]
fn input_waits_for_buffers() {
    let memory = crate::memory::allocate(1).unwrap();
    let mut guest = Guest::new(&memory);
    let (reader, mut writer) = pipe();
    let mut console = Console::new(Some(reader.into()), None, None).unwrap();
    writer.write_all(b"abcdef").unwrap();
    assert_eq!(guest.process(&mut console, Event::Queue(RECEIVE)), Used::NONE);
    assert!(!guest.host_is_waiting(&console), "there is no buffer to be woken for");

    guest.receive.offer(&[(0x2_0000, 4, true)]);
    guest.receive.offer(&[(0x2_0004, 4, true)]);
    guest.receive.offer(&[(0x2_0008, 4, true)]);
    assert!(guest.process(&mut console, Event::Queue(RECEIVE)).contains(RECEIVE));
    assert_eq!(guest.receive.used(), [(0, 4), (1, 2)]);
    let mut bytes = [0; 6];
    memory.read_slice(&mut bytes, GuestAddress(0x2_0000)).unwrap();
    assert_eq!(&bytes, b"abcdef");

    assert!(!guest.host_is_waiting(&console));
    writer.write_all(b"g").unwrap();
    assert!(guest.host_is_waiting(&console));
    guest.process(&mut console, Event::Host);
    assert_eq!(guest.receive.used().last(), Some(&(2, 1)));
}

#[test]
fn the_end_of_input_is_no_event() {
    let memory = crate::memory::allocate(1).unwrap();
    let mut guest = Guest::new(&memory);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut console = Console::new(Some(theirs.into()), None, None).unwrap();
    guest.receive.offer(&[(0x2_0000, 4, true)]);
    guest.process(&mut console, Event::Queue(RECEIVE));
    drop(ours);
    assert!(guest.host_is_waiting(&console));
    assert_eq!(guest.process(&mut console, Event::Host), Used::NONE);
    assert!(!guest.host_is_waiting(&console));
    assert_eq!(guest.receive.used_count(), 0);
}

#[test]
fn files_do_for_input_and_output() {
    use std::io::{Seek, Write};

    let memory = crate::memory::allocate(1).unwrap();
    let mut guest = Guest::new(&memory);
    let mut input = tempfile::tempfile().unwrap();
    input.write_all(b"xyz").unwrap();
    input.rewind().unwrap();
    let mut output = tempfile::tempfile().unwrap();
    let copy = output.try_clone().unwrap();
    let mut console = Console::new(Some(input.into()), Some(copy.into()), None).unwrap();
    guest.receive.offer(&[(0x2_0000, 8, true)]);
    guest.process(&mut console, Event::Queue(RECEIVE));
    assert_eq!(guest.receive.used(), [(0, 3)]);
    guest.transmit.offer(&[(0x2_0000, 3, false)]);
    guest.process(&mut console, Event::Queue(TRANSMIT));
    output.rewind().unwrap();
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "xyz");
}

#[test]
fn the_size_is_announced_if_there_is_one() {
    let console = Console::new(None, None, Some(Size { columns: 80, rows: 25 })).unwrap();
    let mut config = [0xff; 8];
    console.read_config(0, &mut config);
    assert_eq!((console.features(), config), (1, [80, 0, 25, 0, 0, 0, 0, 0]));
    assert_eq!(Console::new(None, None, None).unwrap().features(), 0);
}
