//! The verdict, remembered until the host boots again or kiln changes.
//!
//! It is one small JSON file that is replaced as a whole. Whatever is wrong with it (cut off, of
//! another boot or version, somebody else's) it is as good as absent; and where it can't be
//! written the self-test is simply done each time.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

use super::verdict::Verdict;

/// No container's id has this character, so it is nobody's state directory.
const NAME: &str = "@engine.json";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const LONGEST: u64 = 64 << 10;

/// Where the verdict is kept, and what it must be about.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    key: Key,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    boot_id: String,
    version: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Content {
    #[serde(flatten)]
    key: Key,
    verdict: Verdict,
}

impl Cache {
    /// The cache for this boot of the host and this kiln; `None` where the boot has no name.
    pub fn of_this_boot() -> Option<Self> {
        let boot_id = std::fs::read_to_string(BOOT_ID).ok()?.trim().to_owned();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Some(Self { dir: dir(), key: Key { boot_id, version } })
    }

    /// The verdict, if one is remembered.
    pub fn load(&self) -> Option<Verdict> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(self.dir.join(NAME))
            .ok()?;
        let metadata = file.metadata().ok()?;
        if !metadata.is_file() || !trusted(metadata.uid(), metadata.mode()) {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(LONGEST).read_to_end(&mut bytes).ok()?;
        let content: Content = serde_json::from_slice(&bytes).ok()?;
        (content.key == self.key).then_some(content.verdict)
    }

    /// Remembers the verdict, if it can.
    pub fn store(&self, verdict: &Verdict) {
        if let Err(error) = self.try_store(verdict) {
            tracing::debug!(%error, dir = %self.dir.display(), "the engine's verdict is not cached");
        }
    }

    fn try_store(&self, verdict: &Verdict) -> io::Result<()> {
        make_dir(&self.dir)?;
        let content = Content { key: self.key.clone(), verdict: verdict.clone() };
        let new = self.dir.join(format!("{NAME}.{}", std::process::id()));
        let written = write_new(&new, &serde_json::to_vec(&content)?)
            .and_then(|()| std::fs::rename(&new, self.dir.join(NAME)));
        if written.is_err() {
            // It may not even exist.
            let _ = std::fs::remove_file(&new);
        }
        written
    }
}

/// Root's verdict is for root, a user's for that user: nobody reads what another could have forged.
fn dir() -> PathBuf {
    if Uid::effective().is_root() {
        return PathBuf::from("/run/kiln");
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_absolute()) {
        Some(dir) => PathBuf::from(dir).join("kiln"),
        None => std::env::temp_dir().join(format!("kiln-{}", Uid::effective())),
    }
}

fn make_dir(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => return made,
    }
    let metadata = std::fs::symlink_metadata(dir)?;
    match metadata.is_dir() && trusted(metadata.uid(), metadata.mode()) {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::PermissionDenied, "others may write there")),
    }
}

/// Ours, and nobody else may write to it.
fn trusted(owner: u32, mode: u32) -> bool {
    owner == Uid::effective().as_raw() && mode & 0o022 == 0
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // One that an earlier process of this number left behind.
    let _ = std::fs::remove_file(path);
    let mut file: File = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn verdict() -> Verdict {
        Verdict::CannotRunLinux { reason: "for a test".to_owned() }
    }

    fn cache(dir: &Path) -> Cache {
        let key = Key { boot_id: "boot".to_owned(), version: "1".to_owned() };
        Cache { dir: dir.join("kiln"), key }
    }

    #[test]
    fn a_verdict_is_remembered_and_replaced() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let cache = cache(dir.path());
        assert_eq!(cache.load(), None);
        cache.store(&verdict());
        assert_eq!(cache.load(), Some(verdict()));
        let other = Verdict::RunsLinux { ring0_per_second: 7 };
        cache.store(&other);
        assert_eq!(cache.load(), Some(other));
        let left = std::fs::read_dir(&cache.dir).expect("directory").count();
        assert_eq!(left, 1, "nothing but the file is left");
    }

    #[test]
    fn another_boot_or_version_begins_anew() {
        let dir = tempfile::tempdir().expect("temporary directory");
        cache(dir.path()).store(&verdict());
        for (boot_id, version) in [("other", "1"), ("boot", "2")] {
            let key = Key { boot_id: boot_id.to_owned(), version: version.to_owned() };
            assert_eq!(Cache { key, ..cache(dir.path()) }.load(), None);
        }
    }

    #[test]
    fn what_is_damaged_is_as_good_as_absent() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let cache = cache(dir.path());
        cache.store(&verdict());
        let path = cache.dir.join(NAME);
        let whole = std::fs::read(&path).expect("content");
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).expect("cut off");
            assert_eq!(cache.load(), None, "{length} bytes");
        }
        cache.store(&verdict());
        assert_eq!(cache.load(), Some(verdict()));
    }

    #[test]
    fn what_others_may_write_is_not_believed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let cache = cache(dir.path());
        cache.store(&verdict());
        let path = cache.dir.join(NAME);
        let open_to_all = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(&path, open_to_all).expect("mode");
        assert_eq!(cache.load(), None);
        let target = dir.path().join("target");
        std::fs::rename(&path, &target).expect("moved");
        std::os::unix::fs::symlink(&target, &path).expect("link");
        assert_eq!(cache.load(), None);
    }

    #[test]
    fn where_nothing_can_be_written_nothing_happens() {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join("kiln"), "a file").expect("written");
        let cache = cache(dir.path());
        cache.store(&verdict());
        assert_eq!(cache.load(), None);
    }
}
