//! Secrets of the host, which a file holds only if that was asked for.

use vmfile_format::manifest::VmMeta;
use vmfile_qemu::{CommandLine, redact_image};

/// Leaves out the secrets of what a manifest says of a VM; returns where they were on its command line, by
/// option and key.
pub(crate) fn leave_out(meta: &mut VmMeta) -> Vec<String> {
    let places = in_options(meta.command_line.get_mut(1..).unwrap_or_default());
    for change in &mut meta.changes {
        in_options(&mut change.add);
    }
    for disk in &mut meta.disks {
        let below = disk.backing_files.iter_mut();
        let images = disk.images.iter_mut().map(|image| &mut image.path);
        for name in below.chain(images).chain([&mut disk.path]) {
            if let Some(redacted) = redact_image(name) {
                *name = redacted;
            }
        }
    }
    places
}

/// Returns a warning for secrets that were left out; none if there were none.
pub(crate) fn warning(places: &[String]) -> Option<String> {
    (!places.is_empty()).then(|| {
        format!(
            "the file does not hold the secrets of the command line ({}): a restore needs them",
            places.join(", ")
        )
    })
}

/// Replaces secrets in options. QEMU refuses a last option without its value: there is none here.
fn in_options(words: &mut [String]) -> Vec<String> {
    let Ok(mut line) = CommandLine::new(words.iter().cloned()) else { return Vec::new() };
    let places = line.redact();
    for (word, redacted) in words.iter_mut().zip(line.to_arguments()) {
        *word = redacted;
    }
    places
}
