//! A second process: this test program again, with its role in an environment variable.

use std::env;
use std::ffi::c_void;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use rustix::fs::MemfdFlags;
use rustix::mm::MapFlags;
use vmfile_engine::{Access, Backing, Existing, ProcessMemory, Unpublished};

use crate::{guardian, mapped};

const ROLE: &str = "ENGINE_TEST_ROLE";
const ARGUMENT: &str = "ENGINE_TEST_ARGUMENT";
const MARK: &str = "child: ";

pub(crate) const PAGE: u64 = 4096;
/// The length of the child's shared memory, and its offset in the memfd.
pub(crate) const SHARED_LEN: u64 = 1 << 20;
pub(crate) const SHARED_OFFSET: u64 = 64 << 10;
pub(crate) const PRIVATE_LEN: u64 = 8 << 20;
/// The pages of its private memory that the child writes, each with its own number.
pub(crate) const PRIVATE_PAGES: [u64; 4] = [3, 4, 9, 2047];
pub(crate) const HUGE_LEN: u64 = 256 << 30;
/// The offsets in its 256 GiB at which the child writes a page.
pub(crate) const HUGE_TOUCHED: [u64; 2] = [100 << 30, HUGE_LEN - PAGE];

/// The user id of a user without rights, the same on every Linux.
pub(crate) const NOBODY: u32 = 65534;

/// Not a test: a child process runs this.
#[test]
fn a_child_plays_its_role_and_nothing_happens_without_one() {
    let Ok(role) = env::var(ROLE) else { return };
    let argument = env::var(ARGUMENT).unwrap();
    match role.as_str() {
        "memory" => memory(),
        "stranger" => say(match ProcessMemory::open(argument.parse().unwrap()) {
            Ok(_) => "opened".to_owned(),
            Err(error) => format!("{:?}", error.kind()),
        }),
        "self" => look_at_ourselves(),
        "writer" => {
            let path = Path::new(&argument);
            let file = Unpublished::create_beside(path, Existing::Refuse).unwrap();
            rustix::io::write(file.file(), b"half").unwrap();
            say("ready".to_owned());
            wait_for_the_end();
            drop(file);
        }
        "ward" => guardian::ward(Path::new(&argument)),
        _ => panic!("no role {role}"),
    }
}

fn memory() {
    let memfd = rustix::fs::memfd_create("the ram", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, SHARED_OFFSET + SHARED_LEN).unwrap();
    let shared = map(SHARED_LEN, MapFlags::SHARED, Some((memfd.as_fd(), SHARED_OFFSET)));
    let private = map(PRIVATE_LEN, MapFlags::PRIVATE, None);
    let huge = map(HUGE_LEN, MapFlags::PRIVATE | MapFlags::NORESERVE, None);
    fill(shared, 5 * PAGE, 0x55);
    for page in PRIVATE_PAGES {
        fill(private, page * PAGE, number(page));
    }
    for offset in HUGE_TOUCHED {
        fill(huge, offset, 0x77);
    }
    say(format!("{} {} {}", shared.addr(), private.addr(), huge.addr()));
    wait_for_the_end();
}

/// The byte with which the child fills the private page `page`.
pub(crate) fn number(page: u64) -> u8 {
    page.to_le_bytes()[0]
}

/// Maps memory in this process: a file from an offset on, or anonymous memory.
pub(crate) fn map(
    len: u64,
    flags: MapFlags,
    file: Option<(std::os::fd::BorrowedFd<'_>, u64)>,
) -> *mut c_void {
    let start = mapped::map(len, flags, file);
    let len = usize::try_from(len).unwrap();
    // With transparent huge pages, a write would touch more pages than the tests expect.
    // SAFETY: advice about a mapping that was just made.
    unsafe { rustix::mm::madvise(start, len, rustix::mm::Advice::LinuxNoHugepage) }.unwrap();
    start
}

fn fill(start: *mut c_void, offset: u64, byte: u8) {
    let page = start.cast::<u8>().wrapping_add(usize::try_from(offset).unwrap());
    // SAFETY: a page of a mapping of ours, which no reference points to.
    unsafe { page.write_bytes(byte, 4096) }
}

fn look_at_ourselves() {
    let memfd = rustix::fs::memfd_create("own", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, PAGE).unwrap();
    rustix::io::pwrite(&memfd, b"own bytes", 0).unwrap();
    let start = map(PAGE, MapFlags::SHARED, Some((memfd.as_fd(), 0))).addr() as u64;
    let links = File::open(format!("/proc/self/map_files/{start:x}-{:x}", start + PAGE));
    let memory = ProcessMemory::open(std::process::id()).unwrap();
    let backing = memory.backing(start..start + PAGE, Access::ReadWrite).unwrap();
    let Backing::Shared { file } = backing else { panic!("{backing:?}") };
    let mut bytes = [0; 9];
    rustix::io::pread(&file.file, &mut bytes, file.offset).unwrap();
    assert_eq!(&bytes, b"own bytes");
    say(format!("{}", links.is_err()));
}

pub(crate) fn say(words: String) {
    println!("\n{MARK}{words}");
}

pub(crate) fn wait_for_the_end() {
    let _ = io::stdin().read_to_end(&mut Vec::new());
}

/// A child process in a role; dropping this kills it.
pub(crate) struct Playing {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Playing {
    pub(crate) fn start(role: &str, argument: &str, user: Option<u32>) -> io::Result<Playing> {
        let mut command = Command::new(env::current_exe()?);
        command
            .args(["--exact", "child::a_child_plays_its_role_and_nothing_happens_without_one"])
            .args(["--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .env(ARGUMENT, argument)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        let mut child = command.spawn()?;
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Ok(Playing { child, stdout })
    }

    /// Returns the next message of the child.
    pub(crate) fn words(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            let len = self.stdout.read_line(&mut line).unwrap();
            assert_ne!(len, 0, "the child ended without a word");
            if let Some(words) = line.trim().strip_prefix(MARK) {
                return words.to_owned();
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Closes the child's standard input and waits for its end.
    pub(crate) fn let_end(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Playing {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
