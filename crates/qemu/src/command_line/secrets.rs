//! Secrets of the host on a command line: what QEMU proves itself with to a disk, a server or a client.
//!
//! What the guest can read (`-append`, `-fw_cfg`, `-smbios`) is none of them: its memory holds it anyway.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;

use super::keys::{Keys, is_switch, map_values, write};
use super::{Argument, CommandLine};

/// What takes the place of a secret.
pub(crate) const REDACTED: &str = "<redacted>";

/// The options that name images. An image without an option is an image, too.
const IMAGES: [&str; 13] = [
    "blockdev", "cdrom", "drive", "fda", "fdb", "hda", "hdb", "hdc", "hdd", "mtdblock", "pflash",
    "sd", "snapshot",
];

/// The secrets that were found in a command line.
#[derive(Default)]
struct Found {
    /// Where: one option and key each, without values.
    places: Vec<String>,
    secrets: Vec<String>,
}

/// Replaces the secrets, and says where they were.
pub(super) fn redact(line: &mut CommandLine) -> Vec<String> {
    let mut found = Found::default();
    for argument in &mut line.arguments {
        *argument = found.in_argument(argument);
    }
    found.places
}

/// Returns the secrets.
pub(super) fn secrets(line: &CommandLine) -> Vec<String> {
    let mut found = Found::default();
    for argument in &line.arguments {
        found.in_argument(argument);
    }
    found.secrets
}

/// Replaces the password in the name of an image: in a URL, the name of an RBD image, and JSON. Returns
/// `None` if there is none.
#[must_use]
pub fn redact_image(name: &str) -> Option<String> {
    let argument = Argument { written: name.to_owned(), value: None };
    Found::default().in_image(&argument, "file", name)
}

/// Says where secrets were replaced.
pub(super) fn redacted(line: &CommandLine) -> Vec<String> {
    let mut places = Vec::new();
    for argument in &line.arguments {
        let mut look = |key: &str, value: &str| {
            if value.contains(REDACTED) {
                places.push(place(argument, key));
            }
            None
        };
        match &argument.value {
            Some(value) => drop(map_values(value, implied(argument), &mut look)),
            None => drop(look("file", &argument.written)),
        }
    }
    places
}

/// Has the secret object `id` read its value from a file; returns whether there is such an object.
pub(super) fn give(line: &mut CommandLine, id: &str, file: &Path) -> bool {
    let file = file.to_string_lossy();
    let mut is_there = false;
    for argument in &mut line.arguments {
        if !is_secret_object(argument) {
            continue;
        }
        let Some(value) = &mut argument.value else { continue };
        let keys = Keys::parse(value, "qom-type");
        if keys.get("id") != Some(id) {
            continue;
        }
        is_there = true;
        let is_place = |key: &str| matches!(key, "data" | "file");
        if let Ok(Value::Object(mut object)) = serde_json::from_str(value) {
            object.retain(|key, _| !is_place(key));
            object.insert("file".to_owned(), file.clone().into());
            *value = Value::Object(object).to_string();
        } else {
            let kept = keys.iter().filter(|(key, _)| !is_place(key));
            let mut words: Vec<String> = kept.map(|(key, value)| write(key, value)).collect();
            words.push(write("file", &file));
            *value = words.join(",");
        }
    }
    is_there
}

impl Found {
    fn in_argument(&mut self, argument: &Argument) -> Argument {
        let Argument { written, value } = argument;
        let Some(value) = value else {
            let image = argument.name().is_none().then(|| self.in_image(argument, "file", written));
            return Argument { written: image.flatten().unwrap_or(written.clone()), value: None };
        };
        let keys = Keys::parse(value, implied(argument));
        // A value that is encrypted by another secret is none.
        let is_secret = is_secret_object(argument) && keys.get("keyid").is_none();
        let is_image = argument.name().is_some_and(|name| IMAGES.contains(&name));
        let has_password = is_image || matches!(argument.name(), Some("spice" | "iscsi"));
        let redacted = map_values(value, implied(argument), &mut |key, value| {
            let is_secret_key = match key.rsplit('.').next().unwrap_or(key) {
                "data" => is_secret,
                "password" => has_password && !is_switch(value),
                "cookie" => is_image,
                _ => false,
            };
            if is_secret_key && !value.is_empty() && value != REDACTED {
                return Some(self.replaced(argument, key, (value, 0..value.len())));
            }
            if is_image { self.in_image(argument, key, value) } else { None }
        });
        Argument { written: written.clone(), value: Some(redacted) }
    }

    /// Replaces the secrets in the name of an image: in a URL (`https://user:SECRET@host/`), in the name
    /// of an RBD image (`rbd:pool/image:key=SECRET`), and in JSON.
    fn in_image(&mut self, argument: &Argument, key: &str, name: &str) -> Option<String> {
        if let Some(json) = name.strip_prefix("json:") {
            let mut change = |key: &str, value: &str| match key.rsplit('.').next() {
                Some("password" | "cookie") if !value.is_empty() && value != REDACTED => {
                    Some(self.replaced(argument, key, (value, 0..value.len())))
                }
                _ => self.in_image(argument, key, value),
            };
            let redacted = map_values(json, "", &mut change);
            return (redacted != json).then(|| format!("json:{redacted}"));
        }
        let secret = in_rbd(name).or_else(|| in_url(name))?;
        (&name[secret.clone()] != REDACTED).then(|| self.replaced(argument, key, (name, secret)))
    }

    /// Notes the secret in a value, and returns the value without it.
    fn replaced(
        &mut self,
        argument: &Argument,
        key: &str,
        (value, secret): (&str, Range<usize>),
    ) -> String {
        self.places.push(place(argument, key));
        self.secrets.push(value[secret.clone()].to_owned());
        format!("{}{REDACTED}{}", &value[..secret.start], &value[secret.end..])
    }
}

/// Returns where the password of a URL is; for iSCSI, it follows a `%`.
fn in_url(url: &str) -> Option<Range<usize>> {
    let scheme = url.find("://")?;
    let host = scheme + "://".len();
    let authority = url[host..].split(['/', '?', '#']).next()?;
    let end = authority.rfind('@')?;
    let is_iscsi = url[..scheme].ends_with("iscsi") || url[..scheme].ends_with("iser");
    let start = authority[..end].find(if is_iscsi { '%' } else { ':' })? + 1;
    (start < end).then_some(host + start..host + end)
}

/// Returns where the key is in the name of an RBD image: it ends with a colon that has no backslash before
/// it.
fn in_rbd(name: &str) -> Option<Range<usize>> {
    let start = name.strip_prefix("rbd:").and(name.find(":key="))? + ":key=".len();
    let key = &name[start..];
    let is_end = |(at, _): &(usize, &str)| !key[..*at].ends_with('\\');
    let end = key.match_indices(':').find(is_end).map_or(key.len(), |(at, _)| at);
    (end > 0).then_some(start..start + end)
}

/// Tells whether an argument makes an object that holds a secret.
fn is_secret_object(argument: &Argument) -> bool {
    let value = argument.value.as_deref().unwrap_or_default();
    let keys = || Keys::parse(value, "qom-type");
    argument.name() == Some("object") && keys().get("qom-type") == Some("secret")
}

/// Returns the key of a first value that stands alone.
fn implied(argument: &Argument) -> &'static str {
    match argument.name() {
        Some("object") => "qom-type",
        _ => "file",
    }
}

/// Names a key of an option.
fn place(argument: &Argument, key: &str) -> String {
    let Some(name) = argument.name() else { return "an image".to_owned() };
    let keys = Keys::parse(argument.value.as_deref().unwrap_or_default(), implied(argument));
    let id = keys.get("id").or(keys.get("node-name"));
    format!("-{name}{}: {key}", id.map_or(String::new(), |id| format!(" {id}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(words: &[&str]) -> CommandLine {
        CommandLine::new(words.iter().copied()).unwrap()
    }

    #[test]
    fn secrets_of_the_host_are_replaced_and_named_by_their_place() {
        let rows = [
            ("-object", "secret,id=s0,data=hun,,ter2,format=raw", "-object s0: data"),
            ("-object", r#"{"qom-type":"secret","id":"s1","data":"hun,ter2"}"#, "-object s1: data"),
            ("--spice", "port=5900,password=hun,,ter2", "-spice: password"),
            ("-iscsi", "user=me,password=hun,,ter2", "-iscsi: password"),
            ("-drive", "file=https://me:hun,,ter2@host/a?b=c@d,id=d0", "-drive d0: file"),
            ("-cdrom", "iscsi://me%hun,,ter2@host/iqn/0", "-cdrom: file"),
            (
                "-blockdev",
                r#"{"driver":"https","node-name":"n0","cookie":"hun,ter2","url":"https://h/"}"#,
                "-blockdev n0: cookie",
            ),
            ("-drive", r"file=rbd:pool/i:id=x:key=hun,,ter2:mon_host=a\:1", "-drive: file"),
            (
                "-drive",
                r#"file=json:{"driver":"ftp",,"url":"ftp://u:hun,,ter2@h/"}"#,
                "-drive: url",
            ),
        ];
        for (option, value, expected) in rows {
            let mut line = line(&[option, value, "-S"]);
            assert_eq!(line.secrets(), ["hun,ter2"], "{value}");
            assert!(line.redacted().is_empty(), "{value}");
            assert_eq!(line.redact(), [expected], "{value}");
            let text = line.to_shell();
            assert!(!text.contains("ter2") && text.contains(REDACTED), "{text}");
            assert_eq!(line.redacted().len(), 1, "{text}");
            // Nothing is left to replace, and nothing else has changed.
            assert!(line.redact().is_empty() && line.secrets().is_empty(), "{text}");
            let back = text.replace(REDACTED, "hun,,ter2");
            let same = |text: &str| text.replace(",,", ",").replace('\'', "");
            let before = CommandLine::new([option, value, "-S"]).unwrap().to_shell();
            let is_json = value.starts_with('{');
            assert!(is_json || same(&back) == same(&before), "{back} {before}");
        }
        let mut image = line(&["http://me:hunter2@host/a.img"]);
        assert_eq!(image.redact(), ["an image"]);
        assert_eq!(image.to_arguments(), ["http://me:<redacted>@host/a.img"]);
    }

    #[test]
    fn what_is_no_secret_of_the_host_stays_as_it_was_written() {
        let words = [
            "-object",
            "secret,id=s0,file=/etc/key,format=base64",
            "-object",
            "secret,id=s1,data=Y2lwaGVy,keyid=s0,iv=aXY=",
            "-spice",
            "port=1,password-secret=s0,disable-ticketing",
            "-vnc",
            ":1,password=on",
            "-drive",
            "file=https://me@host/a,b=,,id=,x",
            "-drive",
            "if=none,nowait,,file=/a:b@c",
            "-append",
            "password=guest",
            "-fw_cfg",
            "name=opt/a,string=http://u:p@h/",
            "-object",
            "memory-backend-ram,id=m0,size=64M",
        ];
        let mut line = line(&words);
        assert!(line.redact().is_empty());
        assert_eq!(line.to_arguments(), words);
    }

    #[test]
    fn a_secret_is_given_by_a_file() {
        let mut line = line(&[
            "-object",
            "secret,id=s0,data=<redacted>,format=base64",
            "-object",
            r#"{"data":"<redacted>","id":"s1","qom-type":"secret"}"#,
        ]);
        assert_eq!(line.redacted(), ["-object s0: data", "-object s1: data"]);
        assert!(line.give_secret("s0", Path::new("/a,b")));
        assert!(line.give_secret("s1", Path::new("/a,b")));
        assert!(!line.give_secret("s2", Path::new("/a,b")));
        assert!(line.redacted().is_empty());
        assert_eq!(
            line.to_arguments(),
            [
                "-object",
                "qom-type=secret,id=s0,format=base64,file=/a,,b",
                "-object",
                r#"{"file":"/a,b","id":"s1","qom-type":"secret"}"#,
            ]
        );
    }
}
