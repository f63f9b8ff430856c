//! The drives that a command line makes, and the images that it names for them.
//!
//! QEMU has a dozen ways to write the same: `-drive` with a path, with dotted keys or with JSON in
//! `file=`, `-hda` and its relatives, a bare image, and trees of `-blockdev` nodes in words or
//! JSON. All are read into one tree of nodes, and a chain of images is followed in it.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

use super::keys::{self, Keys};
use super::{Argument, CommandLine};
use crate::raw_window::RawWindow;
use crate::vm::{DeviceName, Drive, FILTERS, collect_files};

/// How long a chain of nodes is followed: a longer one is a loop.
const DEPTH_MAX: usize = 256;

/// Devices that may be without a medium, and then have no `drive=`.
const EMPTY_DEVICES: [&str; 3] = ["ide-cd", "scsi-cd", "floppy"];

/// A drive that a command line makes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LineDrive {
    /// The option that makes it, with its dashes; `None` for a bare image.
    pub option: Option<String>,
    /// QEMU's id of the drive, as written or as QEMU makes it (`ide0-hd0`); `None` for a node.
    pub id: Option<String>,
    /// The name of the block node on top, where it has one.
    pub node: Option<String>,
    /// The device that uses it; `None` if the machine makes that device by itself, or if there is
    /// none.
    pub device: Option<DeviceName>,
    /// Its interface, as in `if=`: `ide`, `virtio`, `pflash`, `none`; `none` for a node.
    pub interface: String,
    /// Whether the line makes it a CD-ROM drive.
    pub is_cdrom: bool,
    /// Whether the line makes it read-only.
    pub read_only: bool,
    /// The image on top and those below it that the line names, top first; empty for an empty
    /// drive. Images that only another image names are not included.
    pub images: Vec<LineImage>,
    /// Where it stands.
    pub(super) place: Place,
}

/// An image that a command line names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LineImage {
    /// Its path or URL as written; `None` for one that has none, such as `driver=nbd,host=...`.
    pub path: Option<String>,
    /// Its format, where the line says one.
    pub format: Option<String>,
    /// Where it lies within its file, if it is only a part of it.
    pub window: Option<RawWindow>,
    /// The files that it is made of, if it has no path, such as those of a quorum.
    pub files: Vec<String>,
}

/// Where a drive stands on a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In an option of its own, at this index: `-drive`, `-hda`, a bare image.
    Own(usize),
    /// In the node at the first index, which the option at the second one refers to.
    Node(usize, usize),
    /// In the `-device` at this index, which has no medium.
    Empty(usize),
}

impl LineDrive {
    /// Tells whether the line makes `drive` here, by the drive's id or by its device.
    #[must_use]
    pub fn makes(&self, drive: &Drive) -> bool {
        self.is_named(&drive.id, drive.qdev.as_deref())
    }

    /// As [`LineDrive::makes`], with the id and the device as QEMU reports them.
    #[must_use]
    pub fn is_named(&self, id: &str, qdev: Option<&str>) -> bool {
        if id.is_empty() {
            let device = qdev.and_then(DeviceName::of_qdev);
            device.is_some() && device == self.device
        } else {
            self.id.as_deref() == Some(id)
        }
    }
}

/// Returns the drives of a command line, in the order of their options.
pub(super) fn drives(line: &CommandLine) -> Vec<LineDrive> {
    let nodes = Nodes::of(line);
    let devices = devices(line);
    let mut units = Units::of(line);
    let mut drives = Vec::new();
    for (index, argument) in line.arguments.iter().enumerate() {
        let Some(keys) = own_keys(argument) else { continue };
        let (interface, id) = units.place(&keys);
        let used_by = devices.iter().find(|device| device.drive.as_deref() == Some(&id));
        let read_only = ["readonly", "read-only"].iter().any(|key| keys.is_on(key));
        drives.push(LineDrive {
            option: argument.name().map(|_| argument.written.clone()),
            node: keys.get("node-name").map(str::to_owned),
            device: used_by.map(|device| device.name.clone()),
            is_cdrom: keys.get("media") == Some("cdrom")
                || used_by.is_some_and(|device| device.model.ends_with("-cd")),
            read_only,
            images: nodes.chain(&drive_tree(&keys)),
            id: Some(id),
            interface,
            place: Place::Own(index),
        });
    }
    let ids: Vec<&str> = drives.iter().filter_map(|drive| drive.id.as_deref()).collect();
    let mut of_nodes = Vec::new();
    for device in &devices {
        let node = device.drive.as_deref();
        if node.is_some_and(|node| ids.contains(&node)) {
            continue;
        }
        let found = node.and_then(|node| nodes.get(node));
        let place = match (node, found) {
            (_, Some((at, _))) => Place::Node(at, device.index),
            (None, None) if EMPTY_DEVICES.contains(&device.model.as_str()) => {
                Place::Empty(device.index)
            }
            _ => continue,
        };
        let tree = found.map(|(_, tree)| tree);
        let is_set = |key: &str| tree.and_then(|tree| tree.get(key)).is_some_and(is_true);
        let option = line.arguments.get(found.map_or(device.index, |(at, _)| at));
        of_nodes.push(LineDrive {
            option: option.map(|argument| argument.written.clone()),
            id: None,
            node: node.map(str::to_owned),
            device: Some(device.name.clone()),
            interface: "none".to_owned(),
            is_cdrom: device.model.ends_with("-cd"),
            read_only: is_set("read-only"),
            images: tree.map_or_else(Vec::new, |tree| nodes.chain(tree)),
            place,
        });
    }
    drives.extend(of_nodes);
    drives
}

/// Returns the keys of an option that makes a drive by itself, as if it were a `-drive`.
///
/// QEMU (7.2 to 11.1) reads the short ones in the same way: `-hda X` is `-drive
/// index=0,media=disk,file=X`, whose format it guesses.
pub(super) fn own_keys(argument: &Argument) -> Option<Keys> {
    let Some(name) = argument.name() else {
        return Some(short_keys("index=0,media=disk", &argument.written));
    };
    let value = argument.value.as_deref().unwrap_or_default();
    let head = match name {
        "drive" => return Some(Keys::parse(value, "file")),
        "hda" => "index=0,media=disk",
        "hdb" => "index=1,media=disk",
        "hdc" => "index=2,media=disk",
        "hdd" => "index=3,media=disk",
        "cdrom" => "index=2,media=cdrom",
        "fda" => "if=floppy,index=0",
        "fdb" => "if=floppy,index=1",
        "sd" => "if=sd",
        "mtdblock" => "if=mtd",
        "pflash" => "if=pflash",
        _ => return None,
    };
    Some(short_keys(head, value))
}

fn short_keys(head: &str, path: &str) -> Keys {
    Keys::parse(&format!("{head},{}", keys::write("file", path)), "")
}

/// Reads the keys of a `-drive` as a tree of nodes.
pub(super) fn drive_tree(keys: &Keys) -> Value {
    let mut tree = Map::new();
    let name = keys.get("file").filter(|name| !name.is_empty());
    if let Some(json) = name.and_then(|name| name.strip_prefix("json:")) {
        if let Ok(Value::Object(named)) = serde_json::from_str(json) {
            tree = named;
        }
    } else if let Some(name) = name {
        let path = name.strip_prefix("file:").unwrap_or(name);
        put(&mut tree, "file.filename", path);
    }
    for (key, value) in keys.iter().filter(|(key, _)| *key != "file") {
        // `format` is the old name of `driver`.
        put(&mut tree, if key == "format" { "driver" } else { key }, value);
    }
    Value::Object(tree)
}

/// Reads the value of a `-blockdev` as a tree of nodes.
pub(super) fn blockdev_tree(value: &str) -> Value {
    if value.trim_start().starts_with('{') {
        return serde_json::from_str(value).unwrap_or(Value::Null);
    }
    let mut tree = Map::new();
    for (key, value) in Keys::parse(value, "driver").iter() {
        put(&mut tree, key, value);
    }
    Value::Object(tree)
}

/// Puts a value at a key with dots. One with more of them than any node is deep stays one key: a tree of it
/// would be too deep for the stack.
fn put(tree: &mut Map<String, Value>, key: &str, value: &str) {
    let parts = key.split_once('.').filter(|_| key.matches('.').nth(DEPTH_MAX).is_none());
    let Some((first, rest)) = parts else {
        tree.insert(key.to_owned(), Value::from(value));
        return;
    };
    let inner = tree.entry(first).or_insert_with(|| Value::Object(Map::new()));
    if !inner.is_object() {
        *inner = Value::Object(Map::new());
    }
    if let Some(inner) = inner.as_object_mut() {
        put(inner, rest, value);
    }
}

fn is_true(value: &Value) -> bool {
    value.as_bool() == Some(true) || value.as_str().is_some_and(keys::is_on)
}

/// Where a node stands: in which argument, and how many `file` levels below the argument's own
/// node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeAt {
    pub(super) argument: usize,
    pub(super) depth: usize,
}

/// The `-blockdev` nodes of a command line.
pub(super) struct Nodes(Vec<(usize, Value)>);

impl Nodes {
    pub(super) fn of(line: &CommandLine) -> Nodes {
        let arguments = line.arguments.iter().enumerate();
        let blockdevs = arguments.filter(|(_, argument)| argument.name() == Some("blockdev"));
        let tree = |argument: &Argument| blockdev_tree(argument.value.as_deref().unwrap_or("{}"));
        Nodes(blockdevs.map(|(index, argument)| (index, tree(argument))).collect())
    }

    /// Returns the node of this name that has an option of its own, and the option's index.
    pub(super) fn get(&self, name: &str) -> Option<(usize, &Value)> {
        let is_meant = |tree: &Value| tree.get("node-name").and_then(Value::as_str) == Some(name);
        self.0.iter().find(|(_, tree)| is_meant(tree)).map(|(index, tree)| (*index, tree))
    }

    /// Returns a child of a node, which is written as a node or as the name of one.
    pub(super) fn child<'a>(&'a self, node: &'a Value, role: &str) -> Option<&'a Value> {
        match node.get(role)? {
            Value::String(name) => self.get(name).map(|(_, tree)| tree),
            tree @ Value::Object(_) => Some(tree),
            _ => None,
        }
    }

    /// Follows the node of the argument `root` down to its image, and returns where the node of the
    /// format and that of the file stand. They are the same if there is no node of a format.
    pub(super) fn image_nodes(&self, root: usize) -> Option<(NodeAt, NodeAt)> {
        let tree_at = |index: usize| self.0.iter().find(|(at, _)| *at == index);
        let mut node = &tree_at(root)?.1;
        let mut at = NodeAt { argument: root, depth: 0 };
        let mut format = at;
        for _ in 0..DEPTH_MAX {
            match node.get("file") {
                Some(below @ Value::Object(_)) => {
                    (format, node) = (at, below);
                    at.depth += 1;
                }
                Some(Value::String(name)) => {
                    let (argument, below) = self.get(name)?;
                    (format, node) = (at, below);
                    at = NodeAt { argument, depth: 0 };
                }
                _ => return Some((format, at)),
            }
        }
        None
    }

    /// Returns the images from `tree` down, as far as the line names them.
    fn chain(&self, tree: &Value) -> Vec<LineImage> {
        let mut images = Vec::new();
        let mut next = Some(tree);
        while let Some((image, format_node)) = next.and_then(|tree| self.image(tree)) {
            images.push(image);
            next = self.child(format_node, "backing").filter(|_| images.len() < DEPTH_MAX);
        }
        images
    }

    /// Returns the first node from `tree` down that is no filter: its driver is the image's format.
    fn below_filters<'a>(&'a self, tree: &'a Value) -> &'a Value {
        let is_filter = |node: &Value| {
            let driver = node.get("driver").and_then(Value::as_str);
            driver.is_some_and(|driver| FILTERS.contains(&driver))
        };
        let below = |node: &&'a Value| is_filter(node).then(|| self.child(node, "file")).flatten();
        std::iter::successors(Some(tree), below).take(DEPTH_MAX).last().unwrap_or(tree)
    }

    /// Returns the image of a node and the node of its format; `None` for an empty drive.
    fn image<'a>(&'a self, tree: &'a Value) -> Option<(LineImage, &'a Value)> {
        let text =
            |node: &Value, key: &str| node.get(key).and_then(Value::as_str).map(str::to_owned);
        let format_node = self.below_filters(tree);
        let mut node = format_node;
        let mut window = None;
        for _ in 0..DEPTH_MAX {
            window = window.or_else(|| RawWindow::of_node(node));
            let path = text(node, "filename").or_else(|| text(node, "path"));
            if path.is_some() {
                let window = window.filter(|window| !window.is_whole());
                let format = text(format_node, "driver");
                let image = LineImage { path, format, window, files: Vec::new() };
                return Some((image, format_node));
            }
            match self.child(node, "file") {
                Some(below) => node = below,
                // A driver without a path: it uses a network, or makes its own contents.
                None => break,
            }
        }
        let format = text(format_node, "driver")?;
        let mut files = Vec::new();
        let find = |name: &str| self.get(name).map(|(_, tree)| tree);
        collect_files(format_node, &find, &mut files);
        Some((LineImage { path: None, format: Some(format), window: None, files }, format_node))
    }
}

/// A device of a command line that has, or may have, a drive.
struct Device {
    index: usize,
    name: DeviceName,
    model: String,
    drive: Option<String>,
}

/// Returns the devices of a command line with the names that QEMU gives them.
///
/// QEMU makes the devices in words first, in order, then those of `-drive if=virtio`, then those in
/// JSON (7.2 to 11.1); those without an id are numbered in that order. The machine's flash chips
/// are not numbered.
fn devices(line: &CommandLine) -> Vec<Device> {
    let options: Vec<(usize, &str)> = line
        .arguments
        .iter()
        .enumerate()
        .filter(|(_, argument)| argument.name() == Some("device"))
        .filter_map(|(index, argument)| Some((index, argument.value.as_deref()?)))
        .collect();
    let is_json = |value: &str| value.trim_start().starts_with('{');
    let virtio = line.arguments.iter().filter_map(own_keys);
    let virtio = virtio.filter(|keys| keys.get("if") == Some("virtio")).count();
    let mut number = 0;
    let mut devices = Vec::new();
    for json in [false, true] {
        for &(index, value) in options.iter().filter(|(_, value)| is_json(value) == json) {
            let keys = Keys::parse(value, "driver");
            let text = |key: &str| keys.get(key).map(str::to_owned);
            let name = match text("id") {
                Some(id) => DeviceName::Id(id),
                None => {
                    number += 1;
                    DeviceName::Number(number - 1)
                }
            };
            let model = text("driver").unwrap_or_default();
            devices.push(Device { index, name, model, drive: text("drive") });
        }
        number += virtio;
    }
    devices.extend(flash_chips(line));
    devices
}

/// Returns the flash chips that `-machine pflash0=NODE` gives the machine.
fn flash_chips(line: &CommandLine) -> Vec<Device> {
    let mut chips = Vec::new();
    for (index, argument) in line.arguments.iter().enumerate() {
        if !matches!(argument.name(), Some("machine" | "M")) {
            continue;
        }
        let keys = Keys::parse(argument.value.as_deref().unwrap_or_default(), "type");
        for chip in 0..2 {
            if let Some(node) = keys.get(&format!("pflash{chip}")) {
                let (name, drive) = (DeviceName::Flash(chip), Some(node.to_owned()));
                chips.push(Device { index, name, model: "pflash".to_owned(), drive });
            }
        }
    }
    chips
}

/// Gives drives their ids as QEMU does (`blockdev.c`, 7.2 to 11.1): the interface, then the bus,
/// the kind of medium, and the place on the bus, each where there is one.
struct Units {
    default_interface: &'static str,
    ide_units: usize,
    taken: HashSet<(String, usize, usize)>,
    /// Where the search for a free place went on to, by interface and bus: those before are taken.
    next: HashMap<(String, usize), (usize, usize)>,
}

impl Units {
    fn of(line: &CommandLine) -> Units {
        let machine = line
            .values_of(&["machine", "M"])
            .filter_map(|value| Keys::parse(value, "type").get("type").map(str::to_owned))
            .last()
            .unwrap_or_default();
        let default_interface = match machine.as_str() {
            name if name.starts_with("virt") || name.starts_with("s390-ccw") => "virtio",
            name if name.starts_with("pseries") => "scsi",
            _ => "ide",
        };
        let ide_units = if machine.contains("q35") { 1 } else { 2 };
        Units { default_interface, ide_units, taken: HashSet::new(), next: HashMap::new() }
    }

    /// Returns a drive's interface and its id.
    fn place(&mut self, keys: &Keys) -> (String, String) {
        let number = |key: &str| keys.get(key).and_then(|text| text.parse::<usize>().ok());
        let interface = keys.get("if").unwrap_or(self.default_interface).to_owned();
        let units = match interface.as_str() {
            "ide" => self.ide_units,
            "scsi" => 7,
            _ => 0,
        };
        let (mut bus, unit) = match number("index") {
            Some(index) if units > 0 => (index / units, Some(index % units)),
            Some(index) => (0, Some(index)),
            None => (number("bus").unwrap_or(0), number("unit")),
        };
        let unit = unit.unwrap_or_else(|| {
            let first = (interface.clone(), bus);
            let mut unit;
            (bus, unit) = self.next.get(&first).copied().unwrap_or((bus, 0));
            while self.taken.contains(&(interface.clone(), bus, unit)) {
                unit += 1;
                if units > 0 && unit >= units {
                    (unit, bus) = (0, bus + 1);
                }
            }
            self.next.insert(first, (bus, unit));
            unit
        });
        self.taken.insert((interface.clone(), bus, unit));
        let medium = match (interface.as_str(), keys.get("media")) {
            ("ide" | "scsi", Some("cdrom")) => "-cd",
            ("ide" | "scsi", _) => "-hd",
            _ => "",
        };
        let made = if units > 0 {
            format!("{interface}{bus}{medium}{unit}")
        } else {
            format!("{interface}{medium}{unit}")
        };
        let id = keys.get("id").map_or(made, str::to_owned);
        (interface, id)
    }
}

#[cfg(test)]
mod tests;
