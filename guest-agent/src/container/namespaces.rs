//! Which namespaces a container has of its own (`linux.namespaces`, user and time settings).

use std::fmt::Write as _;

use kiln_protocol::Joined;
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};

use crate::failure::Failure;

/// A container's namespaces besides PID, mount and cgroup, which it always has. They are its own but
/// for those that are joined, of which the PID namespace can be one.
#[derive(Debug, Clone, Default)]
pub struct Namespaces {
    /// Host and domain name.
    pub uts: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// Network.
    pub network: bool,
    /// Users, with their mappings.
    pub user: Option<UserMappings>,
    /// Time, with the content of `/proc/<pid>/timens_offsets`.
    pub time: Option<String>,
    /// Those of another container that it lives in.
    pub joined: Option<Joined>,
}

/// Id mappings of a user namespace.
#[derive(Debug, Clone)]
pub struct UserMappings {
    uids: Vec<LinuxIdMapping>,
    gids: Vec<LinuxIdMapping>,
}

impl UserMappings {
    /// The content of `/proc/<pid>/uid_map`.
    pub fn uid_map(&self) -> String {
        in_proc_format(&self.uids)
    }

    /// The content of `/proc/<pid>/gid_map`.
    pub fn gid_map(&self) -> String {
        in_proc_format(&self.gids)
    }

    /// Where the namespace's ids are outside it: those that aren't mapped become the overflow id.
    pub fn outside(&self, (uid, gid): (u32, u32)) -> (u32, u32) {
        (outside(&self.uids, uid), outside(&self.gids, gid))
    }
}

/// `/proc/sys/kernel/overflowuid`, which nothing in a guest changes.
const OVERFLOW_ID: u32 = 65_534;

impl Namespaces {
    /// Reads `linux.namespaces`, the mappings and the time offsets. `joined` are another container's.
    ///
    /// # Errors
    /// A namespace given twice or by a path, mappings without a user namespace or the reverse; a user
    /// namespace beside joined ones, which its root could not enter.
    pub fn from_spec(linux: Option<&Linux>, joined: Option<&Joined>) -> Result<Self, Failure> {
        let mut own = Self::of_its_own(linux)?;
        let Some(joined) = joined else { return Ok(own) };
        if own.user.is_some() {
            return Err(Failure::config(
                "linux.namespaces (user): a container of a pod has the users of its sandbox",
            ));
        }
        own.network |= joined.network;
        own.ipc |= joined.ipc;
        own.uts |= joined.uts;
        own.joined = Some(joined.clone());
        Ok(own)
    }

    fn of_its_own(linux: Option<&Linux>) -> Result<Self, Failure> {
        let Some(linux) = linux else {
            return Ok(Self::default());
        };
        let mut seen = Vec::new();
        for namespace in linux.namespaces().iter().flatten() {
            let kind = namespace.typ();
            let refuse = |why: &str| Failure::config(format!("linux.namespaces ({kind}): {why}"));
            if seen.contains(&kind) {
                return Err(refuse("given twice"));
            }
            let path = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty());
            let stays_outside = matches!(
                kind,
                LinuxNamespaceType::User | LinuxNamespaceType::Mount | LinuxNamespaceType::Time
            );
            if path.is_some() && stays_outside {
                return Err(refuse(
                    "a path names a namespace of the host, which a guest can't enter",
                ));
            }
            seen.push(kind);
        }
        let has = |kind| seen.contains(&kind);
        Ok(Self {
            uts: has(LinuxNamespaceType::Uts),
            ipc: has(LinuxNamespaceType::Ipc),
            network: has(LinuxNamespaceType::Network),
            user: user_mappings(linux, has(LinuxNamespaceType::User))?,
            time: time_offsets(linux, has(LinuxNamespaceType::Time))?,
            joined: None,
        })
    }

    /// The container has a network namespace that nobody had before it.
    pub fn has_new_network(&self) -> bool {
        self.network && !self.joined.as_ref().is_some_and(|joined| joined.network)
    }

    /// Its processes are born in the PID namespace of another container's.
    pub fn shares_processes(&self) -> bool {
        self.joined.as_ref().is_some_and(|joined| joined.processes.is_some())
    }

    /// The flags with which clone3(2) makes the namespaces that need no further preparation.
    pub fn clone_flags(&self) -> u64 {
        let processes = if self.shares_processes() { libc::CLONE_NEWPID as u64 } else { 0 };
        self.all_flags() & !(self.joined_flags() as u64 | processes)
    }

    /// The flags with which setns(2) joins the namespaces of another container's process, but for the
    /// PID namespace, which a process can only be born in.
    pub fn joined_flags(&self) -> libc::c_int {
        let Some(joined) = &self.joined else { return 0 };
        let kinds = [
            (joined.uts, libc::CLONE_NEWUTS),
            (joined.ipc, libc::CLONE_NEWIPC),
            (joined.network, libc::CLONE_NEWNET),
        ];
        kinds.iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, one)| all | one)
    }

    fn all_flags(&self) -> u64 {
        let optional = [
            (self.uts, libc::CLONE_NEWUTS),
            (self.ipc, libc::CLONE_NEWIPC),
            (self.network, libc::CLONE_NEWNET),
            (self.user.is_some(), libc::CLONE_NEWUSER),
        ];
        let always = (libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u64;
        optional
            .iter()
            .filter(|(wanted, _)| *wanted)
            .fold(always, |all, (_, one)| all | *one as u64)
    }

    /// The flags with which setns(2) joins the namespaces of a process that has them.
    pub fn join_flags(&self) -> libc::c_int {
        let time = if self.time.is_some() { libc::CLONE_NEWTIME } else { 0 };
        // The flags of namespaces fit an int: that is how the C library has them.
        self.all_flags() as libc::c_int | libc::CLONE_NEWCGROUP | time
    }
}

fn user_mappings(linux: &Linux, wanted: bool) -> Result<Option<UserMappings>, Failure> {
    let uids = linux.uid_mappings().clone().unwrap_or_default();
    let gids = linux.gid_mappings().clone().unwrap_or_default();
    if !wanted {
        return match uids.is_empty() && gids.is_empty() {
            true => Ok(None),
            false => Err(Failure::config(
                "linux.uidMappings, linux.gidMappings: without a user namespace",
            )),
        };
    }
    for (field, mappings) in [("uidMappings", &uids), ("gidMappings", &gids)] {
        if mappings.is_empty() {
            return Err(Failure::config(format!("linux.{field}: missing for the user namespace")));
        }
        if outside_checked(mappings, 0).is_none() {
            return Err(Failure::config(format!("linux.{field}: id 0 is not mapped")));
        }
    }
    Ok(Some(UserMappings { uids, gids }))
}

fn time_offsets(linux: &Linux, wanted: bool) -> Result<Option<String>, Failure> {
    let mut offsets: Vec<_> = linux.time_offsets().iter().flatten().collect();
    if !wanted && !offsets.is_empty() {
        return Err(Failure::config("linux.timeOffsets: without a time namespace"));
    }
    offsets.sort_by_key(|(clock, _)| clock.as_str());
    let mut content = String::new();
    for (clock, offset) in offsets {
        if !["monotonic", "boottime"].contains(&clock.as_str()) {
            return Err(Failure::config(format!("linux.timeOffsets: unknown clock {clock:?}")));
        }
        let (seconds, nanoseconds) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        let _ = writeln!(content, "{clock} {seconds} {nanoseconds}");
    }
    Ok(wanted.then_some(content))
}

fn in_proc_format(mappings: &[LinuxIdMapping]) -> String {
    mappings.iter().fold(String::new(), |mut text, mapping| {
        let (inside, outside) = (mapping.container_id(), mapping.host_id());
        let _ = writeln!(text, "{inside} {outside} {}", mapping.size());
        text
    })
}

fn outside(mappings: &[LinuxIdMapping], id: u32) -> u32 {
    outside_checked(mappings, id).unwrap_or(OVERFLOW_ID)
}

fn outside_checked(mappings: &[LinuxIdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id())?;
        (offset < mapping.size()).then(|| mapping.host_id().checked_add(offset))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Namespaces, Failure> {
        let linux: Linux = serde_json::from_str(json).expect("linux");
        Namespaces::from_spec(Some(&linux), None)
    }

    #[test]
    fn paths_are_the_hosts_concern_or_refused() {
        let read = |kind: &str| {
            let json = format!(r#"{{"namespaces":[{{"type":"{kind}","path":"/proc/1/ns/x"}}]}}"#);
            read(&json)
        };
        assert!(read("network").expect("reads").network);
        assert!(read("ipc").expect("reads").ipc);
        assert!(read("uts").expect("reads").uts);
        for kind in ["pid", "cgroup"] {
            assert!(read(kind).is_ok(), "{kind}");
        }
        for kind in ["mount", "user", "time"] {
            assert!(read(kind).is_err(), "{kind}");
        }
    }

    #[test]
    fn pid_and_mount_namespaces_are_always_new() {
        let flags = Namespaces::default().clone_flags();
        assert_eq!(flags, (libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u64);
    }

    #[test]
    fn joined_namespaces_are_entered_and_not_made() {
        let linux = r#"{"namespaces":[{"type":"ipc"},{"type":"uts"}]}"#;
        let linux: Linux = serde_json::from_str(linux).expect("linux");
        let container = "sandbox".to_owned();
        let joined = Joined { container, network: true, ipc: true, uts: false, processes: None };
        let namespaces = Namespaces::from_spec(Some(&linux), Some(&joined)).expect("reads");
        let made = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWUTS;
        assert_eq!(namespaces.clone_flags(), made as u64);
        assert_eq!(namespaces.joined_flags(), libc::CLONE_NEWNET | libc::CLONE_NEWIPC);
        let all = made | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWCGROUP;
        assert_eq!(namespaces.join_flags(), all);
        assert!(!namespaces.has_new_network() && !namespaces.shares_processes());

        let joined = Joined { processes: Some("other".to_owned()), ..joined };
        let namespaces = Namespaces::from_spec(Some(&linux), Some(&joined)).expect("reads");
        assert!(namespaces.shares_processes());
        assert_eq!(namespaces.clone_flags(), (libc::CLONE_NEWNS | libc::CLONE_NEWUTS) as u64);
        assert_eq!(namespaces.joined_flags(), libc::CLONE_NEWNET | libc::CLONE_NEWIPC);
        assert_eq!(namespaces.join_flags(), all);
    }

    #[test]
    fn mappings_translate_to_ids_outside() {
        let json = r#"{"namespaces":[{"type":"user"}],
            "uidMappings":[{"containerID":0,"hostID":1000,"size":10}],
            "gidMappings":[{"containerID":0,"hostID":2000,"size":10}]}"#;
        let user = read(json).expect("reads").user.expect("user namespace");
        assert_eq!(user.uid_map(), "0 1000 10\n");
        assert_eq!(user.outside((3, 4)), (1003, 2004));
        assert_eq!(user.outside((10, 11)), (OVERFLOW_ID, OVERFLOW_ID));
    }

    #[test]
    fn contradictions_are_refused() {
        for json in [
            r#"{"namespaces":[{"type":"user"}]}"#,
            r#"{"uidMappings":[{"containerID":0,"hostID":0,"size":1}]}"#,
            r#"{"namespaces":[{"type":"ipc"},{"type":"ipc"}]}"#,
            r#"{"timeOffsets":{"monotonic":{"secs":1}}}"#,
        ] {
            assert!(read(json).is_err(), "{json}");
        }
    }
}
