//! The files of a pod's containers in the share of the machine that runs.
//!
//! A volume that several containers mount is in the share once: then the guest sees the same files in
//! all of them, and what is more than bytes between them works too, such as sockets, locks and shared
//! memory. What is mounted read-only is another thing than the same that can be written.
//!
//! All of it waits for the host's file systems, so it is done in a thread for each container, one at a
//! time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, bail};
use kiln_vmm::virtio::fs::{ADDITIONS, Place, Served, Share, ShareOptions, enter_mount_namespace};
use rustix::fs::{AtFlags, FileType, StatxFlags, statx};

use super::Join;

/// What is in the share beside the files of its first container. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Additions(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    containers: BTreeSet<u16>,
    volumes: BTreeMap<u16, Volume>,
    /// Where a free number is looked for next: the guest may still remember one that was in use.
    next_container: u16,
    next_volume: u16,
}

#[derive(Debug)]
struct Volume {
    tree: Tree,
    is_file: bool,
    /// Mounts of it.
    users: usize,
}

/// A tree of the host's as a guest sees it: two of these that are the same are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tree {
    /// The mount that it was found in: another may be read-only, or have others below it.
    mount: u64,
    device: (u32, u32),
    inode: u64,
    options: ShareOptions,
}

/// Where the files of a container are.
#[derive(Debug, PartialEq, Eq)]
pub struct Attached {
    /// Its root file system.
    pub rootfs: Place,
    /// Its bind mounts, in their order.
    pub binds: Vec<Place>,
}

impl Additions {
    /// Puts the files of a container into the share that a process serves, which is given by its pidfd.
    /// The paths are those of the mount namespace. The calling thread is to end afterwards.
    ///
    /// # Errors
    /// What can't be opened or mounted, by its path; then nothing is added.
    pub fn attach(
        &self,
        server: OwnedFd,
        namespace: &OwnedFd,
        join: &Join,
    ) -> anyhow::Result<Attached> {
        enter_mount_namespace(namespace.as_fd())?;
        let mut table = self.table();
        let mut shares = Vec::new();
        let attached = table.place(join, &mut shares);
        let attached = attached.and_then(|attached| {
            let done = Served::by(server).attach(&shares);
            if done.is_err() {
                table.release(&attached);
            }
            Ok(done.map(|()| attached)?)
        });
        attached.context("the pod's share")
    }

    /// Takes the files of a container out of the share again. The calling thread is to end afterwards.
    ///
    /// # Errors
    /// Something can't be unmounted. It stays until the machine ends.
    pub fn detach(&self, server: OwnedFd, attached: &Attached) -> anyhow::Result<()> {
        let mut table = self.table();
        let unused = table.release(attached);
        Ok(Served::by(server).detach(&unused)?)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Whoever panicked has left numbers in use at worst.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Gives a container's files their places; what isn't in the share yet is to be mounted there.
    fn place(&mut self, join: &Join, shares: &mut Vec<Share>) -> anyhow::Result<Attached> {
        let number = free(self.next_container, |number| self.containers.contains(&number))
            .context("a pod has no room for more containers")?;
        self.next_container = number + 1;
        self.containers.insert(number);
        let mut attached = Attached {
            rootfs: Place::Container { number },
            binds: Vec::with_capacity(join.binds.len()),
        };
        let placed = self.place_all(join, &mut attached, shares);
        if placed.is_err() {
            self.release(&attached);
        }
        placed.map(|()| attached)
    }

    fn place_all(
        &mut self,
        join: &Join,
        attached: &mut Attached,
        shares: &mut Vec<Share>,
    ) -> anyhow::Result<()> {
        let named = |path: &Path| path.display().to_string();
        let options = ShareOptions { read_only: join.rootfs_read_only, recursive: true };
        let rootfs = open(&join.rootfs).with_context(|| named(&join.rootfs))?;
        let share = Share::new(rootfs.as_fd(), attached.rootfs, options);
        shares.push(share.with_context(|| named(&join.rootfs))?);
        for bind in &join.binds {
            let source = open(&bind.source).with_context(|| named(&bind.source))?;
            let options = ShareOptions { read_only: bind.read_only, recursive: bind.recursive };
            let tree = identify(&source, bind.is_file, options);
            let tree = tree.with_context(|| named(&bind.source))?;
            let (place, is_new) = self.use_volume(tree, bind.is_file)?;
            attached.binds.push(place);
            if is_new {
                let share = Share::new(source.as_fd(), place, options);
                shares.push(share.with_context(|| named(&bind.source))?);
            }
        }
        Ok(())
    }

    /// The place of a volume, and whether it is to be mounted there.
    fn use_volume(&mut self, tree: Tree, is_file: bool) -> anyhow::Result<(Place, bool)> {
        let place = |number| Place::Volume { number, is_file };
        if let Some((number, volume)) = self.volumes.iter_mut().find(|(_, v)| v.tree == tree) {
            volume.users += 1;
            return Ok((place(*number), false));
        }
        let number = free(self.next_volume, |number| self.volumes.contains_key(&number))
            .context("a pod has no room for more volumes")?;
        self.next_volume = number + 1;
        self.volumes.insert(number, Volume { tree, is_file, users: 1 });
        Ok((place(number), true))
    }

    /// Gives a container's places up; which of them nobody uses any more.
    fn release(&mut self, attached: &Attached) -> Vec<Place> {
        let mut unused = Vec::new();
        for place in std::iter::once(attached.rootfs).chain(attached.binds.iter().copied()) {
            match place {
                Place::Container { number } if self.containers.remove(&number) => {
                    unused.push(place)
                }
                Place::Volume { number, .. } => {
                    let Some(volume) = self.volumes.get_mut(&number) else { continue };
                    volume.users -= 1;
                    if volume.users == 0 {
                        let is_file = volume.is_file;
                        self.volumes.remove(&number);
                        unused.push(Place::Volume { number, is_file });
                    }
                }
                _ => {}
            }
        }
        unused
    }
}

fn identify(source: &File, is_file: bool, options: ShareOptions) -> anyhow::Result<Tree> {
    let asked = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID;
    let found = statx(source, c"", AtFlags::EMPTY_PATH, asked)?;
    let is_directory = FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory;
    if is_file == is_directory {
        bail!("it was replaced while the container was made");
    }
    Ok(Tree {
        mount: found.stx_mnt_id,
        device: (found.stx_dev_major, found.stx_dev_minor),
        inode: found.stx_ino,
        options,
    })
}

/// The first free number from one on, round about.
fn free(from: u16, is_used: impl Fn(u16) -> bool) -> Option<u16> {
    let from = from % ADDITIONS;
    (from..ADDITIONS).chain(0..from).find(|number| !is_used(*number))
}

fn open(path: &Path) -> std::io::Result<File> {
    File::options().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bind;

    fn join(root: &Path, sources: &[(&str, bool)]) -> Join {
        let bind = |(index, (name, read_only)): (usize, &(&str, bool))| Bind {
            index,
            source: root.join(name),
            overlay: Vec::new(),
            destination: "/x".into(),
            is_file: false,
            read_only: *read_only,
            recursive: true,
        };
        Join {
            container: "c".to_owned(),
            rootfs: root.to_owned(),
            rootfs_read_only: false,
            binds: sources.iter().enumerate().map(bind).collect(),
        }
    }

    #[test]
    fn volumes_are_shared_and_given_up_with_their_last_user() {
        let root = tempfile::tempdir().expect("temporary directory");
        for name in ["a", "b"] {
            std::fs::create_dir(root.path().join(name)).expect("directory");
        }
        let (mut table, mut shares) = (Table::default(), Vec::new());
        let first = join(root.path(), &[("a", false), ("b", false), ("a", false)]);
        let first = table.place(&first, &mut shares).expect("these tests need root");
        assert_eq!(first.binds[0], first.binds[2]);
        assert_eq!(shares.len(), 3);
        let second = join(root.path(), &[("a", false), ("a", true)]);
        let second = table.place(&second, &mut shares).expect("placed");
        assert_eq!(first.binds[0], second.binds[0]);
        // What may be written and what may not are two.
        assert_ne!(second.binds[0], second.binds[1]);
        assert_ne!(first.rootfs, second.rootfs);
        assert_eq!(shares.len(), 5);

        assert_eq!(table.release(&first), [first.rootfs, first.binds[1]]);
        assert_eq!(table.release(&second), [second.rootfs, second.binds[0], second.binds[1]]);
        assert!(table.release(&second).is_empty());
        assert!(table.containers.is_empty() && table.volumes.is_empty());
    }

    #[test]
    fn what_cannot_be_opened_leaves_nothing_in_use() {
        let root = tempfile::tempdir().expect("temporary directory");
        let mut table = Table::default();
        let missing = join(root.path(), &[("missing", false)]);
        let error = table.place(&missing, &mut Vec::new()).expect_err("refused");
        assert!(format!("{error:#}").contains("missing"), "{error:#}");
        assert!(table.containers.is_empty() && table.volumes.is_empty());
    }

    #[test]
    fn numbers_come_round_and_end() {
        assert_eq!(free(ADDITIONS, |_| false), Some(0));
        assert_eq!(free(ADDITIONS - 1, |number| number != 3), Some(3));
        assert_eq!(free(7, |_| true), None);
    }
}
