//! Every way to write a drive, and what is read.

use super::*;

fn drives_of(words: &[&str]) -> Vec<LineDrive> {
    CommandLine::new(words.iter().copied()).unwrap().drives()
}

/// The images of the only drive: path and format.
fn images_of(words: &[&str]) -> Vec<(String, String)> {
    let [drive] = &*drives_of(words) else { panic!("{words:?}: {:?}", drives_of(words)) };
    let text = |text: &Option<String>| text.clone().unwrap_or("-".to_owned());
    drive.images.iter().map(|image| (text(&image.path), text(&image.format))).collect()
}

fn ids_of(words: &[&str]) -> Vec<String> {
    drives_of(words).into_iter().filter_map(|drive| drive.id).collect()
}

fn pair(path: &str, format: &str) -> (String, String) {
    (path.to_owned(), format.to_owned())
}

/// QEMU reports the format of the uppermost node that is no filter.
#[test]
fn the_format_is_that_of_the_uppermost_node() {
    let file = r#"{"driver":"file","filename":"/a"}"#;
    for (node, format) in [
        (r#""driver":"qcow2","file":{"driver":"raw","offset":512,"file":FILE}"#, "qcow2"),
        (r#""driver":"raw","file":{"driver":"luks","key-secret":"s","file":FILE}"#, "raw"),
        (r#""driver":"raw","file":{"driver":"preallocate","file":FILE}"#, "raw"),
        (
            r#""driver":"throttle","throttle-group":"t","file":{"driver":"qcow2","file":FILE}"#,
            "qcow2",
        ),
        (r#""driver":"copy-on-read","file":FILE"#, "file"),
    ] {
        let node = format!("{{\"node-name\":\"n\",{}}}", node.replace("FILE", file));
        let words = ["-blockdev", &node, "-device", "virtio-blk-pci,drive=n"];
        assert_eq!(images_of(&words), [pair("/a", format)], "{node}");
    }
}

#[test]
fn one_image_is_found_in_every_spelling() {
    let json = r#"{"driver":"qcow2","file":{"driver":"file","filename":"/a,b"}}"#;
    let in_words = format!("id=d0,if=none,file=json:{}", json.replace(',', ",,"));
    let node = r#"{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"/a,b"}}"#;
    let device = ["-device", "virtio-blk-pci,drive=n"];
    for words in [
        &["-drive", "file=/a,,b,format=qcow2"][..],
        &["-drive", "/a,,b,format=qcow2"],
        &["-drive", "file=file:/a,,b,driver=qcow2,if=virtio"],
        &["-drive", "driver=qcow2,file.filename=/a,,b,file.driver=file,id=d0,if=none"],
        &["-drive", "driver=qcow2,file=/a,,b,file.locking=off"],
        &["-drive", &in_words],
        &["-blockdev", node, device[0], device[1]],
        &[
            "-blockdev",
            "driver=qcow2,node-name=n,file.driver=file,file.filename=/a,,b",
            device[0],
            r#"{"driver":"virtio-blk-pci","drive":"n","id":"x"}"#,
        ],
        &[
            "-blockdev",
            "file,filename=/a,,b,node-name=f",
            "-blockdev",
            "qcow2,file=f,node-name=n",
            device[0],
            device[1],
        ],
        &[
            "-blockdev",
            "file,filename=/a,,b,node-name=f",
            "-blockdev",
            "qcow2,file=f,node-name=n",
            "-machine",
            "q35,pflash0=n",
        ],
        &[
            "-blockdev",
            "throttle,throttle-group=g,node-name=n,file.driver=qcow2,file.file.driver=file,\
             file.file.filename=/a,,b",
            device[0],
            device[1],
        ],
    ] {
        assert_eq!(images_of(words), [pair("/a,b", "qcow2")], "{words:?}");
    }
    for words in [["-hda", "/a,b"], ["-cdrom", "/a,b"], ["-fda", "/a,b"], ["-pflash", "/a,b"]] {
        assert_eq!(images_of(&words), [pair("/a,b", "-")], "{words:?}");
    }
    assert_eq!(images_of(&["/a,b"]), [pair("/a,b", "-")]);
}

#[test]
fn images_below_are_found_where_the_line_names_them() {
    let expected = [pair("/top", "qcow2"), pair("/base", "raw")];
    for words in [
        &["-drive", "file=/top,format=qcow2,backing.driver=raw,backing.file.filename=/base"][..],
        &[
            "-blockdev",
            "raw,node-name=b,file.driver=file,file.filename=/base",
            "-blockdev",
            "qcow2,node-name=t,backing=b,file.driver=file,file.filename=/top",
            "-device",
            "virtio-blk-pci,drive=t",
        ],
    ] {
        assert_eq!(images_of(words), expected, "{words:?}");
    }
}

#[test]
fn an_empty_drive_has_no_image() {
    for words in [
        &["-drive", "if=ide,media=cdrom,id=cd"][..],
        &["-device", "ide-cd,id=cd"],
        &["-drive", "if=none,id=cd", "-device", "scsi-cd,drive=cd"],
    ] {
        let [drive] = &*drives_of(words) else { panic!("{words:?}") };
        assert!(drive.images.is_empty() && drive.is_cdrom, "{drive:?}");
    }
}

#[test]
fn a_driver_without_a_path_is_an_image_without_one() {
    let words = ["-blockdev", "null-co,node-name=n", "-device", "virtio-blk-pci,drive=n"];
    assert_eq!(images_of(&words), [pair("-", "null-co")]);
    assert_eq!(
        images_of(&["-drive", "format=raw,file.driver=nbd,file.host=h,file.port=1"]),
        [pair("-", "raw")]
    );
}

#[test]
fn nodes_that_refer_to_one_another_in_a_circle_end() {
    for node in ["qcow2,node-name=a,file=a,backing=a", "qcow2,node-name=a,filename=/x,backing=a"] {
        let words = ["-blockdev", node, "-device", "virtio-blk-pci,drive=a"];
        assert_eq!(images_of(&words).len(), DEPTH_MAX);
    }
}

#[test]
fn ids_are_those_that_qemu_makes() {
    // Each seen with QEMU 7.2, 10.0.2 and 11.1.
    assert_eq!(
        ids_of(&["-hda", "a", "-hdb", "b", "-cdrom", "c", "-hdd", "d"]),
        ["ide0-hd0", "ide0-hd1", "ide1-cd0", "ide1-hd1"]
    );
    assert_eq!(
        ids_of(&["-M", "q35", "-hda", "a", "-hdb", "b", "-cdrom", "c"]),
        ["ide0-hd0", "ide1-hd0", "ide2-cd0"]
    );
    let words = ["-drive", "file=a", "-drive", "file=b", "-drive", "file=c,media=cdrom"];
    assert_eq!(ids_of(&words), ["ide0-hd0", "ide0-hd1", "ide1-cd0"]);
    let words = ["-drive", "if=virtio,file=a", "-drive", "if=virtio,file=b", "-fda", "c"];
    assert_eq!(ids_of(&words), ["virtio0", "virtio1", "floppy0"]);
    let words = ["-drive", "if=pflash,file=a", "-pflash", "b", "-drive", "if=none,file=c"];
    assert_eq!(ids_of(&words), ["pflash0", "pflash1", "none0"]);
    assert_eq!(ids_of(&["-drive", "if=scsi,bus=1,unit=3,file=a"]), ["scsi1-hd3"]);
    assert_eq!(ids_of(&["-drive", "file=a,id=mine"]), ["mine"]);
    assert_eq!(ids_of(&["disk.img"]), ["ide0-hd0"]);
}

#[test]
fn a_device_without_an_id_has_the_number_that_qemu_gives_it() {
    // Seen with QEMU 7.2, 10.0.2 and 11.1: words, then if=virtio, then JSON.
    let drives = drives_of(&[
        "-device",
        r#"{"driver":"virtio-blk-pci","drive":"x"}"#,
        "-device",
        "virtio-rng-pci",
        "-device",
        "virtio-blk-pci,drive=y",
        "-device",
        "ide-cd",
        "-drive",
        "if=virtio,file=a",
        "-blockdev",
        "file,node-name=x,filename=/x",
        "-blockdev",
        "file,node-name=y,filename=/y",
    ]);
    let found = |qdev: &str| {
        let drive = drives.iter().find(|drive| drive.is_named("", Some(qdev)));
        drive.map(|drive| drive.images.first().and_then(|image| image.path.clone()))
    };
    let path = |number: usize| format!("/machine/peripheral-anon/device[{number}]");
    assert_eq!(found(&path(1)), Some(Some("/y".to_owned())));
    assert_eq!(found(&path(2)), Some(None));
    assert_eq!(found(&format!("{}/virtio-backend", path(4))), Some(Some("/x".to_owned())));
    assert_eq!(found(&path(0)), None);
}

/// The first took seconds for a few thousand drives; the second overflowed the stack.
#[test]
fn many_drives_and_a_key_of_many_dots_are_read_soon() {
    let began = std::time::Instant::now();
    let words: Vec<&str> = ["-drive", "if=virtio"].into_iter().cycle().take(20_000).collect();
    let drives = CommandLine::new(words).unwrap().drives();
    assert_eq!(drives.last().unwrap().id.as_deref(), Some("virtio9999"));
    let dots = format!("{}=x", "a.".repeat(100_000));
    let line = CommandLine::new(["-drive", dots.as_str(), "-blockdev", dots.as_str()]).unwrap();
    assert_eq!(line.drives().len(), 1);
    assert!(began.elapsed() < std::time::Duration::from_secs(10), "{:?}", began.elapsed());
}
