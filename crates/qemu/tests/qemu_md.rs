//! Compares the table of features in docs/qemu.md with the code.

use std::path::Path;
use std::{env, fs};

use vmfile_qemu::{Feature, QemuVersion};

const BEGIN: &str = "<!-- What `version.rs` says; `VMFILE_BLESS=1 cargo test` writes it. -->\n";
const END: &str = "<!-- End of what `version.rs` says. -->\n";

/// Returns the table that the code implies.
fn table() -> String {
    let mut text = String::from("| feature | since | until | matters to |\n|---|---|---|---|\n");
    for feature in Feature::all() {
        let since = match feature.since() {
            QemuVersion { major: 0, .. } => "always".to_owned(),
            version => short(version),
        };
        let until = feature.until().map_or_else(String::new, short);
        let matters_to = feature.matters_to();
        text.push_str(&format!("| {feature} | {since} | {until} | {matters_to} |\n"));
    }
    text
}

/// Returns a version without its third number, which is 0 in every release with new features.
fn short(version: QemuVersion) -> String {
    format!("{}.{}", version.major, version.minor)
}

#[test]
fn the_document_has_the_table_of_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/qemu.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the line before the table");
    let (written, after) = rest.split_once(END).expect("the line after the table");
    let table = table();
    if env::var_os("VMFILE_BLESS").is_some() {
        fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
        return;
    }
    assert!(written == table, "docs/qemu.md differs from the code, whose table is:\n{table}");
}
