//! The devices of a command line: which ones it makes, and the line without some of them.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::keys::{Keys, append, write};
use super::{Argument, CommandLine, CommandLineError, parse_json};

/// Options that define something that a device can use, with the key that names it.
const BACKEND_OPTIONS: [(&str, &str); 8] = [
    ("drive", "id"),
    ("blockdev", "node-name"),
    ("netdev", "id"),
    ("chardev", "id"),
    ("object", "id"),
    ("fsdev", "id"),
    ("audiodev", "id"),
    ("tpmdev", "id"),
];

/// Keys by which a device or a back end refers to a back end.
const REFERENCES: [&str; 14] = [
    "drive",
    "netdev",
    "chardev",
    "memdev",
    "rng",
    "iothread",
    "fsdev",
    "audiodev",
    "tpmdev",
    "cryptodev",
    "file",
    "backing",
    "data-file",
    "key-secret",
];

/// A device that an option of the command line makes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LineDevice {
    /// Which `-device` it is, counted from 0; `None` if another option makes it.
    pub number: Option<usize>,
    /// Its id, if it has one.
    pub id: Option<String>,
    /// Its driver as written, which may be an alias of the type's name.
    pub driver: String,
    /// Whether QEMU makes it only when the guest's driver asks for it (`failover_pair_id`).
    pub is_conditional: bool,
    /// The keys that its option has.
    pub keys: Vec<String>,
}

/// A property that a device is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Which `-device` it is, counted from 0.
    pub device: usize,
    /// The property.
    pub key: String,
    /// Its value.
    pub value: String,
}

/// Returns the devices with an id or from `-device`, in the order in which QEMU makes them: those
/// in words, those of other options, those in JSON (7.2 to 11.1).
pub(super) fn devices(line: &CommandLine) -> Vec<LineDevice> {
    let mut in_words = Vec::new();
    let mut of_drives = Vec::new();
    let mut in_json = Vec::new();
    let mut number = 0;
    for argument in &line.arguments {
        let value = argument.value.as_deref().unwrap_or_default();
        match argument.name() {
            Some("device") => {
                let device = device(value, number);
                number += 1;
                if value.trim_start().starts_with('{') {
                    in_json.push(device);
                } else {
                    in_words.push(device);
                }
            }
            Some("virtfs") => in_words.push(stands_for("virtio-9p")),
            Some("drive") if Keys::parse(value, "").get("if") == Some("virtio") => {
                of_drives.push(stands_for("virtio-blk"));
            }
            _ => {}
        }
    }
    in_words.into_iter().chain(of_drives).chain(in_json).collect()
}

fn device(value: &str, number: usize) -> LineDevice {
    let keys = Keys::parse(value, "driver");
    LineDevice {
        number: Some(number),
        id: keys.get("id").map(str::to_owned),
        driver: keys.get("driver").unwrap_or_default().to_owned(),
        is_conditional: keys.get("failover_pair_id").is_some(),
        keys: keys.iter().map(|(key, _)| key.to_owned()).collect(),
    }
}

fn stands_for(driver: &str) -> LineDevice {
    LineDevice {
        number: None,
        id: None,
        driver: driver.to_owned(),
        is_conditional: false,
        keys: Vec::new(),
    }
}

/// Tells whether an option defines a drive, node, netdev, object or the like with this id.
pub(super) fn defines(line: &CommandLine, id: &str) -> bool {
    line.arguments.iter().any(|argument| defined_id(argument).as_deref() == Some(id))
}

/// Reads options, each followed by its value.
pub(super) fn pairs(words: &[String]) -> Result<Vec<Argument>, CommandLineError> {
    let mut arguments = Vec::new();
    let mut words = words.iter().cloned();
    while let Some(written) = words.next() {
        let argument = Argument { written, value: words.next() };
        let is_named = argument.name().is_some_and(|name| !name.is_empty());
        if !is_named || !argument.takes_value() {
            return Err(CommandLineError::NotAnOption { word: argument.written });
        }
        if argument.value.is_none() {
            return Err(CommandLineError::MissingValue { option: argument.written });
        }
        arguments.push(argument);
    }
    Ok(arguments)
}

/// Refuses numbers of `-device` options that are not there.
fn check_numbers(
    line: &CommandLine,
    mut numbers: impl Iterator<Item = usize>,
) -> Result<(), CommandLineError> {
    let count = line.values_of(&["device"]).count();
    match numbers.find(|number| *number >= count) {
        Some(number) => Err(CommandLineError::NoSuchDevice { number, count }),
        None => Ok(()),
    }
}

/// Adds properties to devices.
pub(super) fn pin(line: &mut CommandLine, pins: &[Pin]) -> Result<(), CommandLineError> {
    check_numbers(line, pins.iter().map(|pin| pin.device))?;
    let is_key = |key: &str| !key.is_empty() && !key.contains([',', '=']);
    if let Some(pin) = pins.iter().find(|pin| !is_key(&pin.key)) {
        return Err(CommandLineError::NotAKey { key: pin.key.clone() });
    }
    let devices = line.arguments.iter_mut().filter(|argument| argument.name() == Some("device"));
    for (number, argument) in devices.enumerate() {
        for pin in pins.iter().filter(|pin| pin.device == number) {
            let value = argument.value.clone().unwrap_or_default();
            argument.value = Some(match parse_json(&argument.written, &value)? {
                Some(mut device) => {
                    device[pin.key.as_str()] = value_in_json(&pin.key, &pin.value);
                    device.to_string()
                }
                None => append(&value, &write(&pin.key, &pin.value)),
            });
        }
    }
    Ok(())
}

/// Returns a property's value as QEMU takes it in JSON: a number is no text, and the port of a USB
/// device is no number.
pub(crate) fn value_in_json(key: &str, value: &str) -> Value {
    match value.parse::<u64>() {
        Ok(number) if key != "port" => json!(number),
        _ => json!(value),
    }
}

/// Leaves out the `-device` options of these numbers, and the back ends that nothing else uses.
pub(super) fn leave_out(line: &mut CommandLine, numbers: &[usize]) -> Result<(), CommandLineError> {
    check_numbers(line, numbers.iter().copied())?;
    let numbers: HashSet<usize> = numbers.iter().copied().collect();
    let mut freed = Vec::new();
    let mut number = 0;
    line.arguments.retain(|argument| {
        if argument.name() != Some("device") {
            return true;
        }
        let is_kept = !numbers.contains(&number);
        number += 1;
        if !is_kept {
            freed.extend(references(argument));
        }
        is_kept
    });
    while let Some(id) = freed.pop() {
        if is_used(line, &id) {
            continue;
        }
        line.arguments.retain(|argument| {
            let is_freed = defined_id(argument).is_some_and(|defined| defined == id);
            if is_freed {
                freed.extend(references(argument));
            }
            !is_freed
        });
    }
    Ok(())
}

/// Tells whether an option uses what has this id. Every key with this value counts: an option too
/// many does less harm than one too few.
fn is_used(line: &CommandLine, id: &str) -> bool {
    line.arguments.iter().any(|argument| {
        let name = argument.name().unwrap_or_default();
        let own = BACKEND_OPTIONS.iter().find(|(option, _)| *option == name).map(|(_, key)| *key);
        let value = argument.value.as_deref().unwrap_or_default();
        let keys = Keys::parse(value, "");
        keys.iter().any(|(key, value)| Some(key) != own && value == id)
    })
}

fn references(argument: &Argument) -> Vec<String> {
    let keys = Keys::parse(argument.value.as_deref().unwrap_or_default(), "driver");
    let is_reference = |key: &str| REFERENCES.contains(&key.rsplit('.').next().unwrap_or(key));
    let references = keys.iter().filter(|(key, _)| is_reference(key));
    references.map(|(_, value)| value.to_owned()).collect()
}

fn defined_id(argument: &Argument) -> Option<String> {
    let name = argument.name()?;
    let (_, key) = BACKEND_OPTIONS.iter().find(|(option, _)| *option == name)?;
    let keys = Keys::parse(argument.value.as_deref()?, "");
    keys.get(key).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> CommandLine {
        CommandLine::new(words.iter().copied()).unwrap()
    }

    #[test]
    fn devices_come_in_the_order_in_which_qemu_makes_them() {
        let words = [
            "-device",
            r#"{"driver":"usb-kbd","id":"k"}"#,
            "-drive",
            "file=a,if=virtio",
            "-device",
            "virtio-rng-pci",
            "-device",
            "driver=e1000,id=n,failover_pair_id=m",
        ];
        let devices = parse(&words).devices();
        let seen: Vec<_> = devices
            .iter()
            .map(|device| (device.number, device.driver.as_str(), device.id.as_deref()))
            .collect();
        let expected = [
            (Some(1), "virtio-rng-pci", None),
            (Some(2), "e1000", Some("n")),
            (None, "virtio-blk", None),
            (Some(0), "usb-kbd", Some("k")),
        ];
        assert_eq!(seen, expected);
        assert!(devices[1].is_conditional);
    }

    #[test]
    fn a_device_goes_with_the_back_ends_that_only_it_used() {
        let words = [
            "-blockdev",
            r#"{"driver":"file","node-name":"f0","filename":"/srv/a"}"#,
            "-blockdev",
            "driver=qcow2,node-name=d0,file=f0",
            "-object",
            "iothread,id=io0",
            "-device",
            "virtio-blk-pci,drive=d0,iothread=io0,id=vb",
            "-device",
            "virtio-blk-pci,drive=d1,iothread=io0",
            "-netdev",
            "user,id=n0",
            "-device",
            "virtio-net-pci,netdev=n0",
        ];
        let mut line = parse(&words);
        line.leave_out_devices(&[0, 2]).unwrap();
        let expected =
            ["-object", "iothread,id=io0", "-device", "virtio-blk-pci,drive=d1,iothread=io0"];
        assert_eq!(line.to_arguments(), expected);
    }

    #[test]
    fn a_device_is_given_its_address_in_words_and_in_json() {
        let mut line = parse(&["-device", "e1000,id=n", "-device", r#"{"driver":"pc-dimm"}"#]);
        let pin = |device, key: &str, value: &str| Pin {
            device,
            key: key.to_owned(),
            value: value.to_owned(),
        };
        line.pin_devices(&[pin(0, "addr", "05.0"), pin(1, "slot", "2")]).unwrap();
        let words = line.to_arguments();
        assert_eq!(words[1], "e1000,id=n,addr=05.0");
        assert_eq!(words[3], r#"{"driver":"pc-dimm","slot":2}"#);
    }

    /// A file whose changes were made by hand ended a restore by a panic, or was restored as another VM.
    #[test]
    fn changes_that_fit_no_command_line_are_refused_and_change_nothing() {
        let before = parse(&["-device", "e1000,id=n", "-S"]);
        for (words, expected) in [
            (&["x", "y"][..], r#""x" is added as an option with a value, and is none"#),
            (&["", ""], r#""" is added as an option with a value, and is none"#),
            (&["-", "-"], r#""-" is added as an option with a value, and is none"#),
            (&["-S", "-S"], r#""-S" is added as an option with a value, and is none"#),
            (
                &["-device", "e1000", "--S", "a"],
                r#""--S" is added as an option with a value, and is none"#,
            ),
            (&["-device"], "option -device has no value"),
        ] {
            let mut line = before.clone();
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            assert_eq!(line.add(&words).unwrap_err().to_string(), expected);
            assert!(line == before, "{words:?}");
        }
        let pin = |device, key: &str| Pin { device, key: key.to_owned(), value: "1".to_owned() };
        let is_missing = "-device number 1, counted from 0, is to be changed, and there are 1";
        let mut line = before.clone();
        let refused =
            [line.pin_devices(&[pin(0, "addr"), pin(1, "addr")]), line.leave_out_devices(&[0, 1])];
        for refused in refused {
            assert_eq!(refused.unwrap_err().to_string(), is_missing);
        }
        for key in ["", "a,b", "a=b"] {
            let error = line.pin_devices(&[pin(0, key)]).unwrap_err().to_string();
            let expected = "is added as a property of a device, and cannot be the name of one";
            assert_eq!(error, format!("{key:?} {expected}"));
        }
        assert!(line == before);
    }
}
