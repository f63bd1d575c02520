//! An interface and a tap, joined: what arrives at either leaves by the other.
//!
//! It is done where a frame is received, by an `ingress` queueing discipline whose one filter takes
//! every frame (tc(8), `mirred egress redirect`). So nothing comes as far as the host's own stack, which
//! would answer for the addresses that the interface keeps. A discipline that is there already stays,
//! with the filters that it has.

use kiln_netlink::{Connection, Error};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcFilterU32,
    TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};

use super::{Asked, NetworkError};

/// The place of kiln's filter among those of an interface, by which it is known.
const PRIORITY: u16 = 0x6b6c;

/// `ETH_P_ALL` in network byte order: frames of every protocol.
const EVERY_PROTOCOL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// What has been added to an interface.
#[derive(Debug)]
pub struct Redirect {
    /// The kernel's number for the interface.
    index: u32,
    /// The discipline is kiln's too.
    made_discipline: bool,
}

/// Joins an interface, by number and name, with the tap of number `tap`. What has been added to the
/// interface is noted in `added`, also on a failure.
///
/// # Errors
/// Another sandbox has the interface, or the kernel can't.
pub fn join(
    connection: &mut Connection,
    (index, name): (u32, &str),
    tap: u32,
    added: &mut Vec<Redirect>,
) -> Result<(), NetworkError> {
    let asked = |what: &'static str| move || format!("network interface {name}: {what}");
    let made_discipline = add_discipline(connection, index).asked(asked(MISSING_DISCIPLINE))?;
    if !made_discipline {
        let filters = filters(connection, index).asked(asked("its filters"))?;
        match target(&filters) {
            Target::None => {}
            Target::Gone => delete_filter(connection, index).asked(asked("an old redirection"))?,
            Target::Other => {
                return Err(NetworkError::Interface {
                    name: name.to_owned(),
                    reason:
                        "is another sandbox's already: give each container a network of its own"
                            .to_owned(),
                });
            }
        }
    }
    added.push(Redirect { index, made_discipline });
    add_filter(connection, index, tap).asked(asked(MISSING_FILTER))?;
    add_discipline(connection, tap).asked(asked(MISSING_DISCIPLINE))?;
    add_filter(connection, tap, index).asked(asked(MISSING_FILTER))
}

const MISSING_DISCIPLINE: &str =
    "ingress queueing discipline (the host's kernel needs NET_SCH_INGRESS)";
const MISSING_FILTER: &str =
    "redirection (the host's kernel needs NET_ACT_MIRRED, and NET_CLS_U32 or NET_CLS_MATCHALL)";

impl Redirect {
    /// Removes it; one that has gone with its interface is removed.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove(self, connection: &mut Connection) -> Result<(), Error> {
        let removed = match self.made_discipline {
            true => connection.change(libc::RTM_DELQDISC, 0, &discipline(self.index)),
            false => delete_filter(connection, self.index),
        };
        match removed {
            Err(error) if is_absent(&error) => Ok(()),
            other => other,
        }
    }
}

/// Removes a redirection that leads to a tap which is no more, if there is one. The discipline goes
/// with it unless somebody else has a filter there.
///
/// # Errors
/// The kernel refuses.
pub fn remove_left(connection: &mut Connection, index: u32) -> Result<(), Error> {
    let filters = match filters(connection, index) {
        Err(error) if is_absent(&error) => return Ok(()),
        other => other?,
    };
    if !matches!(target(&filters), Target::Gone) {
        return Ok(());
    }
    Redirect { index, made_discipline: false }.remove(connection)?;
    if filters.iter().all(is_own) {
        Redirect { index, made_discipline: true }.remove(connection)?;
    }
    Ok(())
}

fn is_absent(error: &Error) -> bool {
    matches!(error.errno(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL))
}

fn message(index: u32, parent: TcHandle, attributes: Vec<TcAttribute>) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = parent;
    message.attributes = attributes;
    message
}

fn discipline(index: u32) -> TcMessage {
    let kind = TcAttribute::Kind("ingress".to_owned());
    let mut message = message(index, TcHandle::INGRESS, vec![kind]);
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message
}

/// Whether there was none before.
fn add_discipline(connection: &mut Connection, index: u32) -> Result<bool, Error> {
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    match connection.change(libc::RTM_NEWQDISC, flags, &discipline(index)) {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A message about kiln's filter on an interface.
fn filter(index: u32, attributes: Vec<TcAttribute>) -> TcMessage {
    // Of `ingress` and of `clsact` this is where frames come in.
    let parent = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
    let mut message = message(index, parent, attributes);
    message.header.info = (u32::from(PRIORITY) << 16) | u32::from(EVERY_PROTOCOL);
    message
}

fn delete_filter(connection: &mut Connection, index: u32) -> Result<(), Error> {
    connection.change(libc::RTM_DELTFILTER, 0, &filter(index, Vec::new()))
}

fn add_filter(connection: &mut Connection, from: u32, to: u32) -> Result<(), Error> {
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    let mut add = |kind: &str, options| {
        let attributes = vec![TcAttribute::Kind(kind.to_owned()), TcAttribute::Options(options)];
        connection.change(libc::RTM_NEWTFILTER, flags, &filter(from, attributes))
    };
    match add(TcFilterU32::KIND, every_frame(redirection(to))) {
        // A kernel without this filter.
        Err(error) if error.errno() == Some(libc::ENOENT) => {
            let action = TcFilterMatchAllOption::Action(vec![redirection(to)]);
            add(TcFilterMatchAll::KIND, vec![TcOption::MatchAll(action)])
        }
        other => other,
    }
}

/// u32 with one key that any frame has.
fn every_frame(action: TcAction) -> Vec<TcOption> {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.keys = vec![TcU32Key::default()];
    selector.nkeys = 1;
    let options = [TcFilterU32Option::Action(vec![action]), TcFilterU32Option::Selector(selector)];
    options.map(TcOption::U32).to_vec()
}

fn redirection(to: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let options = TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror));
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![options]),
    ];
    action
}

/// Where kiln's filter on an interface leads to.
enum Target {
    /// There is no filter of kiln's.
    None,
    /// To a tap that is no more.
    Gone,
    /// To a tap.
    Other,
}

/// All filters of an interface that see what comes in.
fn filters(connection: &mut Connection, index: u32) -> Result<Vec<TcMessage>, Error> {
    let mut request = filter(index, Vec::new());
    request.header.info = 0;
    connection.list(libc::RTM_GETTFILTER, &request)
}

fn is_own(filter: &TcMessage) -> bool {
    filter.header.info >> 16 == u32::from(PRIORITY)
}

fn target(filters: &[TcMessage]) -> Target {
    let mut target = Target::None;
    for filter in filters.iter().filter(|filter| is_own(filter)) {
        match leads_to(filter) {
            // The kernel's number of an interface that has gone.
            Some(0) => target = Target::Gone,
            Some(_) => return Target::Other,
            None => {}
        }
    }
    target
}

fn leads_to(filter: &TcMessage) -> Option<u32> {
    let options = filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let actions = options?.iter().filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions))
        | TcOption::MatchAll(TcFilterMatchAllOption::Action(actions)) => Some(actions),
        _ => None,
    });
    let attributes = actions.flatten().flat_map(|action| &action.attributes);
    let options = attributes.filter_map(|attribute| match attribute {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => Some(mirror.ifindex),
        _ => None,
    })
}
