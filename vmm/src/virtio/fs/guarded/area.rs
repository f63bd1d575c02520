//! The areas of the tree, and how long a guest may believe what it was told of each.

use std::ffi::CStr;
use std::time::Duration;

use virtiofsd::filesystem::{DirEntry, DirectoryIterator, Entry, FileSystem, OpenOptions};
use virtiofsd::fuse::{Attr, ROOT_ID};
use virtiofsd::passthrough::PassthroughFs;

/// Where a file lies: in the tree's top or its `rootfs/` (0), in `mounts/`, `containers/` or `volumes/`
/// itself (1 to 3), in the mount of index n (n + 4), or in the container's or volume of number n,
/// which have the upper half of the numbers.
///
/// The guest could be told of the parts as file systems of their own (`FUSE_ATTR_SUBMOUNT`). But
/// Linux 6.12 gives such a submount neither POSIX ACLs nor `SB_NOSEC`
/// (`fs/fuse/inode.c:fuse_fill_super_submount`), and asks for a file's capabilities before each write
/// in it. So there is one file system for the guest, and what differs between its parts is kept in
/// the numbers: a node id is the library's with the area in bits 48 to 62, and an inode number is
/// the host's with the area mixed into the same bits, as two areas may be of different file systems
/// of the host that use the same numbers.
///
/// A guest that makes node ids up gains nothing by the area: it says how *it* may cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area(u16);

impl Area {
    const ROOTFS: Self = Self(0);
    const MOUNTS: Self = Self(1);
    const CONTAINERS: Self = Self(2);
    const VOLUMES: Self = Self(3);

    fn of_mount(index: u16) -> Option<Self> {
        (u32::from(index) <= MAX_MOUNT_INDEX).then(|| Self(index + FIRST_MOUNT))
    }

    fn of_container(number: u16) -> Option<Self> {
        (number < ADDITIONS).then(|| Self(FIRST_CONTAINER + number))
    }

    fn of_volume(number: u16) -> Option<Self> {
        (number < ADDITIONS).then(|| Self(FIRST_VOLUME + number))
    }

    /// It is a container's root file system.
    fn is_rootfs(self) -> bool {
        self == Self::ROOTFS || (FIRST_CONTAINER..FIRST_VOLUME).contains(&self.0)
    }

    /// What is in it comes and goes.
    fn changes(self) -> bool {
        self == Self::CONTAINERS || self == Self::VOLUMES
    }

    /// Its bits in a node id and an inode number.
    pub fn bits(self) -> u64 {
        u64::from(self.0) << AREA_SHIFT
    }
}

const FIRST_MOUNT: u16 = 4;
const FIRST_CONTAINER: u16 = 1 << 14;
const FIRST_VOLUME: u16 = FIRST_CONTAINER + ADDITIONS;

/// The largest index that a mount may have.
pub const MAX_MOUNT_INDEX: u32 = (FIRST_CONTAINER - FIRST_MOUNT - 1) as u32;

/// Numbers that containers may have, and as many for volumes.
pub const ADDITIONS: u16 = 1 << 13;

const AREA_SHIFT: u32 = 48;
const AREA_MASK: u64 = ((1 << 15) - 1) << AREA_SHIFT;

/// How long a guest may believe what it was told.
///
/// That a name does *not* exist is never cached: a file that another container or the host makes is
/// found at the very next look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Caching {
    /// For names and attributes.
    timeout: Duration,
    /// Whether file contents outlive the last close. What the guest holds is dropped in any case
    /// when it sees that size or mtime have changed.
    keep_contents: bool,
}

/// The root file system is the guest's alone while the step runs. It may believe for long, as builds
/// look up the same few thousand names over and over (each look that must be asked again costs a
/// round trip), but not for ever: someone may copy a file into a running container.
const ROOTFS_CACHING: Caching = Caching { timeout: Duration::from_secs(60), keep_contents: true };

/// A mount may be written by other containers at the same time. A second is what NFS clients and
/// their users are used to with `actimeo`; contents are looked at anew on each open, so that what
/// was written before the other side's close is seen by whoever opens after it.
const MOUNT_CACHING: Caching = Caching { timeout: Duration::from_secs(1), keep_contents: false };

/// A node id taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// The library's node id.
    pub id: u64,
    /// Where the file lies.
    pub area: Area,
}

/// Takes a node id apart.
pub fn known(node: u64) -> Known {
    let area = Area(((node & AREA_MASK) >> AREA_SHIFT) as u16);
    Known { id: node & !AREA_MASK, area }
}

impl Known {
    /// How long a guest may believe what it was told of this file's attributes.
    pub fn timeout(&self) -> Duration {
        self.caching().timeout
    }

    fn caching(&self) -> Caching {
        if self.area.is_rootfs() { ROOTFS_CACHING } else { MOUNT_CACHING }
    }

    /// The area of what is found under `name` in this directory.
    fn area_of_child(&self, name: &CStr) -> Area {
        let number = || name.to_str().ok().and_then(|name| name.parse::<u16>().ok());
        let area = match self.area {
            Area::ROOTFS if self.id == ROOT_ID => match name.to_bytes() {
                b"mounts" => Some(Area::MOUNTS),
                b"containers" => Some(Area::CONTAINERS),
                b"volumes" => Some(Area::VOLUMES),
                _ => None,
            },
            Area::MOUNTS => number().and_then(Area::of_mount),
            Area::CONTAINERS => number().and_then(Area::of_container),
            Area::VOLUMES => number().and_then(Area::of_volume),
            _ => None,
        };
        area.unwrap_or(self.area)
    }

    /// Turns the library's answer about `name` in this directory into the guest's.
    pub fn adopt(&self, name: &CStr, mut entry: Entry) -> Entry {
        let child = Known { id: entry.inode, area: self.area_of_child(name) };
        entry.inode |= child.area.bits();
        entry.attr = child.attributes(entry.attr);
        let changes = self.area.changes();
        entry.entry_timeout = if changes { Duration::ZERO } else { child.caching().timeout };
        entry.attr_timeout = child.caching().timeout;
        entry
    }

    /// The library's attributes of this file as the guest sees them.
    pub fn attributes(&self, mut attr: Attr) -> Attr {
        attr.ino ^= self.area.bits();
        attr
    }

    /// The library's options of this open file with the area's caching.
    pub fn open_options(&self, mut options: OpenOptions) -> OpenOptions {
        options.set(OpenOptions::KEEP_CACHE, self.caching().keep_contents);
        options
    }
}

/// A directory's entries with the inode numbers of its area.
pub struct Entries {
    /// The library's.
    pub inner: <PassthroughFs as FileSystem>::DirIter,
    /// Where the directory lies.
    pub area: Area,
}

impl DirectoryIterator for Entries {
    fn next(&mut self) -> Option<DirEntry<'_>> {
        let mut entry = self.inner.next()?;
        entry.ino ^= self.area.bits();
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_tree_has_an_area_of_its_own() {
        let area = |area, id, name: &str| {
            let name = std::ffi::CString::new(name).expect("no zero");
            Known { id, area }.area_of_child(&name)
        };
        let top = |name| area(Area::ROOTFS, ROOT_ID, name);
        let parents = [top("mounts"), top("containers"), top("volumes")];
        let last = (ADDITIONS - 1).to_string();
        let [mounts, containers, volumes] = parents;
        let mut all = vec![
            top("rootfs"),
            mounts,
            containers,
            volumes,
            area(mounts, 9, "0"),
            area(mounts, 9, &MAX_MOUNT_INDEX.to_string()),
            area(containers, 9, "0"),
            area(containers, 9, &last),
            area(volumes, 9, "0"),
            area(volumes, 9, &last),
        ];
        assert_eq!(all.last().map(|area| area.bits()), Some(AREA_MASK));
        all.sort_by_key(|area| area.0);
        all.dedup();
        assert_eq!(all.len(), 10);
        // A container's own directory of such a name is nothing particular.
        assert_eq!(area(Area::ROOTFS, 9, "containers"), Area::ROOTFS);
        assert_eq!(area(containers, 9, &ADDITIONS.to_string()), containers);
    }
}
