//! What hangs on the architecture that QEMU emulates.

use vmfile_pages::PageSize;
use vmfile_qemu::{Vm, VmError};

/// The targets whose devices and pages the route `direct` knows.
const X86: [&str; 2] = ["i386", "x86_64"];

/// The targets whose smallest page is not one of 4 KiB (QEMU 7.2 to 11.1). A stream names the page size only
/// if it is larger than that.
const OTHER_PAGES: [(&str, u64); 6] = [
    ("arm", 1024),
    ("aarch64", 1024),
    ("sparc64", 8192),
    ("alpha", 8192),
    ("or1k", 8192),
    ("tricore", 16384),
];

/// Says why the memory of QEMU's process is not used, if QEMU emulates no x86: no command tells the size of
/// its pages, and QEMU's stream does.
pub(crate) fn not_direct(vm: &mut Vm) -> Result<Option<String>, VmError> {
    let target = vm.target()?;
    let is_known = X86.contains(&target.as_str());
    Ok((!is_known).then(|| format!("the guest is no x86 but {target}")))
}

/// Returns how large the pages of the guest are where its stream does not say it.
pub(super) fn page_size_unnamed(vm: &mut Vm) -> Result<PageSize, VmError> {
    let target = vm.target()?;
    let known = OTHER_PAGES.iter().find(|(name, _)| *name == target);
    Ok(known.and_then(|&(_, bytes)| PageSize::new(bytes)).unwrap_or(PageSize::KIB_4))
}
