//! The engines that call an OCI runtime, each as the distribution ships it, driving kiln as it is.
//!
//! Every test installs kiln on a [`stage`] of its own, a machine within the machine, with the
//! configuration that `docs/install.md` tells users to write; runs an engine's own commands on an
//! [`image`] that is made of the machine's packages; and looks at what users would see. The stage
//! and everything on it end with the test.
//!
//! Needs root, QEMU, the engines and the plugins of pods' networks (`setup/install`), and the guest's
//! kernel and agent in the folder that `KILN_LIB_DIR` names, or in `out/lib/kiln`.

// What fails here is the test.
#![allow(clippy::expect_used)]

mod buildah;
mod buildkit;
mod containerd;
mod cri;
mod crio;
mod docker;
mod image;
mod podman;
mod stage;
