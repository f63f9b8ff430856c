//! Puts other media into the drives of a command line, however the drives are written.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::drives::{LineDrive, NodeAt, Nodes, Place, blockdev_tree, drive_tree, own_keys};
use super::keys::{self, Keys};
use super::{Argument, CommandLine, CommandLineError};
use crate::image_format::{FILE_DRIVERS, raw_of};
use crate::raw_window::RAW_WINDOW;

/// Keys of a node that belong to the image that was there: what lies below or beside it, and how it
/// is decrypted.
const OLD_IMAGE_KEYS: [&str; 5] =
    ["backing", "encrypt", "key-secret", "data-file", "data-file-raw"];

/// Keys that only the format qcow2 has (QEMU 7.2 to 11.1).
const QCOW2_KEYS: [&str; 11] = [
    "cache-clean-interval",
    "cache-size",
    "discard-no-unref",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "overlap-check",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "refcount-cache-size",
];

/// An image to be put into a drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Medium {
    /// Its absolute path.
    pub path: PathBuf,
    /// Its format, e.g. `qcow2`. What lies below it is named in the image itself.
    pub format: String,
    /// Whether it is a block device.
    pub is_device: bool,
    /// Whether the drive is to be read-only; `None` leaves it as it is written.
    pub read_only: Option<bool>,
}

impl CommandLine {
    /// Puts a medium into a drive of this command line, in place of the one that it names, if any.
    ///
    /// `drive` comes from [`CommandLine::drives`] of this line, unchanged since.
    ///
    /// # Errors
    ///
    /// [`CommandLineError::ImageInPlace`] where the drive is written in a way that leaves no place
    /// for another image, and [`CommandLineError::ImageNotText`].
    pub fn put_medium(
        &mut self,
        drive: &LineDrive,
        medium: &Medium,
    ) -> Result<(), CommandLineError> {
        let path = medium.path.to_str().ok_or(CommandLineError::ImageNotText)?;
        let refused = |what| CommandLineError::ImageInPlace {
            option: drive.option.clone().unwrap_or_default(),
            what,
        };
        match drive.place {
            Place::Own(index) => self.put_into_drive(index, path, medium).map_err(refused),
            Place::Node(at, _) => self.put_into_node(at, path, medium).map_err(refused),
            Place::Empty(device) => {
                self.put_into_device(device, path, medium);
                Ok(())
            }
        }
    }

    /// Takes the medium out of a drive of this command line; the empty drive stays.
    ///
    /// # Errors
    ///
    /// [`CommandLineError::ImageInPlace`] for a drive that cannot be empty.
    pub fn take_medium_out(&mut self, drive: &LineDrive) -> Result<(), CommandLineError> {
        let refused = |what| CommandLineError::ImageInPlace {
            option: drive.option.clone().unwrap_or_default(),
            what,
        };
        match drive.place {
            Place::Own(index) => {
                let Some(argument) = self.arguments.get_mut(index) else { return Ok(()) };
                let mut tree = own_keys(argument).map(|keys| drive_tree(&keys)).unwrap_or_default();
                if let Some(tree) = tree.as_object_mut() {
                    remove_image_keys(tree);
                    tree.retain(|key, _| !matches!(key.as_str(), "file" | "filename" | "driver"));
                }
                write_drive(argument, &tree);
                Ok(())
            }
            Place::Node(_, device) => {
                let argument = self.arguments.get_mut(device);
                let argument = argument.filter(|argument| argument.name() == Some("device"));
                let argument = argument.ok_or_else(|| refused("it cannot be empty"))?;
                let node = remove_key(argument, "drive");
                self.drop_orphans(node.into_iter().collect());
                Ok(())
            }
            Place::Empty(_) => Ok(()),
        }
    }

    /// Puts a medium into a drive that the machine makes by itself, such as `ide1-cd0`.
    ///
    /// # Errors
    ///
    /// [`CommandLineError::ImageNotText`]; [`CommandLineError::ImageInPlace`] for an id that no
    /// machine makes.
    pub fn add_medium(&mut self, id: &str, medium: &Medium) -> Result<(), CommandLineError> {
        let path = medium.path.to_str().ok_or(CommandLineError::ImageNotText)?;
        let place = place_of(id).ok_or(CommandLineError::ImageInPlace {
            option: id.to_owned(),
            what: "no machine makes a drive of that name by itself",
        })?;
        let mut words =
            vec![place, keys::write("file", path), keys::write("format", &medium.format)];
        if medium.read_only == Some(true) {
            words.push("readonly=on".to_owned());
        }
        self.push("-drive", Some(&words.join(",")));
        Ok(())
    }

    fn put_into_drive(
        &mut self,
        index: usize,
        path: &str,
        medium: &Medium,
    ) -> Result<(), &'static str> {
        let Some(argument) = self.arguments.get_mut(index) else { return Ok(()) };
        let mut tree = own_keys(argument).map(|keys| drive_tree(&keys)).unwrap_or_default();
        let Some(top) = tree.as_object_mut() else { return Ok(()) };
        refuse_window(top)?;
        let file = match top.get("file") {
            Some(Value::Object(file)) if file.contains_key("file") => {
                return Err("its image lies below a filter");
            }
            Some(Value::Object(file)) => file.clone(),
            _ => Map::new(),
        };
        change_format(top, &medium.format);
        top.remove("filename");
        let mut file = if is_of_file(&file) { file } else { Map::new() };
        // QEMU finds the driver by the path.
        file.remove("driver");
        file.insert("filename".to_owned(), path.into());
        top.insert("file".to_owned(), Value::Object(file));
        if let Some(read_only) = medium.read_only {
            top.retain(|key, _| !matches!(key.as_str(), "readonly" | "read-only"));
            if read_only {
                top.insert("readonly".to_owned(), "on".into());
            }
        }
        write_drive(argument, &tree);
        Ok(())
    }

    fn put_into_node(
        &mut self,
        root: usize,
        path: &str,
        medium: &Medium,
    ) -> Result<(), &'static str> {
        let Some((format, protocol)) = Nodes::of(self).image_nodes(root) else {
            return Err("its nodes lead to no image");
        };
        let driver = if medium.is_device { "host_device" } else { "file" };
        let mut orphans = Vec::new();
        if format == protocol {
            // The device uses the file itself, as raw bytes.
            self.change_node(&format, |node, is_json| {
                let mut file = node.clone();
                file.retain(|key, _| !is_of_any_node(key));
                let mut file = if is_of_file(&file) { file } else { Map::new() };
                file.insert("driver".to_owned(), driver.into());
                file.insert("filename".to_owned(), path.into());
                node.retain(|key, _| is_of_any_node(key));
                node.insert("driver".to_owned(), raw_of(&medium.format).into());
                node.insert("file".to_owned(), Value::Object(file));
                set_read_only(node, medium.read_only, is_json);
                Ok(())
            })?;
            return Ok(());
        }
        self.change_node(&protocol, |node, _| {
            if !is_of_file(node) {
                node.retain(|key, _| key == "node-name");
            }
            node.insert("driver".to_owned(), driver.into());
            node.insert("filename".to_owned(), path.into());
            Ok(())
        })?;
        self.change_node(&format, |node, is_json| {
            refuse_window(node)?;
            orphans.extend(node.get("backing").and_then(Value::as_str).map(str::to_owned));
            orphans.extend(node.get("data-file").and_then(Value::as_str).map(str::to_owned));
            change_format(node, raw_of(&medium.format));
            set_read_only(node, medium.read_only, is_json);
            Ok(())
        })?;
        self.drop_orphans(orphans);
        Ok(())
    }

    fn put_into_device(&mut self, device: usize, path: &str, medium: &Medium) {
        let is_taken = |name: &String| {
            let words = self.arguments.iter().filter_map(|argument| argument.value.as_ref());
            words.into_iter().any(|words| words.contains(name.as_str()))
        };
        let mut names = (0..).map(|number| format!("medium{number}"));
        let name = names.find(|name| !is_taken(name)).expect("there are more names than nodes");
        let driver = if medium.is_device { "host_device" } else { "file" };
        let node = json!({
            "driver": raw_of(&medium.format),
            "node-name": name,
            "read-only": medium.read_only.unwrap_or(false),
            "file": { "driver": driver, "filename": path },
        });
        if let Some(argument) = self.arguments.get_mut(device) {
            add_key(argument, "drive", &name);
        }
        self.push("-blockdev", Some(&node.to_string()));
    }

    /// Changes one node where it stands, in the form in which it is written.
    fn change_node(
        &mut self,
        at: &NodeAt,
        change: impl FnOnce(&mut Map<String, Value>, bool) -> Result<(), &'static str>,
    ) -> Result<(), &'static str> {
        let Some(argument) = self.arguments.get_mut(at.argument) else { return Ok(()) };
        let value = argument.value.clone().unwrap_or_default();
        let is_json = is_json(&value);
        let mut tree = blockdev_tree(&value);
        let node = (0..at.depth).try_fold(&mut tree, |node, _| node.get_mut("file"));
        if let Some(node) = node.and_then(Value::as_object_mut) {
            change(node, is_json)?;
        }
        argument.value = Some(if is_json { tree.to_string() } else { words_of(&tree, "driver") });
        Ok(())
    }

    /// Drops nodes that nothing refers to any more, and those that only they referred to.
    fn drop_orphans(&mut self, mut names: Vec<String>) {
        while let Some(name) = names.pop() {
            let is_node = |argument: &Argument| {
                argument.name() == Some("blockdev")
                    && Keys::parse(argument.value.as_deref().unwrap_or_default(), "driver")
                        .get("node-name")
                        == Some(&name)
            };
            let refers = |argument: &&Argument| {
                let value = argument.value.as_deref().unwrap_or_default();
                Keys::parse(value, "").iter().any(|(_, value)| value == name)
            };
            let Some(index) = self.arguments.iter().position(is_node) else { continue };
            if self.arguments.iter().filter(refers).count() > 1 {
                continue;
            }
            let dropped = self.arguments.remove(index);
            let tree = blockdev_tree(dropped.value.as_deref().unwrap_or_default());
            references(&tree, &mut names);
        }
    }
}

fn is_json(value: &str) -> bool {
    value.trim_start().starts_with('{')
}

/// Collects the names of nodes that a node refers to.
fn references(tree: &Value, names: &mut Vec<String>) {
    let Some(node) = tree.as_object() else { return };
    for role in ["file", "backing", "data-file"] {
        match node.get(role) {
            Some(Value::String(name)) => names.push(name.clone()),
            Some(inner) => references(inner, names),
            None => {}
        }
    }
}

/// Tells whether the options of a node fit another file too.
fn is_of_file(node: &Map<String, Value>) -> bool {
    let driver = node.get("driver").and_then(Value::as_str);
    driver.is_none_or(|driver| FILE_DRIVERS.contains(&driver))
}

/// Tells whether a key belongs to any node, whatever its driver.
fn is_of_any_node(key: &str) -> bool {
    let keys = ["node-name", "read-only", "auto-read-only", "discard", "force-share"];
    keys.contains(&key) || matches!(key, "detect-zeroes" | "cache")
}

/// Removes what belongs to the image that was there.
fn remove_image_keys(node: &mut Map<String, Value>) {
    node.retain(|key, _| {
        !OLD_IMAGE_KEYS.contains(&key.as_str()) && !QCOW2_KEYS.contains(&key.as_str())
    });
}

fn change_format(node: &mut Map<String, Value>, format: &str) {
    let is_same = node.get("driver").and_then(Value::as_str) == Some(format);
    if is_same {
        node.retain(|key, _| !OLD_IMAGE_KEYS.contains(&key.as_str()));
    } else {
        remove_image_keys(node);
    }
    node.insert("driver".to_owned(), format.into());
}

fn set_read_only(node: &mut Map<String, Value>, read_only: Option<bool>, is_json: bool) {
    let Some(read_only) = read_only else { return };
    let word = if read_only { "on" } else { "off" };
    let value = if is_json { Value::from(read_only) } else { Value::from(word) };
    node.insert("read-only".to_owned(), value);
}

/// Refuses a raw image that is a part of its file.
fn refuse_window(node: &Map<String, Value>) -> Result<(), &'static str> {
    let has_window = RAW_WINDOW.iter().any(|key| node.contains_key(*key));
    if has_window { Err("the image is a part of its file") } else { Ok(()) }
}

/// Makes an argument a `-drive` of the keys in `tree`; a short option becomes one.
fn write_drive(argument: &mut Argument, tree: &Value) {
    if argument.name() != Some("drive") {
        "-drive".clone_into(&mut argument.written);
    }
    argument.value = Some(words_of(tree, ""));
}

/// Writes a tree as words; the key `first`, if there is one, comes before the others.
fn words_of(tree: &Value, first: &str) -> String {
    let keys = Keys::of(tree);
    let (head, rest): (Vec<_>, Vec<_>) = keys.iter().partition(|(key, _)| *key == first);
    let words = head.into_iter().chain(rest).map(|(key, value)| keys::write(key, value));
    words.collect::<Vec<_>>().join(",")
}

fn add_key(argument: &mut Argument, key: &str, value: &str) {
    let words = argument.value.get_or_insert_default();
    if !is_json(words) {
        *words = format!("{words},{}", keys::write(key, value));
    } else if let Ok(Value::Object(mut object)) = serde_json::from_str(words) {
        object.insert(key.to_owned(), value.into());
        *words = Value::Object(object).to_string();
    }
}

/// Removes a key from an option and returns its value.
fn remove_key(argument: &mut Argument, key: &str) -> Option<String> {
    let words = argument.value.as_mut()?;
    if is_json(words) {
        let mut object: Map<String, Value> = serde_json::from_str(words).ok()?;
        let removed = object.remove(key);
        *words = Value::Object(object).to_string();
        return removed?.as_str().map(str::to_owned);
    }
    let keys = Keys::parse(words, "driver");
    let removed = keys.get(key).map(str::to_owned);
    let kept = keys.iter().filter(|(name, _)| *name != key);
    *words = kept.map(|(key, value)| keys::write(key, value)).collect::<Vec<_>>().join(",");
    removed
}

/// Returns the place of a drive by the id that QEMU made for it, as keys of a `-drive`.
fn place_of(id: &str) -> Option<String> {
    let (interface, rest) = id.split_at(id.find(|c: char| c.is_ascii_digit())?);
    if matches!(interface, "floppy" | "sd") {
        let unit: usize = rest.parse().ok()?;
        return Some(format!("if={interface},index={unit}"));
    }
    let (bus, medium) = rest.split_once('-')?;
    let (bus, unit): (usize, usize) = (bus.parse().ok()?, medium.get(2..)?.parse().ok()?);
    let is_cdrom = matches!((interface, medium.get(..2)), ("ide" | "scsi", Some("cd")));
    is_cdrom.then(|| format!("if={interface},bus={bus},unit={unit},media=cdrom"))
}

#[cfg(test)]
mod tests;
