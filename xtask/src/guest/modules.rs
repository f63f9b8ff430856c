//! Chooses the kernel modules of the Linux guest, and the order in which it loads them.
//!
//! The order comes from the modules themselves: each names its dependencies in its `.modinfo`
//! section (`depends=virtio,virtio_ring`). There is no `modules.dep`, which is made only when a
//! kernel is installed.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The drivers that the guest needs. Memory hot-plug by ACPI is built into Debian's kernels.
const WANTED: [&str; 6] =
    ["virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon", "virtio_mem"];

/// A kernel module with its bytes, decompressed.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

/// Returns the wanted modules of the kernel at `modules_directory` with all they depend on, each
/// after its dependencies.
pub(crate) fn in_load_order(modules_directory: &Path) -> Result<Vec<Module>, Box<dyn Error>> {
    let mut paths = BTreeMap::new();
    find_modules(modules_directory, &mut paths)?;
    let mut modules = Vec::new();
    for name in WANTED {
        add(name, &paths, &mut modules)?;
    }
    Ok(modules)
}

fn add(
    name: &str,
    paths: &BTreeMap<String, PathBuf>,
    modules: &mut Vec<Module>,
) -> Result<(), Box<dyn Error>> {
    if modules.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let path = paths.get(name).ok_or_else(|| format!("the kernel has no module {name}"))?;
    let bytes = read(path)?;
    let dependencies = dependencies(&bytes).ok_or_else(|| format!("{name} has no `depends=`"))?;
    for dependency in dependencies {
        add(&dependency, paths, modules)?;
    }
    modules.push(Module { name: name.to_owned(), bytes });
    Ok(())
}

/// Reads the `depends=` of a module.
fn dependencies(module: &[u8]) -> Option<Vec<String>> {
    let key = b"depends=";
    let start = module.windows(key.len()).position(|window| window == key)? + key.len();
    let end = start + module[start..].iter().position(|&byte| byte == 0)?;
    let names = std::str::from_utf8(&module[start..end]).ok()?;
    Some(names.split(',').filter(|name| !name.is_empty()).map(canonical_name).collect())
}

fn find_modules(directory: &Path, paths: &mut BTreeMap<String, PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        // Does not follow the links `build` and `source`, whose targets do not exist.
        if entry.file_type()?.is_dir() {
            find_modules(&path, paths)?;
            continue;
        }
        let file_name = entry.file_name().to_string_lossy().into_owned();
        if let Some((name, "ko" | "ko.xz" | "ko.zst")) = file_name.split_once('.') {
            paths.insert(canonical_name(name), path);
        }
    }
    Ok(())
}

/// Replaces `-` with `_`: the kernel treats both as the same in module names.
fn canonical_name(name: &str) -> String {
    name.replace('-', "_")
}

/// Reads a module, and decompresses it if needed: newer Debian releases compress modules.
fn read(path: &Path) -> Result<Vec<u8>, Box<dyn Error>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return Ok(fs::read(path)?),
    };
    let output = Command::new(program).arg("-dc").arg(path).output()?;
    if !output.status.success() {
        return Err(format!("{program} -dc {}: {}", path.display(), output.status).into());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_module_itself() {
        let module = b"\x7fELF\0license=GPL\0depends=virtio,virtio-ring\0name=x\0";
        assert_eq!(dependencies(module).unwrap(), ["virtio", "virtio_ring"]);
        assert_eq!(dependencies(b"\0depends=\0").unwrap(), Vec::<String>::new());
        assert_eq!(dependencies(b"nothing here"), None);
    }

    #[test]
    fn a_module_comes_after_all_it_depends_on() {
        let directory = std::env::temp_dir().join(format!("vmfile-modules-{}", std::process::id()));
        fs::create_dir_all(directory.join("net")).unwrap();
        for (name, depends) in [
            ("virtio_pci.ko", "virtio,virtio_ring"),
            ("virtio.ko", ""),
            ("virtio_ring.ko", "virtio"),
            ("virtio_blk.ko", "virtio_ring"),
            ("net/virtio_net.ko", "virtio"),
            ("virtio-rng.ko", "virtio"),
            ("virtio_balloon.ko", "virtio"),
            ("virtio_mem.ko", "virtio"),
        ] {
            fs::write(directory.join(name), format!("\0depends={depends}\0")).unwrap();
        }
        let order = in_load_order(&directory).unwrap();
        fs::remove_dir_all(&directory).unwrap();

        let names: Vec<_> = order.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names[..4], ["virtio", "virtio_ring", "virtio_pci", "virtio_blk"]);
        assert_eq!(names.len(), 8);
    }
}
