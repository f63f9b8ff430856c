//! Secrets of the host on a command line: what QEMU proves itself with to a disk, a server or a client.
//!
//! What the guest can read (`-append`, `-fw_cfg`, `-smbios`) is none of them: its memory holds it anyway.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use serde_json::Value;

use super::keys::{Keys, is_switch, is_tree, map_values, write};
use super::{Argument, CommandLine};

/// What takes the place of a secret.
pub(crate) const REDACTED: &str = "<redacted>";

/// The options whose keys describe images.
const IMAGES: [&str; 2] = ["blockdev", "drive"];

/// The options whose whole value is the name of an image.
const NAMES: [&str; 10] =
    ["cdrom", "fda", "fdb", "hda", "hdb", "hdc", "hdd", "mtdblock", "pflash", "sd"];

/// The secrets that were found in a command line.
#[derive(Default)]
struct Found {
    /// Where: one option and key each, without values.
    places: Vec<String>,
    secrets: Vec<String>,
    /// Where secrets were replaced already.
    replaced: Vec<String>,
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
    in_all(line).secrets
}

/// Says where secrets were replaced.
pub(super) fn redacted(line: &CommandLine) -> Vec<String> {
    in_all(line).replaced
}

fn in_all(line: &CommandLine) -> Found {
    let mut found = Found::default();
    for argument in &line.arguments {
        found.in_argument(argument);
    }
    found
}

/// Replaces the passwords in the names of images, wherever they are in a text: in URLs
/// (`https://user:SECRET@host/`) and names of RBD images (`rbd:pool/image:key=SECRET`).
#[must_use]
pub fn redact_image(text: &str) -> Cow<'_, str> {
    Found::default().in_text("", text).map_or(Cow::Borrowed(text), Cow::Owned)
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
        let is = |names: &[&str]| argument.name().is_some_and(|name| names.contains(&name));
        let Some(value) = value else {
            let is_image = argument.name().is_none();
            let image = is_image.then(|| self.in_text("an image", written)).flatten();
            return Argument { written: image.unwrap_or(written.clone()), value: None };
        };
        if is(&["set"]) {
            let redacted = self.in_set(value);
            return Argument { written: written.clone(), value: redacted.or(Some(value.clone())) };
        }
        if is(&NAMES) {
            let image = self.in_text(&format!("{}: file", option_of(argument, None)), value);
            return Argument { written: written.clone(), value: image.or(Some(value.clone())) };
        }
        let keys = Keys::parse(value, implied(argument));
        // A value that is encrypted by another secret is none.
        let is_secret = is_secret_object(argument) && keys.get("keyid").is_none();
        let is_image = is(&IMAGES);
        let before = self.replaced.len();
        let option = option_of(argument, Some(&keys));
        let redacted = map_values(value, implied(argument), &mut |key, value| {
            let group = argument.name().unwrap_or_default();
            let is_secret =
                if last_of(key) == "data" { is_secret } else { is_secret_of(group, key, value) };
            let place = format!("{option}: {key}");
            match value {
                "" => None,
                _ if is_secret => self.whole(&place, value),
                _ if is_image => self.in_text(&place, value),
                _ => None,
            }
        });
        // A text that was no JSON may be some without the secret, and have its place in a key.
        let count = if is_image { value.matches(REDACTED).count() } else { 0 };
        let missed = count.saturating_sub(self.replaced.len() - before);
        self.replaced.extend((0..missed).map(|_| format!("{option}: file")));
        Argument { written: written.clone(), value: Some(redacted) }
    }

    /// Replaces the secret of a `-set GROUP.ID.KEY=VALUE`. The value is one, with every comma that it has.
    fn in_set(&mut self, text: &str) -> Option<String> {
        let (target, value) = text.split_once('=')?;
        let mut parts = target.splitn(3, '.');
        let (group, _, key) = (parts.next()?, parts.next()?, parts.next()?);
        // Which object it is stands in another option, and may stand behind this one.
        let is_data = group == "object" && key == "data";
        let place = format!("-set: {target}");
        let redacted = match value {
            "" => None,
            _ if is_data || is_secret_of(group, key, value) => self.whole(&place, value),
            _ if IMAGES.contains(&group) => self.in_text(&place, value),
            _ => None,
        };
        Some(format!("{target}={}", redacted?))
    }

    /// Replaces the secrets in a text that names images, or is one of QEMU's descriptions in JSON.
    fn in_text(&mut self, place: &str, text: &str) -> Option<String> {
        if let Some(json) = text.strip_prefix("json:").filter(|json| is_tree(json)) {
            let redacted = map_values(json, "", &mut |key, value| match last_of(key) {
                "password" | "cookie" if !value.is_empty() => self.whole(place, value),
                _ => self.in_text(place, value),
            });
            return (redacted != json).then(|| format!("json:{redacted}"));
        }
        let (mut redacted, mut done) = (String::new(), 0);
        let (mut in_urls, mut in_rbds) = (Next::new(in_url), Next::new(in_rbd));
        let mut from = 0;
        loop {
            let found = [in_urls.from(text, from), in_rbds.from(text, from)];
            let next = found.into_iter().flatten().min_by_key(|secret| secret.start);
            let Some(secret) = next else { break };
            from = secret.end;
            if self.note(place, &text[secret.clone()]) {
                redacted.push_str(&text[done..secret.start]);
                redacted.push_str(REDACTED);
                done = secret.end;
            }
        }
        (done > 0).then(|| redacted + &text[done..])
    }

    /// Replaces a text that is a secret; `None` if it was replaced already.
    fn whole(&mut self, place: &str, secret: &str) -> Option<String> {
        self.note(place, secret).then(|| REDACTED.to_owned())
    }

    /// Notes a secret; returns whether it is still there.
    fn note(&mut self, place: &str, secret: &str) -> bool {
        if secret == REDACTED {
            self.replaced.push(place.to_owned());
            return false;
        }
        self.places.push(place.to_owned());
        self.secrets.push(secret.to_owned());
        true
    }
}

/// The next secret of one kind in a text. It is looked for again only from behind it, so that a text is read
/// once.
struct Next {
    find: fn(&str) -> Option<Range<usize>>,
    /// `None` if it is not known; then whether there is one.
    found: Option<Option<Range<usize>>>,
}

impl Next {
    fn new(find: fn(&str) -> Option<Range<usize>>) -> Next {
        Next { find, found: None }
    }

    /// Returns the first secret that begins at `from` or later.
    fn from(&mut self, text: &str, from: usize) -> Option<Range<usize>> {
        let is_known = self
            .found
            .as_ref()
            .is_some_and(|found| found.as_ref().is_none_or(|secret| secret.start >= from));
        if !is_known {
            let found = (self.find)(&text[from..]);
            self.found = Some(found.map(|secret| secret.start + from..secret.end + from));
        }
        self.found.clone().flatten()
    }
}

/// Returns the last of the names that dots join to a key.
fn last_of(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// Tells whether the value of a key is a secret in the options of this name.
fn is_secret_of(group: &str, key: &str, value: &str) -> bool {
    let is_image = IMAGES.contains(&group);
    match last_of(key) {
        "password" => (is_image || matches!(group, "spice" | "iscsi")) && !is_switch(value),
        "cookie" => is_image,
        _ => false,
    }
}

/// Returns where the password of the first URL with one is; for iSCSI, it follows a `%`.
fn in_url(text: &str) -> Option<Range<usize>> {
    text.match_indices("://").find_map(|(scheme, mark)| {
        let host = scheme + mark.len();
        let authority = text[host..].split(['/', '?', '#']).next()?;
        let end = authority.rfind('@')?;
        let is_iscsi = text[..scheme].ends_with("iscsi") || text[..scheme].ends_with("iser");
        let start = authority[..end].find(if is_iscsi { '%' } else { ':' })? + 1;
        (start < end).then_some(host + start..host + end)
    })
}

/// Returns where the key of the first RBD image with one is: it ends with a colon that has no backslash
/// before it.
fn in_rbd(text: &str) -> Option<Range<usize>> {
    let mut from = text.find("rbd:")?;
    loop {
        let start = from + text[from..].find(":key=")? + ":key=".len();
        let mut before = ' ';
        let is_end = |now: char| {
            let is_escaped = std::mem::replace(&mut before, now) == '\\';
            now.is_whitespace() || now == ':' && !is_escaped
        };
        let end = text[start..].find(is_end).map_or(text.len(), |end| start + end);
        if start < end {
            return Some(start..end);
        }
        from = start;
    }
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

/// Names an option, with the id in its keys.
fn option_of(argument: &Argument, keys: Option<&Keys>) -> String {
    let name = argument.name().unwrap_or_default();
    let id = keys.and_then(|keys| keys.get("id").or(keys.get("node-name")));
    format!("-{name}{}", id.map_or(String::new(), |id| format!(" {id}")))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn line(words: &[&str]) -> CommandLine {
        CommandLine::new(words.iter().copied()).unwrap()
    }

    /// Found by the fuzzer: the secret had the quote that made the text no JSON.
    #[test]
    fn a_text_that_is_json_without_its_secret_is_known_to_lack_it() {
        let mut line = line(&["-drive", r#"file=json:{"file=rbd:p/i:key=hun"ter":67"ze":6}"#]);
        assert_eq!(line.redact(), ["-drive: file"]);
        assert_eq!(line.redacted(), ["-drive: file"], "{}", line.to_shell());
    }

    #[test]
    fn secrets_of_the_host_are_replaced_and_named_by_their_place() {
        let rows = [
            ("-object", "secret,id=s0,data=hun,,ter2,format=raw", "-object s0: data"),
            ("-object", r#"{"qom-type":"secret","id":"s1","data":"hun,ter2"}"#, "-object s1: data"),
            ("--spice", "port=5900,password=hun,,ter2", "-spice: password"),
            ("-iscsi", "user=me,password=hun,,ter2", "-iscsi: password"),
            ("-drive", "file=https://me:hun,,ter2@host/a?b=c@d,id=d0", "-drive d0: file"),
            ("-cdrom", "iscsi://me%hun,ter2@host/iqn/0?a=b", "-cdrom: file"),
            ("-hda", r"rbd:pool/i:id=x:key=hun,ter2:mon_host=a\:1", "-hda: file"),
            ("-object", "{'qom-type':'secret','id':'s2','data':'hun,ter2'}", "-object s2: data"),
            // Keys may be joined by dots in JSON too.
            (
                "-drive",
                r#"file=json:{"file.cookie":"hun,,ter2",,"file.driver":"http"}"#,
                "-drive: file",
            ),
            ("-hda", r#"json:{"file.cookie":"hun,ter2","file.driver":"http"}"#, "-hda: file"),
            ("-pflash", r#"json:{"file.password":"hun,ter2","type":"ftp"}"#, "-pflash: file"),
            ("-set", "drive.d0.file.cookie=hun,ter2", "-set: drive.d0.file.cookie"),
            ("-set", "drive.d0.file=http://me:hun,ter2@h/", "-set: drive.d0.file"),
            ("--set", "iscsi.x.password=hun,ter2", "-set: iscsi.x.password"),
            ("-set", "object.s0.data=hun,ter2", "-set: object.s0.data"),
            (
                "-blockdev",
                r#"{"driver":"https","node-name":"n0","cookie":"hun,ter2","url":"https://h/"}"#,
                "-blockdev n0: cookie",
            ),
            ("-drive", r"file=rbd:pool/i:id=x:key=hun,,ter2:mon_host=a\:1", "-drive: file"),
            (
                "-drive",
                r#"file=json:{"driver":"ftp",,"url":"ftp://u:hun,,ter2@h/"}"#,
                "-drive: file",
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
            let back = if value.contains(",,") { back } else { back.replace("hun,,", "hun,") };
            assert!(is_json || same(&back) == same(&before), "{back} {before}");
        }
        let text = "found http://a:b@c/d on rbd:p/i:key=e:f and nbd://g:h@i";
        let redacted =
            "found http://a:<redacted>@c/d on rbd:p/i:key=<redacted>:f and nbd://g:<redacted>@i";
        assert_eq!(redact_image(text), redacted);
        assert_eq!(redact_image(redacted), redacted);
        assert_eq!(redact_image("https://o'neil:it's@h/"), "https://o'neil:<redacted>@h/");
        let joined = r#"json:{"url":"http://a:b@c/d"}, /base.img"#;
        assert_eq!(redact_image(joined), r#"json:{"url":"http://a:<redacted>@c/d"}, /base.img"#);
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
            "-set",
            "device.d0.serial=http://u:p@h/",
            "-set",
            "drive.d0.password-secret=s0",
            "-append",
            "password=guest <redacted>",
            "-fw_cfg",
            "name=opt/a,string=http://u:p@h/",
            "-object",
            "memory-backend-ram,id=m0,size=64M",
        ];
        let mut line = line(&words);
        assert!(line.redact().is_empty());
        assert_eq!(line.to_arguments(), words);
        assert!(line.redacted().is_empty(), "the guest's words are its own");
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

    /// A line of 100000 bytes was read once for each of its keys, which took minutes.
    #[test]
    fn a_long_argument_is_read_once() {
        let began = Instant::now();
        let keys = "a,".repeat(200_000);
        let urls = "file=http://a:b@,".repeat(50_000);
        let rbd = "rbd:p/i:key=b:".repeat(100_000);
        for (value, secrets) in [(&keys, 0), (&urls, 50_000), (&rbd, 100_000)] {
            let mut line = line(&["-drive", &format!("file={value}")]);
            assert_eq!(line.redact().len(), secrets);
            assert_eq!(line.redacted().len(), secrets);
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    }
}
