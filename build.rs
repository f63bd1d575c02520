//! How the `kiln` binary is linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // It is loaded at an address of the kernel's choice, so its tables of pointers are relocated at
    // each start: packed, what that reads is a hundredth of what it would be.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
