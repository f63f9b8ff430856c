//! Who writes to the guest's RAM besides QEMU's own process, whose writes the kernel can hold up.

use serde_json::json;

use super::blockers::{DEVICE_CONTAINERS, typed_children};
use super::{Vm, VmError};

/// The beginnings of device types, and of types of network back ends, whose RAM another process or
/// the hardware writes.
const OTHERS: [&str; 2] = ["vhost-user", "vhost-vdpa"];

impl Vm {
    /// Names a device whose back end is another process (vhost-user) or hardware (vhost-vdpa), and
    /// writes to the guest's RAM by mappings of its own: no userfaultfd of QEMU's stops it.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn other_writer(&mut self) -> Result<Option<String>, VmError> {
        for container in DEVICE_CONTAINERS {
            let devices = self.execute("qom-list", json!({"path": container}))?;
            let mut devices = typed_children(&devices);
            let other =
                devices.find(|(_, kind)| OTHERS.iter().any(|other| kind.starts_with(other)));
            if let Some((name, kind)) = other {
                return Ok(Some(format!("device {name} ({kind})")));
            }
        }
        // The network device is an ordinary one, and no command of QMP lists the back ends.
        let arguments = json!({"command-line": "info network"});
        let network = self.execute("human-monitor-command", arguments)?;
        Ok(network_back_end(network.as_str().unwrap_or_default())
            .map(|kind| format!("a network back end ({kind})")))
    }
}

/// Finds such a back end in the text of `info network`.
fn network_back_end(text: &str) -> Option<&'static str> {
    OTHERS.into_iter().find(|kind| text.contains(&format!("type={kind}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_back_end_in_another_process_is_seen() {
        // From QEMU 10.0.2.
        let user = "n0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n \\ \
                    u0: index=0,type=user,net=10.0.2.0,restrict=off\n";
        assert_eq!(network_back_end(user), None);
        let other = "n0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n \\ \
                     u0: index=0,type=vhost-user,vhost-user0 to c0\n";
        assert_eq!(network_back_end(other), Some("vhost-user"));
    }
}
