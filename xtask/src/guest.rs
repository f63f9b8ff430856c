//! Makes the parts of the test guests: a kernel, an initramfs, a boot sector.
//!
//! Everything is in `target/guest`: `kernel/` (Debian's package, unpacked), `initramfs.cpio` and
//! `boot_sector.bin`. Each part is made only when it is missing or its sources changed.

mod cpio;
mod modules;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use self::cpio::CpioWriter;
use crate::apt::apt_get;
use crate::command::{output, run, say};
use crate::workspace::Workspace;

/// Debian's metapackage of the kernel for virtual machines: small, and with virtio.
const KERNEL_METAPACKAGE: &str = "linux-image-cloud-amd64";

const INIT_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Makes all parts that are missing or stale.
pub(crate) fn make(workspace: &Workspace) -> Result<(), Box<dyn Error>> {
    let directory = workspace.target().join("guest");
    fs::create_dir_all(&directory)?;
    make_boot_sector(workspace, &directory)?;
    let modules_directory = make_kernel(&directory)?;
    make_initramfs(workspace, &directory, &modules_directory)
}

fn make_boot_sector(workspace: &Workspace, directory: &Path) -> Result<(), Box<dyn Error>> {
    let source = workspace.root().join("testing/guest/boot_sector/boot_sector.s");
    let binary = directory.join("boot_sector.bin");
    if modified(&binary).is_some_and(|made| modified(&source).is_some_and(|source| source <= made))
    {
        return Ok(());
    }
    say("assemble the boot-sector guest");
    let object = directory.join("boot_sector.o");
    run(Command::new("as").arg("--32").arg("-o").arg(&object).arg(&source))?;
    run(Command::new("ld")
        .args(["-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o"])
        .args([&binary, &object]))
}

/// Unpacks Debian's kernel and returns the directory of its modules.
fn make_kernel(directory: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let kernel = directory.join("kernel");
    if let Some(modules) = modules_directory(&kernel) {
        return Ok(modules);
    }
    let aside = directory.join("kernel.part");
    let _ = fs::remove_dir_all(&aside);
    let _ = fs::remove_dir_all(&kernel);
    fs::create_dir_all(&aside)?;
    let package = match download_kernel(&aside) {
        Ok(package) => package,
        Err(_) => {
            // apt's lists are missing, or older than the mirror.
            apt_get(&["update", "-qq"])?;
            download_kernel(&aside)?
        }
    };
    say(&format!("unpack {package}: the Linux guest's kernel, not installed here"));
    let archive = fs::read_dir(&aside)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| format!("apt-get download left no {package}"))?;
    run(Command::new("dpkg-deb").arg("-x").args([&archive, &aside]))?;
    fs::remove_file(&archive)?;
    fs::rename(&aside, &kernel)?;
    modules_directory(&kernel).ok_or_else(|| format!("{package} has no modules").into())
}

/// Downloads the kernel's package into `directory` and returns its name.
fn download_kernel(directory: &Path) -> Result<String, Box<dyn Error>> {
    let package = kernel_package()?;
    let mut command = Command::new("apt-get");
    // Downloads as root: apt's own user may have no access to the directory.
    command.args(["download", "-qq", "-o", "APT::Sandbox::User=root", &package]);
    run(command.current_dir(directory))?;
    Ok(package)
}

/// Finds the package that the metapackage depends on.
fn kernel_package() -> Result<String, Box<dyn Error>> {
    let depends = output(Command::new("apt-cache").args(["depends", KERNEL_METAPACKAGE]))?;
    let package = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-") && !name.contains("unsigned"));
    Ok(package.ok_or_else(|| format!("apt knows no {KERNEL_METAPACKAGE}"))?.to_owned())
}

/// Returns `lib/modules/VERSION` of an unpacked kernel whose image is there too.
fn modules_directory(kernel: &Path) -> Option<PathBuf> {
    // Debian 13 has `lib` in `usr`.
    ["lib/modules", "usr/lib/modules"].iter().find_map(|parent| {
        let entry = fs::read_dir(kernel.join(parent)).ok()?.next()?.ok()?;
        let version = entry.file_name().into_string().ok()?;
        let image = kernel.join("boot").join(format!("vmlinuz-{version}"));
        image.exists().then(|| entry.path())
    })
}

fn make_initramfs(
    workspace: &Workspace,
    directory: &Path,
    modules_directory: &Path,
) -> Result<(), Box<dyn Error>> {
    let init = build_init(workspace, directory)?;
    let archive = directory.join("initramfs.cpio");
    let made = modified(&archive);
    let newest = [Some(init.clone()), std::env::current_exe().ok(), Some(modules_directory.into())]
        .into_iter()
        .flatten()
        .filter_map(|path| modified(&path))
        .max();
    if made.is_some() && newest <= made {
        return Ok(());
    }
    say("pack the Linux guest's initramfs");
    let mut cpio = CpioWriter::default();
    for name in ["dev", "proc", "sys", "modules"] {
        cpio.directory(name)?;
    }
    for (index, module) in modules::in_load_order(modules_directory)?.iter().enumerate() {
        cpio.file(&format!("modules/{index:02}-{}.ko", module.name), &module.bytes)?;
    }
    cpio.file("init", &fs::read(&init)?)?;
    let part = directory.join("initramfs.part");
    fs::write(&part, cpio.finish()?)?;
    Ok(fs::rename(&part, &archive)?)
}

/// Builds the guest's init as a static program, so that the initramfs needs no other file.
fn build_init(workspace: &Workspace, directory: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let target = directory.join("init");
    run(Command::new(env!("CARGO"))
        .current_dir(workspace.root())
        .args(["build", "--quiet", "--release", "--package", "vmfile-guest-init"])
        .args(["--target", INIT_TARGET, "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols")
        .env_remove("CARGO_ENCODED_RUSTFLAGS"))?;
    Ok(target.join(INIT_TARGET).join("release/vmfile-guest-init"))
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}
