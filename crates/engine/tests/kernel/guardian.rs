//! A guardian carries out its will when its ward ends, and does nothing otherwise.

use std::ffi::CString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmfile_engine::{Guardian, Step, Will};

use crate::child::{Playing, say, wait_for_the_end};

const LIMIT: Duration = Duration::from_secs(10);

fn ask(word: &str) -> Step {
    Step::Ask {
        line: format!("{word}\n").into_bytes(),
        answer: word.as_bytes().to_vec(),
        limit: LIMIT,
    }
}

/// The role of a ward, which the tests kill: connects to `socket` and starts a guardian.
pub(crate) fn ward(socket: &Path) {
    let stream = UnixStream::connect(socket).unwrap();
    let guardian = Guardian::start(stream.as_fd()).unwrap();
    guardian.replace_will(&Will::new(&[ask("old")])).unwrap();
    guardian.replace_will(&Will::new(&[ask("first"), ask("second")])).unwrap();
    say(format!("{}", guardian.pid()));
    wait_for_the_end();
    guardian.dismiss();
}

/// Returns the other end of the ward's socket, and the guardian's process id.
fn peer(playing: &mut Playing, listener: &UnixListener) -> (BufReader<UnixStream>, u32) {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let guardian = playing.words().parse().unwrap();
    (BufReader::new(stream), guardian)
}

fn next_line(peer: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    peer.read_line(&mut line).unwrap();
    line
}

#[test]
fn the_newest_will_of_a_killed_process_is_carried_out_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("peer");
    let listener = UnixListener::bind(&path).unwrap();
    let mut playing = Playing::start("ward", path.to_str().unwrap(), None).unwrap();
    let (mut peer, guardian) = peer(&mut playing, &listener);

    playing.kill();

    // First the guardian cuts off a line that the ward may have begun.
    assert_eq!(next_line(&mut peer), "\u{1}\n");
    assert_eq!(next_line(&mut peer), "first\n");
    // Lines without the answer are skipped, however they are split into pieces.
    peer.get_mut().write_all(b"an error\n an event\nthe fi").unwrap();
    peer.get_mut().write_all(b"rst answer\n").unwrap();
    assert_eq!(next_line(&mut peer), "second\n");
    peer.get_mut().write_all(b"second\n").unwrap();
    // The end of the socket shows that the guardian has ended, after its ward.
    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0);
    let deadline = Instant::now() + LIMIT;
    let is_gone = || {
        let status = std::fs::read_to_string(format!("/proc/{guardian}/stat")).unwrap_or_default();
        status.is_empty() || status.contains(") Z ")
    };
    while !is_gone() {
        assert!(Instant::now() < deadline, "the guardian ends");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_guardian_that_is_dismissed_does_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("peer");
    let listener = UnixListener::bind(&path).unwrap();
    let mut playing = Playing::start("ward", path.to_str().unwrap(), None).unwrap();
    let (mut peer, guardian) = peer(&mut playing, &listener);
    let name = std::fs::read_to_string(format!("/proc/{guardian}/comm")).unwrap();
    assert_eq!(name, "vm-guardian\n");
    let open = std::fs::read_dir(format!("/proc/{guardian}/fd")).unwrap().count();
    assert_eq!(open, 2, "the guardian keeps its pipe and the socket, nothing else");

    // The ward dismisses its guardian and ends when its standard input ends.
    playing.let_end();

    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_question_is_asked_until_its_answer_has_the_word() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(LIMIT)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (kept, removed) = (directory.path().join("kept"), directory.path().join("removed"));
    for path in [&kept, &removed] {
        std::fs::write(path, b"").unwrap();
    }
    let path = |path: &Path| CString::new(path.as_os_str().as_bytes()).unwrap();
    let wait = |words: &[&str], limit| Step::Await {
        line: b"how far?\n".to_vec(),
        answer: b"answer".to_vec(),
        words: words.iter().map(|word| word.as_bytes().to_vec()).collect(),
        limit,
    };
    let guardian = Guardian::start(ours.as_fd()).unwrap();
    let steps = [
        wait(&["done", "failed"], LIMIT),
        Step::RemoveIfLast(path(&removed)),
        wait(&["never"], Duration::from_millis(50)),
        Step::RemoveIfLast(path(&kept)),
        ask("bye"),
    ];
    guardian.replace_will(&Will::new(&steps)).unwrap();
    let asked = std::thread::spawn(move || {
        let mut peer = BufReader::new(theirs);
        let mut lines = Vec::new();
        loop {
            let line = next_line(&mut peer);
            let answers = lines.iter().filter(|line| *line == "how far?\n").count();
            let answer: String = match line.as_str() {
                // Longer than any buffer: the words at its start still count.
                "how far?\n" if answers == 2 => format!("answer done {}\n", "x".repeat(200_000)),
                "how far?\n" => "answer active\n".to_owned(),
                "bye\n" => "bye\n".to_owned(),
                _ => String::new(),
            };
            peer.get_mut().write_all(answer.as_bytes()).unwrap();
            lines.push(line.clone());
            if line == "bye\n" {
                return lines;
            }
        }
    });

    drop(guardian);

    let lines = asked.join().unwrap();
    assert!(lines.iter().filter(|line| *line == "how far?\n").count() > 3, "{lines:?}");
    assert!(!removed.exists() && kept.exists());
}

#[test]
fn a_question_is_asked_until_a_part_of_its_answer_stays_the_same() {
    let quiet = Duration::from_millis(100);
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(LIMIT)).unwrap();
    let guardian = Guardian::start(ours.as_fd()).unwrap();
    let still = Step::AwaitStill {
        line: b"how far?\n".to_vec(),
        answer: b"answer".to_vec(),
        from: b"ram".to_vec(),
        quiet,
        limit: LIMIT,
    };
    guardian.replace_will(&Will::new(&[still, ask("bye")])).unwrap();
    let asked = std::thread::spawn(move || {
        let mut peer = BufReader::new(theirs);
        let (mut count, mut changed_at) = (0, Instant::now());
        loop {
            let answer = match next_line(&mut peer).as_str() {
                "how far?\n" => {
                    count += 1;
                    if count <= 5 {
                        changed_at = Instant::now();
                    }
                    let sent = count.min(5);
                    // The text outside the compared part changes all the time.
                    format!("answer {{time {count}, ram {{sent {sent}}}, left {count}}}\n")
                }
                "bye\n" => return (count, changed_at.elapsed()),
                _ => String::new(),
            };
            peer.get_mut().write_all(answer.as_bytes()).unwrap();
        }
    });

    drop(guardian);

    let (count, still_for) = asked.join().unwrap();
    assert!(count > 6, "{count}");
    assert!(still_for >= quiet, "{still_for:?}");
}

#[test]
fn a_peer_that_never_answers_holds_a_guardian_only_so_long() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let guardian = Guardian::start(ours.as_fd()).unwrap();
    let steps = [Step::Ask {
        line: b"anybody?\n".to_vec(),
        answer: b"yes".to_vec(),
        limit: Duration::from_millis(100),
    }];
    guardian.replace_will(&Will::new(&steps)).unwrap();
    // Dropping the guardian waits until its process has ended.
    drop(guardian);
}

/// Answers each line with `answer`; returns the lines once the guardian has closed its end.
fn asked_of(
    theirs: UnixStream,
    answer: impl Fn(&str) -> String + Send + 'static,
) -> JoinHandle<Vec<String>> {
    std::thread::spawn(move || {
        let mut peer = BufReader::new(theirs);
        let mut lines = Vec::new();
        loop {
            let line = next_line(&mut peer);
            match line.as_str() {
                "" => return lines,
                "\u{1}\n" => continue,
                line => peer.get_mut().write_all(answer(line).as_bytes()).unwrap(),
            }
            lines.push(line);
        }
    })
}

#[test]
fn after_a_condition_that_does_not_hold_only_files_are_removed() {
    for (owner, expected) in [("me", &["owner?\n", "bye\n"][..]), ("another", &["owner?\n"])] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(LIMIT)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (always, last) = (directory.path().join("always"), directory.path().join("last"));
        for path in [&always, &last] {
            std::fs::write(path, b"").unwrap();
        }
        let path = |path: &Path| CString::new(path.as_os_str().as_bytes()).unwrap();
        let question = || (b"owner?\n".to_vec(), b"owner".to_vec(), vec![b"me".to_vec()]);
        let (line, answer, words) = question();
        let condition = Step::OnlyIf { line, answer, words, limit: LIMIT };
        let steps =
            [condition, ask("bye"), Step::RemoveIfLast(path(&last)), Step::Remove(path(&always))];
        let guardian = Guardian::start(ours.as_fd()).unwrap();
        guardian.replace_will(&Will::new(&steps)).unwrap();
        drop(ours);
        let asked = asked_of(theirs, move |line| match line {
            "owner?\n" => format!("owner {owner}\n"),
            _ => "bye\n".to_owned(),
        });

        drop(guardian);

        assert_eq!(asked.join().unwrap(), expected, "{owner}");
        assert!(!always.exists() && last.exists(), "{owner}");
    }
}

/// The parent may be killed right before a file gets its name, or right after.
#[test]
fn steps_that_a_name_makes_needless_are_left_out() {
    for is_named in [false, true] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(LIMIT)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (draft, name) = (directory.path().join("draft"), directory.path().join("name"));
        std::fs::write(&draft, b"new").unwrap();
        // Another file has this name already.
        std::fs::write(&name, b"old").unwrap();
        let file = std::fs::metadata(&draft).unwrap();
        let path = CString::new(name.as_os_str().as_bytes()).unwrap();
        let (device, inode) = (file.dev(), file.ino());
        let steps = vec![ask("merge"), ask("tidy")];
        let steps = [Step::UnlessNamed { path, device, inode, steps }, ask("bye")];
        let guardian = Guardian::start(ours.as_fd()).unwrap();
        guardian.replace_will(&Will::new(&steps)).unwrap();
        drop(ours);
        if is_named {
            std::fs::rename(&draft, &name).unwrap();
        }
        let asked = asked_of(theirs, str::to_owned);

        drop(guardian);

        let expected = if is_named { &["bye\n"][..] } else { &["merge\n", "tidy\n", "bye\n"] };
        assert_eq!(asked.join().unwrap(), expected, "{is_named}");
    }
}
