//! What can go wrong on a QMP connection.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::holders::Holders;

/// An error on a QMP connection, or QEMU's refusal of a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// Nothing listens there, or the path may not be used.
    #[error("connect to the QMP socket {path:?}")]
    Connect {
        /// The path as given.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket accepted us and then said nothing.
    ///
    /// QEMU's monitor serves one client at a time: a second one is accepted by the kernel and
    /// waits.
    #[error("no QMP greeting within {after:?}{}", because(*.is_stopped, .holders))]
    NoGreeting {
        /// How long was waited.
        after: Duration,
        /// Who uses the monitor.
        holders: Holders,
        /// Whether QEMU's process is stopped, by SIGSTOP or a debugger.
        is_stopped: bool,
    },
    /// The monitor is libvirt's own.
    #[error("libvirt owns the monitor {path:?}")]
    OfLibvirt {
        /// The path as given.
        path: PathBuf,
    },
    /// Others wait for the monitor already, as many as the kernel lets wait.
    #[error("no room at the monitor {path:?} within {after:?}{holders}")]
    NoRoom {
        /// The path as given.
        path: PathBuf,
        /// How long was waited.
        after: Duration,
        /// Who uses the monitor.
        holders: Holders,
    },
    /// The caller asked to stop.
    #[error("stopped {when}")]
    Stopped {
        /// What was waited for, or was to be done next.
        when: String,
        /// Whether QEMU has a command that it may run later.
        is_sent: bool,
    },
    /// Whatever listens there does not speak QMP.
    #[error("not a QMP monitor: {reason}")]
    NotQmp {
        /// What was wrong with its first words.
        reason: &'static str,
    },
    /// The connection ended, usually because QEMU did.
    #[error("the QMP connection ended during {during}: QEMU is gone, or has closed it")]
    Closed {
        /// The command that was waiting, or `greeting`, or `events`.
        during: String,
    },
    /// The kernel refused to send or receive.
    #[error("QMP connection during {during}")]
    Io {
        /// The command that was waiting, or `greeting`, or `events`.
        during: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// QEMU did not answer in time; the connection is still usable.
    #[error("no answer to {command} within {after:?}")]
    Timeout {
        /// The command without its arguments.
        command: String,
        /// How long was waited.
        after: Duration,
    },
    /// QEMU's process does not run, and so QEMU does not answer.
    #[error(
        "QEMU's process {pid} is stopped, by SIGSTOP or a debugger, and does not answer {during}"
    )]
    ProcessStopped {
        /// The process.
        pid: u32,
        /// The command.
        during: String,
    },
    /// QEMU answered with an error.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        /// The command without its arguments.
        command: String,
        /// QEMU's error class, e.g. `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        desc: String,
    },
    /// A line from QEMU is longer than we read.
    #[error("a QMP line of more than {limit} bytes during {during}")]
    LineTooLong {
        /// The limit in bytes.
        limit: usize,
        /// The command that was waiting, or `greeting`, or `events`.
        during: String,
    },
    /// A line from QEMU is not a JSON object.
    #[error("a QMP line during {during} is not a JSON object")]
    NotJson {
        /// The command that was waiting, or `events`.
        during: String,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// An answer lacks what the command promises.
    #[error("the answer to {command} has no {expected}")]
    Unexpected {
        /// The command without its arguments.
        command: String,
        /// What was looked for.
        expected: &'static str,
    },
}

/// What the user can do about a VM of libvirt's.
pub(crate) const LIBVIRT_HINT: &str = "`virsh save` saves it; or give the domain a second monitor, by \
    <qemu:commandline> with -qmp unix:PATH,server=on,wait=off";

impl QmpError {
    /// Returns what the user could try, where we know it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            QmpError::Connect { source, .. } => match source.kind() {
                io::ErrorKind::ConnectionRefused => {
                    Some("the socket file is left over from a QEMU that is gone")
                }
                io::ErrorKind::PermissionDenied => {
                    Some("run as the user who owns the VM, or as root")
                }
                _ => None,
            },
            QmpError::NoGreeting { is_stopped: true, .. } | QmpError::ProcessStopped { .. } => {
                Some("`kill -CONT` lets QEMU's process go on")
            }
            QmpError::NoGreeting { .. } | QmpError::NoRoom { .. } => Some(
                "another client may hold this monitor; give QEMU a second one with \
                 -qmp unix:PATH,server=on,wait=off",
            ),
            QmpError::OfLibvirt { .. } => Some(LIBVIRT_HINT),
            QmpError::NotQmp { .. } => {
                Some("name a QMP socket (-qmp), not a console or a human monitor (-monitor)")
            }
            _ => None,
        }
    }

    /// Tells whether QEMU understood the command and refused it.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self, QmpError::Refused { .. })
    }

    /// Tells whether the caller asked to stop, and that is why.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self, QmpError::Stopped { .. })
    }

    /// Tells whether QEMU has the command and may run it later: no answer came in time.
    #[must_use]
    pub fn may_run_later(&self) -> bool {
        matches!(
            self,
            QmpError::Timeout { .. }
                | QmpError::ProcessStopped { .. }
                | QmpError::Stopped { is_sent: true, .. }
        )
    }

    /// Tells whether the peer is gone, as it is when QEMU has exited.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        match self {
            QmpError::Closed { .. } => true,
            QmpError::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
            ),
            _ => false,
        }
    }
}

/// Says why no greeting came, as far as is known.
fn because(is_stopped: bool, holders: &Holders) -> String {
    if is_stopped { ": QEMU's process is stopped".to_owned() } else { holders.to_string() }
}

/// Makes the error for an answer of another shape than the command promises.
pub(crate) fn unexpected(command: &str, expected: &'static str) -> QmpError {
    QmpError::Unexpected { command: command.to_owned(), expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_monitor_hints_at_another_client() {
        let holders = Holders { serving: 1, waiting: 0 };
        let after = Duration::from_secs(5);
        let error = QmpError::NoGreeting { after, holders, is_stopped: false };
        let words = "no QMP greeting within 5s: another client holds this monitor";
        assert_eq!(error.to_string(), words);
        assert!(error.hint().is_some_and(|hint| hint.contains("another client")));
    }

    #[test]
    fn a_refusal_quotes_qemu_and_not_the_arguments() {
        let error = QmpError::Refused {
            command: "getfd".to_owned(),
            class: "GenericError".to_owned(),
            desc: "No file descriptor supplied via SCM_RIGHTS".to_owned(),
        };
        assert_eq!(
            error.to_string(),
            "QEMU refused getfd: No file descriptor supplied via SCM_RIGHTS"
        );
    }
}
