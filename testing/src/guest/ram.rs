//! What backs the guest's RAM on the host.

use std::path::{Path, PathBuf};

/// RAM of a guest: its size, and what backs it on the host.
#[derive(Debug, Clone)]
pub struct Ram {
    pub(crate) kind: RamKind,
    pub(crate) size_mib: u64,
    pub(crate) reserve: bool,
}

/// What backs guest RAM on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RamKind {
    /// What QEMU uses for `-m` alone: anonymous private memory, without an `-object`.
    Machine,
    /// Anonymous private memory.
    Private,
    /// An anonymous shared file.
    Memfd,
    /// An anonymous shared file of 2 MiB huge pages; see [`HugePages`](crate::HugePages).
    HugetlbMemfd,
    /// A shared file in this directory: tmpfs, hugetlbfs or a disk.
    File(PathBuf),
}

impl Ram {
    /// What QEMU uses for `-m` alone.
    #[must_use]
    pub fn machine(size_mib: u64) -> Ram {
        Ram { kind: RamKind::Machine, ..Ram::private(size_mib) }
    }

    /// Anonymous private memory.
    #[must_use]
    pub fn private(size_mib: u64) -> Ram {
        Ram { kind: RamKind::Private, size_mib, reserve: true }
    }

    /// An anonymous shared file.
    #[must_use]
    pub fn memfd(size_mib: u64) -> Ram {
        Ram { kind: RamKind::Memfd, ..Ram::private(size_mib) }
    }

    /// An anonymous shared file of 2 MiB huge pages.
    #[must_use]
    pub fn hugetlb_memfd(size_mib: u64) -> Ram {
        Ram { kind: RamKind::HugetlbMemfd, ..Ram::private(size_mib) }
    }

    /// A shared file in `/dev/shm`.
    #[must_use]
    pub fn tmpfs(size_mib: u64) -> Ram {
        Ram::file(size_mib, Path::new("/dev/shm"))
    }

    /// A shared file in `directory`, which may be on a disk, on tmpfs or on hugetlbfs.
    #[must_use]
    pub fn file(size_mib: u64, directory: &Path) -> Ram {
        Ram { kind: RamKind::File(directory.to_path_buf()), ..Ram::private(size_mib) }
    }

    /// Reserves no swap, so that a guest may have more RAM than the host.
    #[must_use]
    pub fn without_reserve(mut self) -> Ram {
        self.reserve = false;
        self
    }

    /// Returns the value of `-object` for `size_mib` MiB of RAM of this kind, with the name `id`.
    pub(crate) fn backend(&self, id: &str, size_mib: u64, file: &Path) -> String {
        let (kind, more) = match &self.kind {
            RamKind::Machine | RamKind::Private => ("ram", String::new()),
            RamKind::Memfd => ("memfd", ",share=on".to_owned()),
            RamKind::HugetlbMemfd => ("memfd", ",share=on,hugetlb=on,hugetlbsize=2M".to_owned()),
            RamKind::File(_) => ("file", format!(",share=on,mem-path={}", file.display())),
        };
        let reserve = if self.reserve { "" } else { ",reserve=off" };
        format!("memory-backend-{kind},id={id},size={size_mib}M{more}{reserve}")
    }
}
