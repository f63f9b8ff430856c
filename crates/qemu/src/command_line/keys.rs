//! `key=value` lists, QEMU's way to write what belongs to one option; and the same in JSON.

use serde_json::Value;

/// The keys of one option's value, in order. A key may occur more than once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keys(Vec<(String, String)>);

impl Keys {
    /// Reads a list; `implied` is the key of a first value that stands alone.
    ///
    /// A comma within a value is written twice. A key without a value is a switch: `server` means
    /// `server=on`, `noserver` or `nowait` means off. JSON is read too: its scalars by their keys,
    /// those of nested objects by keys joined with dots.
    pub(super) fn parse(text: &str, implied: &str) -> Keys {
        if text.trim_start().starts_with('{') {
            return parse_tree(text).map_or(Keys(Vec::new()), |value| Keys::of(&value));
        }
        let mut keys = Vec::new();
        let mut rest = text;
        let mut first = true;
        while !rest.is_empty() {
            let end_of_key = rest.find([',', '=']);
            let (key, value, after) = match end_of_key {
                Some(at) if rest[at..].starts_with('=') => {
                    let (value, after) = take_value(&rest[at + 1..]);
                    (rest[..at].to_owned(), value, after)
                }
                _ => {
                    let (word, after) = take_value(rest);
                    let (key, value) =
                        if first { (implied.to_owned(), word) } else { switch(&word) };
                    (key, value, after)
                }
            };
            keys.push((key, value));
            rest = after;
            first = false;
        }
        Keys(keys)
    }

    /// Returns the scalars of a tree by their keys, those of nested objects by keys joined with
    /// dots.
    pub(super) fn of(tree: &Value) -> Keys {
        let mut keys = Vec::new();
        flatten(tree, "", &mut keys);
        Keys(keys)
    }

    /// Returns the value of `key`; the last one, as QEMU does.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    pub(super) fn is_on(&self, key: &str) -> bool {
        self.get(key).is_some_and(is_on)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

/// Tells whether a text is JSON.
pub(super) fn is_tree(text: &str) -> bool {
    parse_tree(text).is_some()
}

/// Reads JSON; QEMU takes single quotes too.
fn parse_tree(text: &str) -> Option<Value> {
    let tree = serde_json::from_str(text);
    let is_single = !text.contains(['"', '\\']);
    tree.or_else(|error| match is_single {
        true => serde_json::from_str(&text.replace('\'', "\"")),
        false => Err(error),
    })
    .ok()
}

/// Replaces those values for which `change` returns another one; all else stays as it is written. JSON is
/// written anew, if one of its texts changes.
pub(super) fn map_values(
    text: &str,
    implied: &str,
    change: &mut dyn FnMut(&str, &str) -> Option<String>,
) -> String {
    if text.trim_start().starts_with('{') {
        let mut changes = 0_usize;
        let tree = parse_tree(text);
        let tree = tree.map(|tree| map_texts(tree, "", &mut changes, change));
        return tree.filter(|_| changes > 0).map_or(text.to_owned(), |tree| tree.to_string());
    }
    let (mut mapped, mut rest) = (String::new(), text);
    while !rest.is_empty() {
        let end_of_key = rest.find([',', '=']).filter(|at| rest[*at..].starts_with('='));
        let is_first = rest.len() == text.len();
        let start = end_of_key.map_or(0, |at| at + 1);
        let (value, after) = take_value(&rest[start..]);
        let key = end_of_key.map(|at| &rest[..at]).or(is_first.then_some(implied));
        let written = &rest[..rest.len() - after.len()];
        match key.and_then(|key| change(key, &value)) {
            Some(changed) => {
                mapped.push_str(&rest[..start]);
                mapped.push_str(&changed.replace(',', ",,"));
                let had_comma = written.len() > start + value.replace(',', ",,").len();
                mapped.push_str(if had_comma { "," } else { "" });
            }
            None => mapped.push_str(written),
        }
        rest = after;
    }
    mapped
}

/// Replaces texts in a tree, and counts them.
fn map_texts(
    tree: Value,
    key: &str,
    changes: &mut usize,
    change: &mut dyn FnMut(&str, &str) -> Option<String>,
) -> Value {
    match tree {
        Value::String(text) => match change(key, &text) {
            Some(changed) => {
                *changes += 1;
                Value::String(changed)
            }
            None => Value::String(text),
        },
        Value::Array(values) => {
            let values = values.into_iter().map(|value| map_texts(value, key, changes, change));
            Value::Array(values.collect())
        }
        Value::Object(values) => {
            let mut mapped = serde_json::Map::new();
            for (name, value) in values {
                let value = map_texts(value, &name, changes, change);
                mapped.insert(name, value);
            }
            Value::Object(mapped)
        }
        other => other,
    }
}

/// Tells whether a value is one of those that QEMU takes for on.
pub(super) fn is_on(value: &str) -> bool {
    matches!(value, "on" | "yes" | "true" | "y")
}

/// Tells whether a value is one of those that QEMU takes for on or off.
pub(super) fn is_switch(value: &str) -> bool {
    is_on(value) || matches!(value, "off" | "no" | "false" | "n")
}

/// Writes one `key=value`, with the commas doubled.
pub(super) fn write(key: &str, value: &str) -> String {
    format!("{key}={}", value.replace(',', ",,"))
}

/// Adds a `key=value` to a list.
pub(super) fn append(list: &str, word: &str) -> String {
    let commas = list.len() - list.trim_end_matches(',').len();
    // A single comma at the end begins a key; doubled ones belong to a value.
    let comma = if commas % 2 == 1 { "" } else { "," };
    format!("{list}{comma}{word}")
}

/// Takes a value up to a single comma; a doubled comma stands for one.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some((before, after)) = rest.split_once(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(before);
        match after.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, after),
        }
    }
}

fn switch(word: &str) -> (String, String) {
    match word.strip_prefix("no") {
        Some(name) if !name.is_empty() => (name.to_owned(), "off".to_owned()),
        _ => (word.to_owned(), "on".to_owned()),
    }
}

fn flatten(value: &Value, key: &str, keys: &mut Vec<(String, String)>) {
    let joined =
        |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        Value::Null => {}
        Value::Bool(on) => keys.push((key.to_owned(), if *on { "on" } else { "off" }.to_owned())),
        Value::Number(number) => keys.push((key.to_owned(), number.to_string())),
        Value::String(text) => keys.push((key.to_owned(), text.clone())),
        Value::Array(values) => {
            for (index, value) in values.iter().enumerate() {
                flatten(value, &joined(&index.to_string()), keys);
            }
        }
        Value::Object(values) => {
            for (name, value) in values {
                flatten(value, &joined(name), keys);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> Vec<(String, String)> {
        Keys::parse(text, "type").0
    }

    fn owned(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_first_word_gets_the_implied_key() {
        assert_eq!(pairs("q35,smm=on"), owned(&[("type", "q35"), ("smm", "on")]));
        assert_eq!(pairs("type=q35"), owned(&[("type", "q35")]));
    }

    #[test]
    fn doubled_commas_are_one() {
        assert_eq!(
            pairs("file,path=/a,,b,,,c=d"),
            owned(&[("type", "file"), ("path", "/a,b,"), ("c", "d")])
        );
        assert_eq!(pairs("a,,b"), owned(&[("type", "a,b")]));
    }

    #[test]
    fn switches_are_on_or_off() {
        assert_eq!(
            pairs("socket,server,nowait"),
            owned(&[("type", "socket"), ("server", "on"), ("wait", "off")])
        );
    }

    #[test]
    fn a_value_may_hold_an_equals_sign() {
        assert_eq!(pairs("x,a=b=c"), owned(&[("type", "x"), ("a", "b=c")]));
    }

    #[test]
    fn json_is_read_by_its_keys() {
        let keys = Keys::parse(r#"{"qom-type":"t","size":64,"share":true,"f":{"a":[1]}}"#, "type");
        assert_eq!(keys.get("qom-type"), Some("t"));
        assert_eq!(keys.get("size"), Some("64"));
        assert!(keys.is_on("share"));
        assert_eq!(keys.get("f.a.0"), Some("1"));
    }

    #[test]
    fn what_is_appended_is_a_key_whatever_stands_before_it() {
        for list in ["a", "a,", "a,,", "a,b=c,,,"] {
            assert_eq!(Keys::parse(&append(list, "x=y"), "type").get("x"), Some("y"), "{list}");
        }
    }

    #[test]
    fn odd_texts_do_not_hang_or_panic() {
        for text in ["", ",", ",,", "=", "a=", "=,=", ",,,", "a,", "{", "\u{e9}=\u{e9},\u{e9}"] {
            let _ = Keys::parse(text, "type");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let text = ["file".to_owned(), write("path", "/a,b,,c"), write("x", "1")].join(",");
        assert_eq!(Keys::parse(&text, "type").get("path"), Some("/a,b,,c"));
    }
}
