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
        below.chain(images).chain([&mut disk.path]).for_each(in_text);
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

fn in_text(text: &mut String) {
    *text = redact_image(text).into_owned();
}

/// Replaces secrets in options. The last word may be an option that vmfile takes for one with a value.
fn in_options(words: &mut [String]) -> Vec<String> {
    let line = CommandLine::new(words.iter().cloned()).or_else(|_| {
        let but_last = words.split_last().map_or(&[][..], |(_, before)| before);
        CommandLine::new(but_last.iter().cloned())
    });
    let Ok(mut line) = line else { return Vec::new() };
    let places = line.redact();
    for (word, redacted) in words.iter_mut().zip(line.to_arguments()) {
        *word = redacted;
    }
    places
}
