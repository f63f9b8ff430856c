//! Disk images on a command line, and others that take their places.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::keys::{Keys, write};
use super::{Argument, CommandLine, CommandLineError, parse_json};

/// Options whose value is an image, in whatever format it has.
const IMAGE_OPTIONS: [&str; 8] = ["hda", "hdb", "hdc", "hdd", "fda", "fdb", "pflash", "sd"];

/// Keys of a node's format that say where a raw image lies within its file.
const RAW_WINDOW: [&str; 2] = ["offset", "size"];

/// An image that takes the place of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// The path of the image whose place it takes.
    pub old: PathBuf,
    /// Its own path.
    pub new: PathBuf,
    /// Its format, e.g. `qcow2`. What lies below it is named in the image itself.
    pub format: String,
}

/// Puts `image` into its place; returns in how many places it was.
///
/// `directory` is what relative paths refer to.
pub(super) fn replace(
    line: &mut CommandLine,
    image: &NewImage,
    directory: &Path,
) -> Result<usize, CommandLineError> {
    let new = image.new.to_str().ok_or(CommandLineError::ImageNotText)?;
    let is_old = |path: &str| directory.join(path) == image.old;
    let mut count = 0;
    // Nodes of files, whose formats are nodes of their own.
    let mut files = Vec::new();
    for argument in &mut line.arguments {
        let Some(value) = argument.value.clone() else {
            if argument.name().is_none() && is_old(&argument.written) {
                argument.written = new.to_owned();
                count += 1;
            }
            continue;
        };
        let replaced = match argument.name() {
            Some("drive") => replace_drive(&value, is_old, (new, &image.format)),
            Some("blockdev") => match parse_json(&argument.written, &value)? {
                Some(node) => replace_json(node, is_old, (new, &image.format), &mut files),
                None => replace_node(&value, is_old, (new, &image.format), &mut files),
            },
            Some(name) if IMAGE_OPTIONS.contains(&name) && is_old(&value) => {
                Ok(Some(new.to_owned()))
            }
            _ => Ok(None),
        };
        if let Some(replaced) = replaced.map_err(|what| refused(argument, what))? {
            argument.value = Some(replaced);
            count += 1;
        }
    }
    for argument in line.arguments.iter_mut().filter(|a| a.name() == Some("blockdev")) {
        let value = argument.value.clone().unwrap_or_default();
        let changed = change_format(&value, &files, &image.format);
        if let Some(changed) = changed.map_err(|what| refused(argument, what))? {
            argument.value = Some(changed);
        }
    }
    Ok(count)
}

fn refused(argument: &Argument, what: &'static str) -> CommandLineError {
    CommandLineError::ImageInPlace { option: argument.written.clone(), what }
}

/// Replaces the image of a `-drive`.
fn replace_drive(
    value: &str,
    is_old: impl Fn(&str) -> bool,
    (new, format): (&str, &str),
) -> Result<Option<String>, &'static str> {
    let keys = Keys::parse(value, "");
    if !keys.get("file").is_some_and(is_old) {
        return Ok(None);
    }
    let of_old = |key: &str| matches!(key, "file" | "format" | "driver");
    refuse_window(&keys)?;
    let kept = keys.iter().filter(|(key, _)| !of_old(key)).map(|(key, value)| write(key, value));
    let ours = [write("file", new), write("format", format)];
    Ok(Some(ours.into_iter().chain(kept).collect::<Vec<_>>().join(",")))
}

/// Replaces the image of a `-blockdev` in JSON, in the node itself or in the one inside it.
fn replace_json(
    mut node: Value,
    is_old: impl Fn(&str) -> bool,
    (new, format): (&str, &str),
    files: &mut Vec<String>,
) -> Result<Option<String>, &'static str> {
    let names_old =
        |node: &Value| node.get("filename").and_then(Value::as_str).is_some_and(&is_old);
    if names_old(&node) {
        if let Some(name) = node.get("node-name").and_then(Value::as_str) {
            files.push(name.to_owned());
        }
        node["filename"] = json!(new);
    } else if node.get("file").is_some_and(names_old) {
        node["file"]["filename"] = json!(new);
        change_json(&mut node, format)?;
    } else {
        return Ok(None);
    }
    Ok(Some(node.to_string()))
}

/// Replaces the image of a `-blockdev` in words.
fn replace_node(
    value: &str,
    is_old: impl Fn(&str) -> bool,
    (new, format): (&str, &str),
    files: &mut Vec<String>,
) -> Result<Option<String>, &'static str> {
    let keys = Keys::parse(value, "driver");
    let is_file = keys.get("filename").is_some_and(&is_old);
    if !is_file && !keys.get("file.filename").is_some_and(&is_old) {
        return Ok(None);
    }
    if is_file {
        files.extend(keys.get("node-name").map(str::to_owned));
    }
    let path = |(key, value): (&str, &str)| {
        let is_path = matches!(key, "filename" | "file.filename");
        write(key, if is_path { new } else { value })
    };
    let words = keys.iter().map(path).collect::<Vec<_>>().join(",");
    if is_file { Ok(Some(words)) } else { change_words(&words, format).map(Some) }
}

/// Changes the format of a `-blockdev` whose file is one of the nodes `files`.
fn change_format(
    value: &str,
    files: &[String],
    format: &str,
) -> Result<Option<String>, &'static str> {
    let keys = Keys::parse(value, "driver");
    if !keys.get("file").is_some_and(|file| files.iter().any(|name| name == file)) {
        return Ok(None);
    }
    match serde_json::from_str::<Value>(value) {
        Ok(mut node) => {
            change_json(&mut node, format)?;
            Ok(Some(node.to_string()))
        }
        Err(_) => change_words(value, format).map(Some),
    }
}

fn change_json(node: &mut Value, format: &str) -> Result<(), &'static str> {
    refuse_window(&Keys::parse(&node.to_string(), "driver"))?;
    node["driver"] = json!(format);
    if let Some(node) = node.as_object_mut() {
        node.remove("backing");
    }
    Ok(())
}

fn change_words(words: &str, format: &str) -> Result<String, &'static str> {
    let keys = Keys::parse(words, "driver");
    refuse_window(&keys)?;
    let of_old = |key: &str| key == "driver" || key == "backing" || key.starts_with("backing.");
    let kept = keys.iter().filter(|(key, _)| !of_old(key)).map(|(key, value)| write(key, value));
    Ok([write("driver", format)].into_iter().chain(kept).collect::<Vec<_>>().join(","))
}

/// Refuses a raw image that is a part of its file.
fn refuse_window(keys: &Keys) -> Result<(), &'static str> {
    let has_window = RAW_WINDOW.iter().any(|key| keys.get(key).is_some());
    if has_window { Err("the image is a part of its file") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replaced(words: &[&str]) -> Result<(usize, Vec<String>), CommandLineError> {
        let mut line = CommandLine::new(words.iter().copied())?;
        let image = NewImage {
            old: PathBuf::from("/srv/a.raw"),
            new: PathBuf::from("/srv/a,1.qcow2"),
            format: "qcow2".to_owned(),
        };
        let count = line.replace_image(&image, Path::new("/srv"))?;
        Ok((count, line.to_arguments()))
    }

    #[test]
    fn a_drive_gets_the_new_image_and_keeps_the_rest() {
        let words = ["-drive", "file=a.raw,format=raw,if=none,id=d0,cache=none"];
        let expected = "file=/srv/a,,1.qcow2,format=qcow2,if=none,id=d0,cache=none";
        assert_eq!(replaced(&words).unwrap(), (1, vec!["-drive".to_owned(), expected.to_owned()]));
    }

    #[test]
    fn old_options_and_bare_images_are_found() {
        assert_eq!(replaced(&["-hda", "/srv/a.raw"]).unwrap().1[1], "/srv/a,1.qcow2");
        assert_eq!(replaced(&["a.raw"]).unwrap().1[0], "/srv/a,1.qcow2");
        assert_eq!(replaced(&["-hda", "/srv/b.raw"]).unwrap().0, 0);
    }

    #[test]
    fn nodes_in_words_get_image_and_format_together_or_apart() {
        let nested = "driver=raw,node-name=d,file.driver=file,file.filename=/srv/a.raw";
        let (count, words) = replaced(&["-blockdev", nested]).unwrap();
        let expected = "driver=qcow2,node-name=d,file.driver=file,file.filename=/srv/a,,1.qcow2";
        assert_eq!((count, words[1].as_str()), (1, expected));

        let file = "driver=file,node-name=f,filename=/srv/a.raw";
        let format = "raw,node-name=d,file=f";
        let (_, words) = replaced(&["-blockdev", file, "-blockdev", format]).unwrap();
        assert_eq!(words[1], "driver=file,node-name=f,filename=/srv/a,,1.qcow2");
        assert_eq!(words[3], "driver=qcow2,node-name=d,file=f");
    }

    #[test]
    fn nodes_in_json_lose_the_backing_that_was_named() {
        let file = r#"{"driver":"file","node-name":"f","filename":"/srv/a.raw"}"#;
        let format = r#"{"driver":"qcow2","node-name":"d","file":"f","backing":"b"}"#;
        let (_, words) = replaced(&["-blockdev", file, "-blockdev", format]).unwrap();
        let node: Value = serde_json::from_str(&words[3]).unwrap();
        assert_eq!(node, json!({"driver": "qcow2", "node-name": "d", "file": "f"}));
        let node: Value = serde_json::from_str(&words[1]).unwrap();
        assert_eq!(node["filename"], "/srv/a,1.qcow2");
        let nested =
            r#"{"driver":"raw","node-name":"d","file":{"driver":"file","filename":"a.raw"}}"#;
        let (_, words) = replaced(&["-blockdev", nested]).unwrap();
        let node: Value = serde_json::from_str(&words[1]).unwrap();
        assert_eq!(node["driver"], "qcow2");
    }

    #[test]
    fn a_part_of_a_file_is_refused_without_its_value() {
        let error = replaced(&["-drive", "file=a.raw,format=raw,offset=512"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no image can take the place of that of -drive: the image is a part of its file"
        );
    }
}
