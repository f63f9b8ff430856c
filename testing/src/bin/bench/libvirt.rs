//! `virsh save`, by a libvirt of our own: a daemon in a mount namespace, with one domain.
//!
//! The host's libvirt, if one runs, is neither asked nor changed: the daemon has its own directories
//! and its own socket, and its domain is transient.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmfile_testing::{GuestConfig, Qemu, TestResult};

const DOMAIN: &str = "vmfile-bench";

/// The daemon's socket, in its directory.
const SOCKET: &str = "sockets/libvirt-sock";

/// Filling gigabytes under emulation takes its time.
const PATIENCE: Duration = Duration::from_secs(180);

/// QEMU runs as the user who measures, so that it may read the guest's kernel.
const QEMU_CONF: &str = "\
user = \"root\"
group = \"root\"
security_driver = \"none\"
stdio_handler = \"file\"
remember_owner = 0
cgroup_controllers = []
namespaces = []
";

/// The directories that libvirt has compiled in, each replaced by one of ours.
const DIRECTORIES: [&str; 5] =
    ["/etc/libvirt", "/run/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt"];

/// A way of `virsh save`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    BypassCache,
    /// mapped-ram, two channels, direct I/O.
    Sparse,
}

impl Way {
    pub(crate) const ALL: [Way; 2] = [Way::BypassCache, Way::Sparse];

    pub(crate) fn name(self) -> String {
        format!("`virsh save {}`", self.options().join(" "))
    }

    fn options(self) -> &'static [&'static str] {
        match self {
            Way::BypassCache => &["--bypass-cache"],
            Way::Sparse => {
                &["--bypass-cache", "--image-format", "sparse", "--parallel-channels", "2"]
            }
        }
    }
}

/// A daemon and its domain, whose guest is at rest. Dropping it ends both.
#[derive(Debug)]
pub(crate) struct Libvirt {
    daemon: Child,
    directory: TempDir,
}

impl Libvirt {
    /// Says whether libvirt is here at all.
    pub(crate) fn is_here() -> bool {
        let runs = |program| Command::new(program).arg("--version").output().is_ok();
        runs("virsh") && runs("libvirtd")
    }

    /// Starts a daemon, and in it a guest like that of `config`, with shared RAM; waits until the
    /// guest has filled its memory, and pauses it.
    pub(crate) fn start(config: &GuestConfig, qemu: &Qemu, ram_mib: u64) -> TestResult<Libvirt> {
        let directory = tempfile::Builder::new().prefix("vmf-libvirt-").tempdir()?;
        let daemon = start_daemon(directory.path())?;
        let libvirt = Libvirt { daemon, directory };
        let root = libvirt.directory.path();
        let socket = root.join(SOCKET);
        wait_for("libvirtd", || socket.exists())?;
        let (xml, serial) = (root.join("domain.xml"), root.join("serial"));
        fs::write(&xml, domain(config, qemu, ram_mib, &serial)?)?;
        libvirt.virsh(&[OsStr::new("create"), xml.as_os_str()])?;
        let has_counted = || fs::read_to_string(&serial).unwrap_or_default().contains("count 1 ");
        wait_for("libvirt's guest", has_counted)?;
        libvirt.virsh(&["suspend", DOMAIN].map(OsStr::new))?;
        Ok(libvirt)
    }

    /// Saves the paused domain to `file`, durably; returns the seconds. It is restored and paused
    /// afterwards.
    pub(crate) fn save(&self, way: Way, file: &Path) -> TestResult<f64> {
        let mut words: Vec<OsString> = ["save".into(), DOMAIN.into(), file.into()].into();
        words.extend(way.options().iter().map(Into::into));
        let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
        let started = Instant::now();
        self.virsh(&words)?;
        File::open(file)?.sync_all()?;
        let seconds = started.elapsed().as_secs_f64();
        self.virsh(&["restore".as_ref(), file.as_os_str(), "--paused".as_ref()])?;
        Ok(seconds)
    }

    fn virsh(&self, words: &[&OsStr]) -> TestResult {
        let socket = self.directory.path().join(SOCKET);
        let uri = format!("qemu:///system?socket={}", socket.display());
        let output = Command::new("virsh").args(["-q", "-c", &uri]).args(words).output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(format!("virsh {}: {said}", words[0].to_string_lossy()).into())
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // The domain would outlive its daemon.
        let _ = self.virsh(&["destroy", DOMAIN].map(OsStr::new));
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Starts a daemon that sees directories in `root` in place of the host's.
fn start_daemon(root: &Path) -> TestResult<Child> {
    let mut script = String::new();
    for (index, name) in DIRECTORIES.iter().enumerate() {
        let ours = root.join(index.to_string());
        fs::create_dir(&ours)?;
        script += &format!("mkdir -p {name} && mount --bind {} {name} && ", ours.display());
    }
    fs::create_dir(root.join("sockets"))?;
    fs::write(root.join("0/qemu.conf"), QEMU_CONF)?;
    let sockets = root.join("sockets");
    let conf = format!(
        "unix_sock_dir = \"{}\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n",
        sockets.display()
    );
    fs::write(root.join("0/libvirtd.conf"), conf)?;
    let pid = root.join("pid");
    script += &format!("exec libvirtd -f /etc/libvirt/libvirtd.conf -p {}", pid.display());
    let log = File::options().create_new(true).append(true).open(root.join("log"))?;
    let mut unshare = Command::new("unshare");
    unshare.args(["-m", "sh", "-c", &script]).stdin(Stdio::null());
    Ok(unshare.stdout(log.try_clone()?).stderr(log).spawn()?)
}

fn domain(config: &GuestConfig, qemu: &Qemu, ram_mib: u64, serial: &Path) -> TestResult<String> {
    let line = config.prepare(qemu)?.command_line();
    let after = |name: &str| {
        let at = line.iter().position(|word| word == name).ok_or("no Linux guest")?;
        TestResult::Ok(line[at + 1].to_string_lossy().into_owned())
    };
    let (kernel, initrd, append) = (after("-kernel")?, after("-initrd")?, after("-append")?);
    let emulator = find(qemu.program())?;
    let serial = serial.display();
    Ok(format!(
        "<domain type='qemu'><name>{DOMAIN}</name><memory unit='MiB'>{ram_mib}</memory>\
         <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\
         <vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type>\
         <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{append}</cmdline></os>\
         <devices><emulator>{emulator}</emulator><serial type='file'><source path='{serial}'/>\
         </serial><memballoon model='none'/><controller type='usb' model='none'/></devices>\
         </domain>"
    ))
}

/// Returns the program's absolute path: libvirt does not search.
fn find(program: &Path) -> TestResult<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path);
    let mut found =
        directories.map(|directory| directory.join(program)).filter(|path| path.is_file());
    Ok(found.next().ok_or("QEMU is not in PATH")?.display().to_string())
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) -> TestResult {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        if Instant::now() > deadline {
            return Err(format!("{what} is not ready in {} s", PATIENCE.as_secs()).into());
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
