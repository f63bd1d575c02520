//! Small guests for tests: the kernel under test with an initial RAM disk of this machine's own
//! programs, under QEMU's software CPU, and what they said on their serial console.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a guest may take before it counts as hung; far more than it needs on a busy machine.
const HUNG_AFTER: Duration = Duration::from_secs(400);

/// What is to be in the RAM disk, by its path there.
pub struct Initramfs {
    files: BTreeMap<PathBuf, PathBuf>,
    texts: BTreeMap<PathBuf, (u32, String)>,
}

impl Initramfs {
    /// Busybox, and `init` as `/init`.
    pub fn new(init: &str) -> Self {
        let busybox = installed("busybox", "busybox-static");
        let mut new = Self { files: [("/bin/busybox".into(), busybox)].into(), texts: [].into() };
        new.texts.insert("/init".into(), (0o100_755, init.to_owned()));
        new
    }

    /// Adds a program with its libraries.
    pub fn add_program(&mut self, at: &Path, program: &Path) {
        for library in run(Command::new("ldd").arg(program)).split_whitespace() {
            if library.starts_with('/') {
                self.files.insert(library.into(), library.into());
            }
        }
        self.files.insert(at.to_owned(), program.to_owned());
    }

    /// Adds a file of this content.
    #[allow(dead_code, reason = "not every test has files of its own")]
    pub fn add_text(&mut self, at: &str, text: &str) {
        self.texts.insert(at.into(), (0o100_644, text.to_owned()));
    }

    /// Writes the archive.
    pub fn write(&self, path: &Path) {
        let mut archive = File::create(path).unwrap();
        let names = self.files.keys().chain(self.texts.keys());
        let mut folders: Vec<&Path> = names.flat_map(|name| name.ancestors().skip(1)).collect();
        folders.extend(["/proc", "/sys", "/dev"].map(Path::new));
        folders.sort();
        folders.dedup();
        for folder in folders.into_iter().filter(|folder| *folder != Path::new("/")) {
            add(&mut archive, folder, 0o040_755, &[]);
        }
        for (inside, outside) in &self.files {
            let mode = 0o100_000 | fs::metadata(outside).unwrap().permissions().mode() & 0o777;
            add(&mut archive, inside, mode, &fs::read(outside).unwrap());
        }
        for (inside, (mode, text)) in &self.texts {
            add(&mut archive, inside, *mode, text.as_bytes());
        }
        cpio::newc::trailer(archive).unwrap();
    }
}

fn add(archive: &mut File, path: &Path, mode: u32, content: &[u8]) {
    let name = path.strip_prefix("/").unwrap().to_str().unwrap();
    let size = u32::try_from(content.len()).unwrap();
    let mut entry = cpio::newc::Builder::new(name).mode(mode).nlink(1).write(archive, size);
    entry.write_all(content).unwrap();
    entry.finish().unwrap();
}

/// The kernel that was built with the program under test; `root` is the repository.
pub fn kernel(root: &Path) -> PathBuf {
    let folder =
        std::env::var_os("KILN_LIB_DIR").map_or_else(|| root.join("out/lib/kiln"), PathBuf::from);
    let kernel = folder.join("vmlinux");
    assert!(kernel.exists(), "no kernel at {}: run `make kernel`", kernel.display());
    kernel
}

/// Boots a kernel with a RAM disk until it resets the machine; gives what it said. `parameters` are
/// the kernel's, `devices` are arguments of QEMU.
pub fn boot(kernel: &Path, initramfs: &Path, parameters: &str, devices: &[String]) -> String {
    let console = initramfs.with_extension("console");
    let parameters = format!("console=ttyS0 panic=-1 reboot=t loglevel=4 {parameters}");
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-M", "microvm,rtc=off,acpi=off", "-accel", "tcg,thread=multi", "-cpu", "max"])
        .args(["-m", "512", "-smp", "2", "-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial"])
        .arg(format!("file:{}", console.display()))
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &parameters])
        .args(devices)
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-system-x86_64 runs (Debian package qemu-system-x86)");

    let started = Instant::now();
    let hung = loop {
        if qemu.try_wait().unwrap().is_some() {
            break false;
        }
        if started.elapsed() > HUNG_AFTER {
            qemu.kill().unwrap();
            qemu.wait().unwrap();
            break true;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let console = String::from_utf8_lossy(&fs::read(console).unwrap()).replace('\r', "");
    assert!(!hung, "the guest did not end:\n{console}");
    console
}

/// The path of a program of this machine's.
pub fn installed(program: &str, package: &str) -> PathBuf {
    let folders = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(Path::new);
    let found = folders.iter().map(|folder| folder.join(program)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("no {program}: apt-get install {package}"))
}

/// The output of a command, which succeeds.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}
