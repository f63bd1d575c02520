//! Disks, with the guest's own driver.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::guest::{Guest, pattern};

/// Arguments of a command about a range of a disk.
fn range(disk: u8, offset: u64, length: u32) -> Vec<u8> {
    [&[disk][..], &offset.to_le_bytes(), &length.to_le_bytes()].concat()
}

fn errno(bytes: &[u8]) -> i32 {
    i32::from_le_bytes(bytes.try_into().expect("4 bytes"))
}

fn image(directory: &Path, name: &str, content: &[u8]) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, content).expect("image");
    path
}

fn write(guest: &Guest, disk: u8, offset: u64, data: &[u8]) -> i32 {
    errno(&guest.ask(b'w', &[range(disk, offset, data.len() as u32), data.to_vec()].concat()))
}

fn read(guest: &Guest, disk: u8, offset: u64, length: u32) -> Vec<u8> {
    let answer = guest.ask(b'r', &range(disk, offset, length));
    assert_eq!(errno(&answer[..4]), 0, "read of {length} at {offset}");
    answer[4..].to_vec()
}

fn clear(guest: &Guest, command: u8, disk: u8, offset: u64, length: u64) -> i32 {
    let arguments = [&[disk][..], &offset.to_le_bytes(), &length.to_le_bytes()].concat();
    errno(&guest.ask(command, &arguments))
}

#[test]
fn data_sizes_and_read_only_are_what_the_host_says() {
    let directory = tempfile::tempdir().expect("directory");
    let content = pattern((4 << 20) + 300);
    let writable = image(directory.path(), "writable", &content);
    let read_only = image(directory.path(), "read-only", &content);
    let guest = Guest::boot(&[(&writable, false), (&read_only, true)], &[]);

    for (disk, expected) in [(0, 0), (1, 1)] {
        let answer = guest.ask(b'i', &[disk]);
        let size = u64::from_le_bytes(answer[..8].try_into().expect("8 bytes"));
        assert_eq!(size, 4 << 20, "rounded down to whole sectors");
        assert_eq!(errno(&answer[8..]), expected, "read-only");
    }
    for (offset, length) in [(0, 512), (512, 4096), (0, 1 << 20), (3 << 20, 1 << 20)] {
        for disk in [0, 1] {
            let expected = &content[offset as usize..][..length as usize];
            assert!(read(&guest, disk, offset, length) == expected, "{length} at {offset}");
        }
    }
    let written: Vec<u8> = content[..1 << 20].iter().map(|byte| !byte).collect();
    assert_eq!(write(&guest, 0, 1 << 20, &written), 0);
    assert_ne!(write(&guest, 1, 1 << 20, &written), 0);
    assert!(read(&guest, 0, 1 << 20, 1 << 20) == written);
    guest.power_off();

    let mut expected = content.clone();
    expected[1 << 20..2 << 20].copy_from_slice(&written);
    assert!(fs::read(&writable).expect("reads") == expected);
    assert!(fs::read(&read_only).expect("reads") == content);
}

#[test]
fn discarded_space_is_given_back_and_zeroes_are_zeroes() {
    let directory = tempfile::tempdir().expect("directory");
    let content = pattern(8 << 20);
    let path = image(directory.path(), "disk", &content);
    let file = fs::File::open(&path).expect("opens");
    file.sync_all().expect("syncs");
    let before = file.metadata().expect("metadata").blocks();
    let guest = Guest::boot(&[(&path, false)], &[]);

    assert_eq!(clear(&guest, b'd', 0, 1 << 20, 4 << 20), 0);
    assert_eq!(clear(&guest, b'z', 0, 6 << 20, 4096), 0);
    assert!(read(&guest, 0, 6 << 20, 4096).iter().all(|byte| *byte == 0));
    guest.power_off();

    let freed = before - file.metadata().expect("metadata").blocks();
    assert!(freed >= (4 << 20) / 512, "only {freed} sectors were freed");
    assert_eq!(file.metadata().expect("metadata").len(), 8 << 20, "the size stays");
    let mut rest = vec![0; 1 << 20];
    file.read_exact_at(&mut rest, 5 << 20).expect("reads");
    assert!(rest == content[5 << 20..6 << 20], "what was not discarded is untouched");
    file.read_exact_at(&mut rest[..4096], (6 << 20) + 4096).expect("reads");
    assert!(rest[..4096] == content[(6 << 20) + 4096..][..4096]);
}

#[test]
fn an_ext4_file_system_survives_its_guest() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("ext4");
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(&path)
        .arg("32M")
        .status()
        .expect("e2fsprogs must be installed");
    assert!(made.success());
    let guest = Guest::boot(&[(&path, false)], &[]);
    assert_eq!(errno(&guest.ask(b'm', &[0])), 0);
    guest.power_off();

    let checked = Command::new("e2fsck").args(["-f", "-n"]).arg(&path).output().expect("e2fsck");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    let dumped = Command::new("debugfs").args(["-R", "cat /file"]).arg(&path).output();
    assert!(dumped.expect("debugfs").stdout == pattern(4 << 20));
}
