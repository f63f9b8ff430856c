//! Files other than images that QEMU reads when it is started.

use std::path::PathBuf;

use super::CommandLine;
use super::keys::Keys;

/// Returns the files that `-readconfig` names.
pub(super) fn config_files(line: &CommandLine) -> Vec<PathBuf> {
    line.values_of(&["readconfig"]).map(PathBuf::from).collect()
}

/// Returns the other files, each with its option.
pub(super) fn input_files(line: &CommandLine) -> Vec<(String, PathBuf)> {
    let mut files = Vec::new();
    for argument in &line.arguments {
        let (Some(name), Some(value)) = (argument.name(), &argument.value) else { continue };
        let path = match name {
            "kernel" | "dtb" | "shim" => Some(value.clone()),
            // Several modules, each with arguments, go to a multiboot kernel.
            "initrd" if !value.contains([',', ' ']) => Some(value.clone()),
            "fw_cfg" => Keys::parse(value, "name").get("file").map(str::to_owned),
            _ => None,
        };
        files.extend(path.map(|path| (name.to_owned(), PathBuf::from(path))));
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_with_their_options() {
        let words = [
            "-kernel",
            "vmlinuz",
            "--initrd",
            "/a b",
            "-initrd",
            "initrd.img",
            "-fw_cfg",
            "name=opt/x,file=a,,b",
            "-fw_cfg",
            "opt/y,string=z",
            "-append",
            "kernel=x",
        ];
        let found = CommandLine::new(words).unwrap().input_files();
        let found: Vec<(&str, &str)> =
            found.iter().map(|(option, path)| (option.as_str(), path.to_str().unwrap())).collect();
        assert_eq!(found, [("kernel", "vmlinuz"), ("initrd", "initrd.img"), ("fw_cfg", "a,b")]);
    }
}
