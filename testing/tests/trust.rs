//! Whose command line a restore runs, and which secrets of it a file holds.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};

use vmfile::convert::{ConvertOptions, Format, convert};
use vmfile::restore::{Destination, ModeUsed, RestoreOptions, restore};
use vmfile::save::{After, BaseFile, SaveOptions};
use vmfile::{Control, RestoreError, Snapshot};
use vmfile_format::manifest::{ChangeMeta, PinMeta, VmMeta};
use vmfile_testing::verbs::rewrite_manifest;
use vmfile_testing::{
    Case, Guest, Qemu, Ram, Release, Saved, TestResult, cases, make_image, requires, root,
};

/// Somebody who is neither root nor the user of the tests.
const STRANGER: u32 = 54_321;

/// Expects that the command line in the file is not run, for a reason with this word, and that it is run
/// if the user says so.
fn is_refused(saved: &Saved, word: &str) -> TestResult {
    let error = saved.restore_saved(&RestoreOptions::default()).expect_err("it is not trusted");
    let RestoreError::Untrusted { reason } = &error else { return Err(error.into()) };
    assert!(reason.contains(word), "{reason}");
    let trusted = saved.restore_saved(&RestoreOptions::default().trust_command(true))?;
    assert!(trusted.report.running && trusted.qemu.is_some());
    cases(1, Case::WrongInput);
    Ok(())
}

/// `restore FILE` ran whatever program the file named, as whoever restored it.
#[test]
fn a_command_line_that_another_user_may_have_written_is_not_run() -> TestResult {
    requires!(root());
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(411).boot_to(&qemu, 1)?;
    let saved = guest.save_and_end(&SaveOptions::default())?;

    chown(&saved.file, Some(STRANGER), None)?;
    is_refused(&saved, "belongs to user 54321")?;
    chown(&saved.file, Some(0), None)?;
    for mode in [0o620, 0o602] {
        fs::set_permissions(&saved.file, Permissions::from_mode(mode))?;
        is_refused(&saved, "may be written by others")?;
    }
    fs::set_permissions(&saved.file, Permissions::from_mode(0o644))?;
    drop(saved.restore_saved(&RestoreOptions::default())?);

    let program = saved.directory.path().join("qemu-system-x86_64");
    fs::copy(qemu.executable()?, &program)?;
    chown(&program, Some(STRANGER), None)?;
    let name = program.to_str().ok_or("UTF-8")?.to_owned();
    rewrite_manifest(&saved.file, |vm| vm.executable = Some(name.clone()))?;
    is_refused(&saved, "the program")?;
    chown(&program, Some(0), None)?;
    drop(saved.restore_saved(&RestoreOptions::default())?);

    // The file says as whom the VM ran.
    rewrite_manifest(&saved.file, |vm| {
        assert_eq!(vm.user, Some(0));
        vm.user = Some(STRANGER);
    })?;
    is_refused(&saved, "would run as root now")?;

    // Whoever wrote the command line could write that it drops root's rights, too.
    for words in [["-runas", "nobody"], ["-run-with", "user=root"], ["-run-with", "user=nobody"]] {
        rewrite_manifest(&saved.file, |vm| vm.command_line.extend(words.map(str::to_owned)))?;
        let error = saved.restore_saved(&RestoreOptions::default()).expect_err("not trusted");
        assert!(matches!(error, RestoreError::Untrusted { .. }), "{words:?}: {error}");
    }
    Ok(())
}

/// `convert` made root's file of a stranger's, and root then ran its command line; a base that a stranger
/// could change was the RAM of root's guest.
#[test]
fn what_is_made_of_another_user_s_file_is_not_trusted_either() -> TestResult {
    requires!(root());
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(414).boot_to(&qemu, 1)?;
    let base = guest.save(&SaveOptions::default().after(After::Resume))?;
    let on = BaseFile::File(base.file.clone());
    let options = SaveOptions::default().base(Some(on)).thin(true);
    let thin = guest.save_and_end(&options)?;
    let convert = |name: &str| -> TestResult<(VmMeta, Vec<String>)> {
        let whole = thin.directory.path().join(name);
        let options = ConvertOptions::default();
        let to = Format::MappedRam;
        let report = convert((&thin.file, 0), &whole, to, &options, &Control::none())?;
        let snapshot = Snapshot::open(&whole, 0)?;
        let manifest = snapshot.manifest().ok_or("a manifest")?;
        Ok((manifest.meta.vm.clone(), report.warnings))
    };
    let (own, warnings) = convert("own")?;
    assert!(!own.command_line.is_empty() && warnings.is_empty(), "{warnings:?}");

    chown(&base.file, Some(STRANGER), None)?;
    let (made, warnings) = convert("made")?;
    let [warning] = &warnings[..] else { panic!("{warnings:?}") };
    assert!(warning.contains("belongs to user 54321"), "{warning}");
    assert!(made.command_line.is_empty() && made.executable.is_none() && made.changes.is_empty());
    let snapshot = Snapshot::open(&thin.directory.path().join("made"), 0)?;
    let (saved, options) = (Destination::Saved, RestoreOptions::default());
    let error = restore(&snapshot, saved, &options, &Control::none()).expect_err("no command");
    assert!(matches!(error, RestoreError::NoSavedCommand), "{error}");

    let words = own.command_line.clone();
    is_refused(&thin, "belongs to user 54321")?;
    // A command line that the user gives needs no trust, but the stranger could change the RAM.
    let snapshot = Snapshot::open(&thin.file, 0)?;
    let given = Destination::Command(words);
    let restored = restore(&snapshot, given, &options, &Control::none())?.report;
    let is_said =
        restored.warnings.iter().any(|warning| warning.contains("can change the guest's RAM"));
    assert_eq!(is_said, restored.mode == ModeUsed::Map, "{:?}", restored.warnings);
    Ok(())
}

/// A file held every secret of the command line, in the clear.
#[test]
fn a_file_holds_secrets_of_the_command_line_only_if_asked() -> TestResult {
    const SECRET: &str = "correct-horse-battery";
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir()?;
    let image = directory.path().join("disk.luks");
    let object = format!("secret,id=s0,data={SECRET}");
    make_image(
        &image,
        &["-f", "luks", "--object", &object, "-o", "key-secret=s0,iter-time=10"],
        1,
    )?;
    let node = format!(
        "driver=luks,node-name=n0,key-secret=s0,file.driver=file,file.filename={}",
        image.display()
    );
    let config = Guest::boot_sector(Ram::private(64)).seed(412);
    let config = config.arguments(["-object", &object, "-blockdev", &node]);
    let mut guest = config.arguments(["-device", "virtio-blk-pci,drive=n0"]).boot_to(&qemu, 1)?;
    let options = SaveOptions::default();
    let with = guest.save(&options.clone().with_secrets(true).after(After::Pause))?;
    let holds = |saved: &Saved| -> TestResult<bool> {
        let bytes = fs::read(&saved.file)?;
        Ok(bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes()))
    };
    assert!(with.report.warnings.is_empty() && holds(&with)?, "{:?}", with.report.warnings);
    let without = guest.save_and_end(&options)?;
    assert!(!holds(&without)?);
    let [warning] = &without.report.warnings[..] else { panic!("{:?}", without.report.warnings) };
    assert!(warning.contains("-object s0: data") && !warning.contains(SECRET), "{warning}");

    let given = |id: &str, text: &str| -> TestResult<RestoreOptions> {
        let file = directory.path().join("secret");
        fs::write(&file, text)?;
        Ok(RestoreOptions::default().secrets(vec![(id.to_owned(), file)]))
    };
    let refused = |options: &RestoreOptions| without.restore_saved(options).expect_err("refused");
    let error = refused(&RestoreOptions::default());
    assert!(error.to_string().ends_with("-object s0: data"), "{error}");
    let error = refused(&given("s1", SECRET)?);
    assert!(matches!(&error, RestoreError::NoSuchSecret { id } if id == "s1"), "{error}");
    // QEMU opens the image with what it is given.
    let error = refused(&given("s0", "another")?);
    assert!(error.to_string().contains("Invalid password"), "{error}");
    drop(without.restore_saved(&given("s0", SECRET)?)?);
    drop(with.restore_saved(&RestoreOptions::default())?);
    Ok(())
}

/// A change that the file's author had made up ended the restore by a panic, or was passed over.
#[test]
fn changes_in_a_file_that_fit_no_command_line_are_refused() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(413).boot_to(&qemu, 1)?;
    let saved = guest.save_and_end(&SaveOptions::default())?;
    let change = |add: &[&str], leave_out: &[u64]| ChangeMeta {
        what: "a device".to_owned(),
        found: "one".to_owned(),
        expected: "none".to_owned(),
        leave_out: leave_out.to_vec(),
        pins: Vec::new(),
        add: add.iter().map(|&word| word.to_owned()).collect(),
        obstacle: None,
    };
    let pin = |device, key: &str| ChangeMeta {
        pins: vec![PinMeta { device, key: key.to_owned(), value: "1".to_owned() }],
        ..change(&[], &[])
    };
    let rows = [
        (change(&["x", "y"], &[]), "\"x\" is added"),
        (change(&["", ""], &[]), "\"\" is added"),
        (change(&["-S", "-S"], &[]), "\"-S\" is added"),
        (change(&["-device"], &[]), "-device has no value"),
        (change(&[], &[99_999]), "number 99999"),
        (change(&[], &[u64::MAX]), "counted from 0"),
        (pin(1 << 40, "addr"), "number 1099511627776"),
    ];
    for (change, said) in rows {
        rewrite_manifest(&saved.file, |vm| vm.changes = vec![change])?;
        let error = saved.restore_saved(&RestoreOptions::default()).expect_err("it fits none");
        assert!(matches!(error, RestoreError::CommandLine(_)), "{error:?}");
        assert!(error.to_string().contains(said), "{error}");
        cases(1, Case::WrongInput);
    }
    Ok(())
}
