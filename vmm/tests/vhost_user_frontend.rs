//! A device of the kvm engine whose queues the fs backend process serves.

#![allow(clippy::unwrap_used)]

mod fs_driver;
mod fs_guest;

use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::Duration;

use fs_driver::{Driver, connect, error, init};
use fs_guest::FsProcess;
use kiln_vmm::transport::Backend;
use kiln_vmm::transport::vhost_user_frontend::Description;

#[test]
fn a_driver_is_served_by_another_process_and_again_after_a_reset() {
    let directory = tempfile::tempdir().unwrap();
    let rootfs = tempfile::tempdir().unwrap();
    let process = FsProcess::start(directory.path(), rootfs.path(), &[]);
    let mut backend = connect(&process.socket, || {});
    assert_eq!(backend.device_type(), 26);
    assert_eq!(backend.queue_max_sizes().len(), 3);
    let mut tag = [0; 5];
    backend.read_config(0, &mut tag);
    assert_eq!(&tag, b"kiln\0");

    for _ in 0..2 {
        let driver = Driver::activate(&mut backend);
        for _ in 0..20 {
            assert_eq!(error(&driver.request(&init(), 4096)), 0);
        }
        backend.reset();
        // Nobody listens any more: what is made available now stays as it is.
        driver.set_available(21);
        driver.doorbell.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(driver.used(), 20);
    }
    drop(backend);
    process.wait();
}

#[test]
fn a_process_that_goes_away_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let rootfs = tempfile::tempdir().unwrap();
    let process = FsProcess::start(directory.path(), rootfs.path(), &[]);
    let (sender, lost) = channel();
    let mut backend = connect(&process.socket, move || sender.send(()).unwrap());
    let driver = Driver::activate(&mut backend);
    assert_eq!(error(&driver.request(&init(), 4096)), 0);
    drop(process);
    lost.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(driver.needs_reset.load(Ordering::SeqCst));
    assert_eq!(driver.interrupt.read().unwrap(), 1);
    backend.reset();
}

#[test]
fn the_configuration_space_holds_the_tag_and_the_number_of_request_queues() {
    let config = Description::file_system("kiln").unwrap().config;
    assert_eq!(&config[..5], b"kiln\0");
    assert_eq!(&config[36..], &2u32.to_le_bytes());
    assert!(Description::file_system("").is_err());
    assert!(Description::file_system(&"x".repeat(36)).is_ok());
    assert!(Description::file_system(&"x".repeat(37)).is_err());
}
