//! virtio-vsock.

pub mod broker;
