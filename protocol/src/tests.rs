//! Hostile bytes as messages about execs, questions and figures, and bad ones about networks.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::network::{Interface, InterfaceAddress, Neighbour, Route, RouteKind};
use crate::statistics::{DeviceStatistics, MAX_DEVICES, MEMORY_STAT_KEYS};
use crate::*;

fn process(command: Vec<String>) -> GuestProcess {
    GuestProcess {
        pid: u32::MAX,
        container_pid: u32::MAX,
        parent: u32::MAX,
        uid: u32::MAX,
        cpu_time_ms: u64::MAX,
        start_time: u64::MAX,
        command,
        name: "\u{1}".repeat(MAX_NAME),
    }
}

fn answer(answer: Answer) -> FromAgent {
    FromAgent::Answer { container: "c".to_owned(), request: 7, answer }
}

fn round_trip(message: &FromAgent) -> Result<FromAgent, frame::FrameError> {
    let mut decoder = frame::Decoder::new(MAX_FROM_AGENT);
    decoder.push(&frame::encode(message, MAX_FROM_AGENT)?);
    Ok(decoder.next()?.expect("a whole message"))
}

#[test]
fn longest_list_of_processes_fits_a_frame() {
    let longest = process(vec!["\u{1}".to_owned(); MAX_COMMAND]);
    let message = answer(Answer::Processes(vec![longest; MAX_PROCESSES]));
    assert_eq!(round_trip(&message).expect("fits"), message);
}

#[test]
fn more_than_a_message_may_hold_is_malformed() {
    let stat = |key: &str| Statistics {
        memory: statistics::MemoryStatistics {
            stat: [(key.to_owned(), 1)].into(),
            ..Default::default()
        },
        ..Default::default()
    };
    let io = vec![DeviceStatistics::default(); MAX_DEVICES + 1];
    let too_much = [
        Answer::Processes(vec![process(Vec::new()); MAX_PROCESSES + 1]),
        Answer::Processes(vec![process(vec!["x".repeat(MAX_COMMAND), "x".to_owned()])]),
        Answer::Processes(vec![process(vec![String::new(); MAX_COMMAND + 1])]),
        Answer::Processes(vec![GuestProcess { name: "x".repeat(65), ..process(Vec::new()) }]),
        Answer::Refused("x".repeat(MAX_MESSAGE + 1)),
        Answer::Statistics(Box::new(stat("no_such_figure"))),
        Answer::Statistics(Box::new(Statistics { io, ..Default::default() })),
    ];
    for answer_too_long in too_much {
        let error = round_trip(&answer(answer_too_long)).expect_err("malformed");
        assert!(matches!(error, frame::FrameError::Malformed(_)), "{error:?}");
    }
    assert!(round_trip(&answer(Answer::Statistics(Box::new(stat(MEMORY_STAT_KEYS[0]))))).is_ok());
}

#[test]
fn objects_for_the_agent_survive_byte_for_byte() {
    let text = r#"{ "memory":  {"limit": 1e9} }"#;
    let resources = || serde_json::value::RawValue::from_string(text.to_owned()).expect("JSON");
    let ask = ToAgent::Ask {
        request: 1,
        container: "c".to_owned(),
        question: Question::Update { resources: resources() },
    };
    let exec = ToAgent::Exec(Box::new(ExecProcess {
        container: "c".to_owned(),
        exec: ExecId(3),
        process: resources(),
        stdio: Stdio::Pipes { stdin: None, stdout: None, stderr: None },
    }));
    for message in [ask, exec] {
        let mut decoder = frame::Decoder::new(MAX_TO_AGENT);
        decoder.push(&frame::encode(&message, MAX_TO_AGENT).expect("encodes"));
        let back = match decoder.next().expect("decodes").expect("whole") {
            ToAgent::Ask { question: Question::Update { resources }, .. } => resources,
            ToAgent::Exec(exec) => exec.process,
            other => panic!("another message came out: {other:?}"),
        };
        assert_eq!(back.get(), text);
    }
}

/// The largest network there can be, with the longest text for each value.
fn largest_network() -> Network {
    let address = Ipv6Addr::from([0xab; 16]).into();
    let on_interface = InterfaceAddress {
        address,
        prefix: 128,
        peer: Some(address),
        broadcast: Some(Ipv4Addr::BROADCAST),
        scope: u8::MAX,
        valid: u32::MAX,
        preferred: u32::MAX,
    };
    let interface = Interface {
        device: [u8::MAX; 6],
        name: "\u{1}".repeat(network::MAX_INTERFACE_NAME),
        link_address: [u8::MAX; 6],
        mtu: u32::MAX,
        up: false,
        addresses: vec![on_interface; network::MAX_ADDRESSES],
        neighbours: vec![
            Neighbour { address, link_address: [u8::MAX; 6] };
            network::MAX_NEIGHBOURS
        ],
    };
    let route = Route {
        kind: RouteKind::Unreachable,
        destination: address,
        prefix: 128,
        interface: Some(u8::MAX),
        gateway: Some(address),
        on_link: false,
        source: Some(address),
        metric: Some(u32::MAX),
        type_of_service: u8::MAX,
        scope: u8::MAX,
        protocol: u8::MAX,
        mtu: Some(u32::MAX),
        advertised_mss: Some(u32::MAX),
    };
    Network {
        interfaces: vec![interface; network::MAX_INTERFACES],
        routes: vec![route; network::MAX_ROUTES],
    }
}

fn start(network: Network) -> ToAgent {
    ToAgent::Start { container: "c".to_owned(), network: Some(Box::new(network)) }
}

/// The network of a start, after its way as a frame.
fn after_its_way(start: &impl serde::Serialize) -> Result<Network, frame::FrameError> {
    let mut decoder = frame::Decoder::new(MAX_TO_AGENT);
    decoder.push(&frame::encode(start, MAX_TO_AGENT)?);
    match decoder.next()?.expect("whole") {
        ToAgent::Start { network, .. } => Ok(*network.unwrap_or_default()),
        other => panic!("another message came out: {other:?}"),
    }
}

#[test]
fn largest_network_fits_a_frame_and_a_larger_one_is_malformed() {
    let largest = largest_network();
    assert_eq!(after_its_way(&start(largest.clone())).expect("fits"), largest);
    let one_more: [fn(&mut Network); 5] = [
        |network| network.interfaces.push(network.interfaces[0].clone()),
        |network| network.routes.push(network.routes[0]),
        |network| network.interfaces[0].name.push('x'),
        |network| {
            let interface = &mut network.interfaces[0];
            interface.addresses.push(interface.addresses[0]);
        },
        |network| {
            let interface = &mut network.interfaces[0];
            interface.neighbours.push(interface.neighbours[0]);
        },
    ];
    for add in one_more {
        let mut larger = largest.clone();
        add(&mut larger);
        let error = after_its_way(&start(larger)).expect_err("malformed");
        assert!(matches!(error, frame::FrameError::Malformed(_)), "{error:?}");
    }
}

/// Values that a field may be replaced with.
fn spoilers() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
        (0usize..40_000).prop_map(|length| Value::from("x".repeat(length))),
        (0usize..2_000).prop_map(|length| json!(vec![""; length])),
        Just(json!({})),
        Just(json!({"x": 1})),
    ]
}

/// Pointers to every value of a document.
fn pointers(value: &Value, at: &str, all: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| pointers(value, &format!("{at}/{name}"), all));
        }
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(index, value)| pointers(value, &format!("{at}/{index}"), all)),
        _ => {}
    }
    all.push(at.to_owned());
}

/// Replaces values of a document.
fn spoil(document: &mut Value, spots: Vec<(prop::sample::Index, Value)>) {
    for (spot, spoiler) in spots {
        let mut all = Vec::new();
        pointers(document, "", &mut all);
        if let Some(value) = document.pointer_mut(spot.get::<String>(&all)) {
            *value = spoiler;
        }
    }
}

fn is_within_bounds(message: &FromAgent) -> bool {
    match message {
        FromAgent::ExecFailed { message, .. } => message.len() <= MAX_MESSAGE,
        FromAgent::Answer { answer: Answer::Refused(why), .. } => why.len() <= MAX_MESSAGE,
        FromAgent::Answer { answer: Answer::Processes(all), .. } => {
            let fits = |process: &GuestProcess| {
                process.name.len() <= MAX_NAME
                    && process.command.len() <= MAX_COMMAND
                    && process.command.iter().map(String::len).sum::<usize>() <= MAX_COMMAND
            };
            all.len() <= MAX_PROCESSES && all.iter().all(fits)
        }
        FromAgent::Answer { answer: Answer::Statistics(all), .. } => {
            all.io.len() <= MAX_DEVICES && all.memory.stat.len() <= MEMORY_STAT_KEYS.len()
        }
        _ => true,
    }
}

proptest! {
    #[test]
    fn spoilt_messages_are_malformed_or_within_their_bounds(
        which in 0usize..4,
        spots in prop::collection::vec((any::<prop::sample::Index>(), spoilers()), 1..4),
    ) {
        let good = [
            answer(Answer::Processes(vec![process(vec!["sh".to_owned(), "-c".to_owned()])])),
            answer(Answer::Refused("no".to_owned())),
            answer(Answer::Statistics(Box::new(Statistics {
                io: vec![DeviceStatistics::default()],
                cpu_pressure: Some(Default::default()),
                ..Default::default()
            }))),
            FromAgent::ExecFailed {
                container: "c".to_owned(),
                exec: ExecId(1),
                phase: FailurePhase::Exec,
                message: "no".to_owned(),
                exit_code: 127,
            },
        ];
        let mut document = serde_json::to_value(&good[which]).expect("serialises");
        spoil(&mut document, spots);
        let Ok(bytes) = frame::encode(&document, MAX_FROM_AGENT) else { return Ok(()) };
        let mut decoder = frame::Decoder::new(MAX_FROM_AGENT);
        decoder.push(&bytes);
        if let Ok(Some(message)) = decoder.next::<FromAgent>() {
            prop_assert!(is_within_bounds(&message));
        }
    }

    #[test]
    fn spoilt_networks_are_malformed_or_within_their_bounds(
        spots in prop::collection::vec((any::<prop::sample::Index>(), spoilers()), 1..4),
    ) {
        let mut network = largest_network();
        network.interfaces.truncate(1);
        network.interfaces[0].addresses.truncate(1);
        network.interfaces[0].neighbours.truncate(1);
        network.routes.truncate(1);
        let mut document = serde_json::to_value(start(network)).expect("serialises");
        spoil(&mut document["start"]["network"], spots);
        if let Ok(network) = after_its_way(&document) {
            prop_assert!(network.interfaces.len() <= network::MAX_INTERFACES);
            prop_assert!(network.routes.len() <= network::MAX_ROUTES);
            for interface in network.interfaces {
                prop_assert!(interface.name.len() <= network::MAX_INTERFACE_NAME);
                prop_assert!(interface.addresses.len() <= network::MAX_ADDRESSES);
                prop_assert!(interface.neighbours.len() <= network::MAX_NEIGHBOURS);
            }
        }
    }
}
