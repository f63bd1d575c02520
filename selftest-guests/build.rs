//! Builds the guests: one ELF for each file of `guests/`, with cargo's own compiler and the linker
//! that comes with it, whatever profile and flags the rest is built with.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs, io};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=guests");
    println!("cargo::rerun-if-changed=guest.ld");
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    for source in sources(&root.join("guests")).map_err(|e| format!("can't list guests: {e}"))? {
        compile(&root, &source, &out)?;
    }
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("cargo did not say {name}: {error}"))
}

fn sources(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let paths = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path()));
    let paths = paths.collect::<io::Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs")).collect())
}

fn compile(root: &Path, source: &Path, out: &Path) -> Result<(), String> {
    let name = source.file_stem().ok_or("a guest without a name")?;
    let script = root.join("guest.ld");
    let status = Command::new(variable("RUSTC")?)
        .args(["--edition", "2024", "--crate-type", "bin", "--target", "x86_64-unknown-linux-gnu"])
        .args(["-C", "panic=abort", "-C", "opt-level=2", "-C", "relocation-model=static"])
        .args(["-C", "linker=rust-lld", "-C", "linker-flavor=ld.lld", "-C", "strip=symbols"])
        .args(["-C", &format!("link-arg=-T{}", script.display())])
        .args(["-C", "link-arg=--build-id=none"])
        // The same image wherever the source lies.
        .arg(format!("--remap-path-prefix={}=.", root.display()))
        .args(["-D", "warnings"])
        .arg("-o")
        .arg(out.join(name))
        .arg(source)
        .status()
        .map_err(|error| format!("can't run the compiler: {error}"))?;
    if !status.success() {
        return Err(format!("guest {} does not build", source.display()));
    }
    Ok(())
}
