//! Every way to write a drive, and what stands there with another medium in it.

use super::*;

fn medium(format: &str) -> Medium {
    let path = PathBuf::from("/new,1");
    Medium { path, format: format.to_owned(), is_device: false, read_only: None }
}

/// Puts `medium` into the last drive of the line.
fn put(words: &[&str], medium: &Medium) -> Result<Vec<String>, CommandLineError> {
    let mut line = CommandLine::new(words.iter().copied())?;
    let drive = line.drives().pop().expect("a drive");
    line.put_medium(&drive, medium)?;
    // What was put there is found there.
    let drive = line.drives().pop().expect("a drive");
    assert_eq!(drive.images.len(), 1, "{:?}", line.to_arguments());
    assert_eq!(drive.images[0].path.as_deref(), Some("/new,1"), "{:?}", line.to_arguments());
    assert_eq!(drive.images[0].format.as_deref(), Some(&*medium.format));
    Ok(line.to_arguments())
}

fn take_out(words: &[&str]) -> Result<Vec<String>, CommandLineError> {
    let mut line = CommandLine::new(words.iter().copied())?;
    let drive = line.drives().pop().expect("a drive");
    line.take_medium_out(&drive)?;
    let drive = line.drives().pop().expect("a drive");
    assert!(drive.images.is_empty(), "{:?}", line.to_arguments());
    Ok(line.to_arguments())
}

#[test]
fn a_drive_gets_the_new_image_and_keeps_the_rest() {
    let words = ["-drive", "file=a.raw,format=raw,if=none,id=d0,cache=none,file.locking=off"];
    let found = put(&words, &medium("qcow2")).unwrap();
    let keys = Keys::parse(&found[1], "");
    for (key, value) in [
        ("file.filename", "/new,1"),
        ("driver", "qcow2"),
        ("if", "none"),
        ("id", "d0"),
        ("cache", "none"),
        ("file.locking", "off"),
    ] {
        assert_eq!(keys.get(key), Some(value), "{found:?}");
    }
    assert_eq!(keys.get("file"), None, "{found:?}");
    assert_eq!(keys.get("format"), None, "{found:?}");
}

#[test]
fn every_spelling_takes_another_image() {
    let device = ["-device", "virtio-blk-pci,drive=n"];
    let json = r#"{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"/a"}}"#;
    for words in [
        &["-drive", r#"if=none,file=json:{"driver":"qcow2",,"file":{"filename":"/a"}}"#][..],
        &["-drive", "driver=qcow2,file.driver=file,file.filename=/a,backing.file.filename=/b"],
        &["-drive", "driver=qcow2,file.driver=nbd,file.host=h,file.port=1"],
        &["-drive", "if=none,id=empty,media=cdrom"],
        &["-hda", "/a"],
        &["-cdrom", "/a"],
        &["-fda", "/a"],
        &["-pflash", "/a"],
        &["/a"],
        &["-blockdev", json, device[0], device[1]],
        &["-blockdev", "file,filename=/a,node-name=n", device[0], device[1]],
        &["-blockdev", "qcow2,node-name=n,file.driver=file,file.filename=/a", device[0], device[1]],
        &["-blockdev", "raw,node-name=n,file.driver=nbd,file.host=h", device[0], device[1]],
        &[
            "-blockdev",
            "throttle,node-name=n,file=q",
            "-blockdev",
            "qcow2,node-name=q,file.driver=file,file.filename=/a",
            device[0],
            device[1],
        ],
        &["-device", "ide-cd,id=cd"],
        &["-device", r#"{"driver":"scsi-cd"}"#],
    ] {
        for format in ["qcow2", "raw"] {
            put(words, &medium(format)).unwrap();
        }
    }
}

#[test]
fn nodes_that_only_the_old_image_needed_are_gone() {
    // After an active block-commit: what is on top now was below, as a node of its own.
    let words = [
        "-blockdev",
        "file,filename=/base,node-name=bf",
        "-blockdev",
        "qcow2,file=bf,node-name=b",
        "-blockdev",
        r#"{"driver":"file","filename":"/top","node-name":"tf"}"#,
        "-blockdev",
        r#"{"driver":"qcow2","file":"tf","node-name":"t","backing":"b","l2-cache-size":1}"#,
        "-device",
        "virtio-blk-pci,drive=t",
    ];
    let found = put(&words, &medium("raw")).unwrap();
    assert_eq!(found.len(), 6, "{found:?}");
    let node: Value = serde_json::from_str(&found[3]).unwrap();
    assert_eq!(node, json!({"driver": "raw", "file": "tf", "node-name": "t"}));
    let file: Value = serde_json::from_str(&found[1]).unwrap();
    assert_eq!(file, json!({"driver": "file", "filename": "/new,1", "node-name": "tf"}));
}

#[test]
fn a_read_only_medium_makes_the_drive_read_only_in_the_form_of_the_option() {
    let medium = Medium { read_only: Some(true), ..medium("raw") };
    let found = put(&["-drive", "if=floppy"], &medium).unwrap();
    assert!(Keys::parse(&found[1], "").is_on("readonly"), "{found:?}");
    let device = ["-device", "ide-cd,drive=n"];
    let json = r#"{"driver":"file","filename":"/a","node-name":"n"}"#;
    let found = put(&["-blockdev", json, device[0], device[1]], &medium).unwrap();
    assert!(found[1].contains(r#""read-only":true"#), "{found:?}");
    let words = ["-blockdev", "file,filename=/a,node-name=n", device[0], device[1]];
    let found = put(&words, &medium).unwrap();
    assert!(found[1].contains("read-only=on"), "{found:?}");
}

#[test]
fn a_medium_is_taken_out_and_the_drive_stays() {
    assert_eq!(take_out(&["-cdrom", "/a"]).unwrap(), ["-drive", "index=2,media=cdrom"]);
    let words = ["-drive", "file=/a,format=raw,if=none,media=cdrom,id=cd"];
    assert_eq!(take_out(&words).unwrap(), ["-drive", "id=cd,if=none,media=cdrom"]);
    let words = [
        "-blockdev",
        "file,filename=/a,node-name=f",
        "-blockdev",
        "raw,file=f,node-name=n",
        "-device",
        "ide-cd,drive=n,id=cd",
    ];
    assert_eq!(take_out(&words).unwrap(), ["-device", "driver=ide-cd,id=cd"]);
    assert_eq!(take_out(&["-device", "ide-cd"]).unwrap(), ["-device", "ide-cd"]);
}

#[test]
fn a_drive_of_the_machine_s_own_gets_an_option() {
    let mut line = CommandLine::new(["-S"]).unwrap();
    line.add_medium("ide1-cd0", &medium("raw")).unwrap();
    line.add_medium("floppy0", &medium("raw")).unwrap();
    let expected = [
        "-S",
        "-drive",
        "if=ide,bus=1,unit=0,media=cdrom,file=/new,,1,format=raw",
        "-drive",
        "if=floppy,index=0,file=/new,,1,format=raw",
    ];
    assert_eq!(line.to_arguments(), expected);
    let ids: Vec<_> = line.drives().into_iter().filter_map(|drive| drive.id).collect();
    assert_eq!(ids, ["ide1-cd0", "floppy0"]);
    for id in ["mine", "ide0-hd0", "x1", "", "ide1-", "ide1-\u{e9}\u{e9}"] {
        assert!(line.add_medium(id, &medium("raw")).is_err(), "{id}");
    }
}

#[test]
fn what_leaves_no_place_is_refused_without_its_value() {
    for (words, what) in [
        (["-drive", "file=/a,format=raw,offset=512"], "the image is a part of its file"),
        (
            ["-drive", "driver=throttle,file.driver=raw,file.file.filename=/a"],
            "its image lies below a filter",
        ),
    ] {
        let error = put(&words, &medium("qcow2")).unwrap_err();
        let expected = format!("no image can take the place of that of -drive: {what}");
        assert_eq!(error.to_string(), expected);
    }
}
