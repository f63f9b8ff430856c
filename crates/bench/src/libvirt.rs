//! `virsh save` and `virsh restore`, with a libvirt daemon of the benchmark's own in a mount
//! namespace, and one domain.
//!
//! This does not touch the host's libvirt: the daemon has its own directories and its own socket,
//! and its domain is transient. It needs root.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmfile_engine::ProcessMemory;

use crate::contents::write;
use crate::error::BenchError;
use crate::guest::Machine;
use crate::options::Contents;
use crate::process;

const DOMAIN: &str = "vmfile-bench";

/// The daemon's socket, in its directory.
const SOCKET: &str = "sockets/libvirt-sock";

/// How long the daemon may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// QEMU runs as root, like the daemon, and libvirt changes nothing else on the host.
const QEMU_CONF: &str = "\
user = \"root\"
group = \"root\"
security_driver = \"none\"
stdio_handler = \"file\"
remember_owner = 0
cgroup_controllers = []
namespaces = []
";

/// The directories whose paths are compiled into libvirt; each is replaced by one of the
/// benchmark's.
const DIRECTORIES: [&str; 5] =
    ["/etc/libvirt", "/run/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt"];

/// A way of `virsh save`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VirshWay {
    Plain,
    BypassCache,
    /// mapped-ram, two channels, direct I/O: needs libvirt 11.2.
    Sparse,
}

impl VirshWay {
    pub(crate) const ALL: [VirshWay; 3] =
        [VirshWay::Plain, VirshWay::BypassCache, VirshWay::Sparse];

    pub(crate) fn name(self) -> String {
        let name = match self {
            VirshWay::Plain => "virsh save",
            VirshWay::BypassCache => "virsh save --bypass-cache",
            VirshWay::Sparse => "virsh save, sparse, 2 channels",
        };
        name.to_owned()
    }

    pub(crate) fn short(self) -> String {
        let short = match self {
            VirshWay::Plain => "virsh",
            VirshWay::BypassCache => "virsh bypass",
            VirshWay::Sparse => "virsh sparse",
        };
        short.to_owned()
    }

    /// Returns a name for its file.
    pub(crate) fn file_name(self) -> &'static str {
        match self {
            VirshWay::Plain => "virsh-plain",
            VirshWay::BypassCache => "virsh-bypass",
            VirshWay::Sparse => "virsh-sparse",
        }
    }

    fn options(self) -> &'static [&'static str] {
        match self {
            VirshWay::Plain => &[],
            VirshWay::BypassCache => &["--bypass-cache"],
            VirshWay::Sparse => {
                &["--bypass-cache", "--image-format", "sparse", "--parallel-channels", "2"]
            }
        }
    }

    fn restore_options(self) -> &'static [&'static str] {
        match self {
            VirshWay::Plain => &["--paused"],
            VirshWay::BypassCache => &["--bypass-cache", "--paused"],
            VirshWay::Sparse => &["--bypass-cache", "--parallel-channels", "2", "--paused"],
        }
    }
}

/// A daemon and its paused domain. Dropping it ends both.
#[derive(Debug)]
pub(crate) struct Libvirt {
    daemon: Child,
    directory: TempDir,
}

impl Libvirt {
    /// Starts a daemon, and in it a guest like `machine`, with shared RAM; fills its RAM.
    pub(crate) fn start(
        machine: &Machine,
        contents: Contents,
        stop: &AtomicBool,
    ) -> Result<Libvirt, BenchError> {
        let made = tempfile::Builder::new().prefix("vmfile-libvirt-").tempdir();
        let directory = made.map_err(BenchError::system("make a directory for libvirt"))?;
        let daemon = start_daemon(directory.path())?;
        let mut libvirt = Libvirt { daemon, directory };
        libvirt.wait_for_daemon()?;
        let root = libvirt.directory.path();
        let xml = root.join("domain.xml");
        let written = domain(machine).and_then(|text| {
            fs::write(&xml, text).map_err(BenchError::system("write the domain's XML"))
        });
        written?;
        libvirt.virsh(&["create".as_ref(), xml.as_os_str()], stop)?;
        // Meanwhile the firmware finds nothing to boot and becomes idle.
        thread::sleep(Duration::from_millis(500));
        libvirt.virsh(&["suspend", DOMAIN].map(OsStr::new), stop)?;
        libvirt.fill(machine.ram_bytes, contents, stop)?;
        Ok(libvirt)
    }

    fn wait_for_daemon(&mut self) -> Result<(), BenchError> {
        let deadline = Instant::now() + START_TIMEOUT;
        let is_up = |libvirt: &Libvirt| libvirt.virsh(&["list".as_ref()], &NEVER).is_ok();
        while !is_up(self) {
            if self.daemon.try_wait().ok().flatten().is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(self.directory.path().join("log"));
                let log = log.unwrap_or_default();
                let last = log.lines().rfind(|line| line.contains("error")).unwrap_or_default();
                return Err(BenchError::program("libvirtd", format!("it does not start: {last}")));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Fills the domain's RAM, which is a memfd that its QEMU has mapped.
    fn fill(
        &self,
        ram_bytes: u64,
        contents: Contents,
        stop: &AtomicBool,
    ) -> Result<(), BenchError> {
        let system = |error| BenchError::system("look into the domain's QEMU")(error);
        let pid_file = self.directory.path().join(format!("1/qemu/{DOMAIN}.pid"));
        let pid = fs::read_to_string(pid_file).map_err(system)?;
        let pid = pid.trim().parse().map_err(|_| BenchError::program("libvirtd", "no pid"))?;
        let memory = ProcessMemory::open(pid).map_err(system)?;
        let mappings = memory.mappings().map_err(system)?;
        let ram = mappings.iter().find(|mapping| {
            mapping.has_file() && mapping.range.end - mapping.range.start >= ram_bytes
        });
        let ram = ram.ok_or_else(|| BenchError::program("libvirtd", "no memfd of the domain"))?;
        write(&memory, (ram.range.start, ram_bytes), contents, stop)
    }

    /// Saves the paused domain to `file`, durably; returns the seconds. Afterwards restores the
    /// domain, paused.
    pub(crate) fn save(
        &self,
        way: VirshWay,
        file: &Path,
        stop: &AtomicBool,
    ) -> Result<f64, BenchError> {
        let mut words: Vec<OsString> = ["save".into(), DOMAIN.into(), file.into()].into();
        words.extend(way.options().iter().map(Into::into));
        let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
        let started = Instant::now();
        self.virsh(&words, stop)?;
        let synced = File::open(file).and_then(|file| file.sync_all());
        synced.map_err(BenchError::system("sync the file"))?;
        let seconds = started.elapsed().as_secs_f64();
        self.restore(way, file, &NEVER)?;
        Ok(seconds)
    }

    /// Restores the domain, which must be gone, and leaves it paused; returns the seconds.
    pub(crate) fn restore(
        &self,
        way: VirshWay,
        file: &Path,
        stop: &AtomicBool,
    ) -> Result<f64, BenchError> {
        let mut words = vec!["restore".as_ref(), file.as_os_str()];
        words.extend(way.restore_options().iter().map(OsStr::new));
        let started = Instant::now();
        self.virsh(&words, stop)?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Ends the domain.
    pub(crate) fn destroy(&self) -> Result<(), BenchError> {
        self.virsh(&["destroy", DOMAIN].map(OsStr::new), &NEVER)
    }

    fn virsh(&self, words: &[&OsStr], stop: &AtomicBool) -> Result<(), BenchError> {
        let socket = self.directory.path().join(SOCKET);
        let uri = format!("qemu:///system?socket={}", socket.display());
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", &uri]).args(words);
        process::run(&mut command, stop).map(drop)
    }
}

/// A stop flag that is never set, for commands that must run even after the user stopped.
static NEVER: AtomicBool = AtomicBool::new(false);

impl Drop for Libvirt {
    fn drop(&mut self) {
        // The domain's QEMU outlives its daemon. If the daemon has ended already, kills QEMU
        // directly.
        if self.destroy().is_err() {
            let pid_file = self.directory.path().join(format!("1/qemu/{DOMAIN}.pid"));
            let pid = fs::read_to_string(pid_file).ok().and_then(|pid| pid.trim().parse().ok());
            // If this fails too, nothing else can be done.
            let _ = pid.map(process::end);
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Starts a daemon that sees directories in `root` in place of the host's.
fn start_daemon(root: &Path) -> Result<Child, BenchError> {
    let system = |error| BenchError::system("make libvirt's directories")(error);
    let mut script = String::new();
    for (index, name) in DIRECTORIES.iter().enumerate() {
        let ours = root.join(index.to_string());
        fs::create_dir(&ours).map_err(system)?;
        script += &format!("mkdir -p {name} && mount --bind {} {name} && ", ours.display());
    }
    let sockets = root.join("sockets");
    fs::create_dir(&sockets).map_err(system)?;
    fs::write(root.join("0/qemu.conf"), QEMU_CONF).map_err(system)?;
    let conf = format!(
        "unix_sock_dir = \"{}\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n",
        sockets.display()
    );
    fs::write(root.join("0/libvirtd.conf"), conf).map_err(system)?;
    let pid = root.join("pid");
    script += &format!("exec libvirtd -f /etc/libvirt/libvirtd.conf -p {}", pid.display());
    let log = File::create_new(root.join("log")).map_err(system)?;
    let mut unshare = Command::new("unshare");
    unshare.args(["-m", "sh", "-c", &script]).stdin(Stdio::null());
    // A signal to the process group, from `timeout` or a terminal, would end the daemon before its
    // domain.
    unshare.process_group(0);
    unshare.stdout(log.try_clone().map_err(system)?).stderr(log);
    unshare.spawn().map_err(BenchError::system("run unshare"))
}

fn domain(machine: &Machine) -> Result<String, BenchError> {
    let emulator = find(&machine.qemu)?;
    let kibibytes = machine.ram_bytes >> 10;
    Ok(format!(
        "<domain type='qemu'><name>{DOMAIN}</name><memory unit='KiB'>{kibibytes}</memory>\
         <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\
         <vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os>\
         <devices><emulator>{emulator}</emulator>\
         <memballoon model='none'/><controller type='usb' model='none'/></devices>\
         </domain>"
    ))
}

/// Returns the program's absolute path, because libvirt does not search `PATH`.
fn find(program: &Path) -> Result<String, BenchError> {
    let found = vmfile_qemu::find_program(program, std::env::var_os("PATH").as_ref());
    let found = found.ok_or_else(|| BenchError::program("QEMU", "it is not in PATH"))?;
    Ok(found.display().to_string())
}
