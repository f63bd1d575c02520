//! Pods by containerd's CRI plugin, called as a kubelet calls it.

mod client;
mod containers;
mod messages;
mod node;
mod pods;
mod processes;
mod security;
mod streams;
