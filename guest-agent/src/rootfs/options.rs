//! The options of a mount (`mounts[].options`), with runc's names.

use super::tree::Attributes;

/// What a mount's options ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// A bind mount.
    pub bind: bool,
    /// With everything mounted below the source.
    pub recursive_bind: bool,
    /// Attributes of the mount itself.
    pub attributes: Attributes,
    /// Attributes of the mount and of all below it.
    pub recursive_attributes: Attributes,
    /// Propagation types to apply in this order, each alone or recursively.
    pub propagation: Vec<(u64, bool)>,
    /// Fill a new tmpfs with what it hides.
    pub copy_up: bool,
    /// What the file system itself is told.
    pub parameters: Vec<(String, Option<String>)>,
}

/// Options that mean something no guest can do.
const REFUSED: [(&str, &str); 4] = [
    ("idmap", "id-mapped mounts are not supported"),
    ("ridmap", "id-mapped mounts are not supported"),
    ("remount", "nothing is mounted there yet"),
    ("mand", "the kernel has no mandatory locks"),
];

/// Options of the file system as a whole: meaningless for a bind mount, where mount(2) ignores them.
const FILE_SYSTEM_FLAGS: [&str; 5] = ["sync", "async", "dirsync", "lazytime", "nolazytime"];

impl MountOptions {
    /// Reads options.
    ///
    /// # Errors
    /// Which option can't be honoured, and why.
    pub fn parse(options: &[String]) -> Result<Self, String> {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option)?;
        }
        if parsed.bind
            && let Some((name, _)) = parsed.parameters.first()
        {
            return Err(format!("unknown option {name:?} for a bind mount"));
        }
        Ok(parsed)
    }

    /// Whether the mount is to be read-only in the end.
    pub fn read_only(&self) -> bool {
        (self.attributes.set | self.recursive_attributes.set) & libc::MOUNT_ATTR_RDONLY != 0
    }

    fn add(&mut self, option: &str) -> Result<(), String> {
        if let Some((name, why)) = REFUSED.iter().find(|(name, _)| *name == option) {
            return Err(format!("option {name:?}: {why}"));
        }
        if let Some((set, clear)) = attribute(option) {
            self.attributes.add(set, clear);
            return Ok(());
        }
        if let Some((set, clear)) = option.strip_prefix('r').and_then(attribute) {
            self.recursive_attributes.add(set, clear);
            return Ok(());
        }
        if let Some(propagation) = propagation(option) {
            self.propagation.push(propagation);
            return Ok(());
        }
        match option {
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.recursive_bind) = (true, true),
            "tmpcopyup" => self.copy_up = true,
            // fsconfig(2), unlike mount(2), has no flag for the volume of the kernel's messages.
            "silent" | "loud" => {}
            "" | "defaults" | "nomand" | "noiversion" | "iversion" => {}
            flag if FILE_SYSTEM_FLAGS.contains(&flag) && self.bind => {}
            _ => self.parameters.push(match option.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (option.to_owned(), None),
            }),
        }
        Ok(())
    }
}

/// The propagation that a word stands for, and whether it is recursive.
pub fn propagation(word: &str) -> Option<(u64, bool)> {
    let (word, recursive) = match word.strip_prefix('r') {
        Some(rest) => (rest, true),
        None => (word, false),
    };
    let flag = match word {
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "private" => libc::MS_PRIVATE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some((flag, recursive))
}

/// The attributes that a word sets and clears.
fn attribute(word: &str) -> Option<(u64, u64)> {
    Some(match word {
        "ro" => (libc::MOUNT_ATTR_RDONLY, 0),
        "rw" => (0, libc::MOUNT_ATTR_RDONLY),
        "nosuid" => (libc::MOUNT_ATTR_NOSUID, 0),
        "suid" => (0, libc::MOUNT_ATTR_NOSUID),
        "nodev" => (libc::MOUNT_ATTR_NODEV, 0),
        "dev" => (0, libc::MOUNT_ATTR_NODEV),
        "noexec" => (libc::MOUNT_ATTR_NOEXEC, 0),
        "exec" => (0, libc::MOUNT_ATTR_NOEXEC),
        "nodiratime" => (libc::MOUNT_ATTR_NODIRATIME, 0),
        "diratime" => (0, libc::MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, 0),
        "symfollow" => (0, libc::MOUNT_ATTR_NOSYMFOLLOW),
        "noatime" => (libc::MOUNT_ATTR_NOATIME, libc::MOUNT_ATTR__ATIME),
        "strictatime" => (libc::MOUNT_ATTR_STRICTATIME, libc::MOUNT_ATTR__ATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => {
            (libc::MOUNT_ATTR_RELATIME, libc::MOUNT_ATTR__ATIME)
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<MountOptions, String> {
        MountOptions::parse(&options.iter().map(|&o| o.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn attributes_parameters_and_propagation_are_told_apart() {
        let options =
            parse(&["nosuid", "size=65536k", "mode=755", "newinstance", "rslave"]).expect("parses");
        assert_eq!(options.attributes.set, libc::MOUNT_ATTR_NOSUID);
        assert_eq!(options.propagation, [(libc::MS_SLAVE, true)]);
        let names: Vec<_> = options.parameters.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["size", "mode", "newinstance"]);
    }

    #[test]
    fn later_option_overrules_an_earlier_one() {
        let options = parse(&["ro", "rw"]).expect("parses");
        assert_eq!(options.attributes.set, 0);
        assert!(!options.read_only());
        let options = parse(&["strictatime", "noatime"]).expect("parses");
        assert_eq!(options.attributes.set, libc::MOUNT_ATTR_NOATIME);
        assert_eq!(options.attributes.clear, libc::MOUNT_ATTR__ATIME);
    }

    #[test]
    fn recursive_read_only_is_kept_apart() {
        let options = parse(&["rbind", "rro", "rnosuid"]).expect("parses");
        assert_eq!(options.attributes, Attributes::default());
        let recursive = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID;
        assert_eq!(options.recursive_attributes.set, recursive);
        assert!(options.bind && options.recursive_bind && options.read_only());
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        for option in ["idmap", "ridmap", "remount", "mand"] {
            assert!(parse(&[option]).expect_err("refused").contains(option));
        }
        assert!(parse(&["bind", "frobnicate"]).expect_err("refused").contains("frobnicate"));
    }
}
