//! Network back ends, which only QEMU's human monitor lists (7.2 to 11.1).

use serde_json::{Map, Value, json};

use super::difference::{Difference, Remedy};
use super::parts::Device;
use super::questions::{OptionsOrReason, back_end, human_command};
use crate::command_line::CommandLine;
use crate::vm::{Vm, VmError};

impl Vm {
    /// Tells whether the VM has a network back end of the type `user`.
    ///
    /// # Errors
    ///
    /// [`VmError`] if QEMU does not answer.
    pub fn has_user_network(&mut self) -> Result<bool, VmError> {
        Ok(human_command(self, "info network")?.contains(",type=user,"))
    }
}

/// Names the network back end of a network card in `object`; returns the options that make it.
pub(super) fn netdev(
    vm: &mut Vm,
    device: &Device,
    object: &mut Map<String, Value>,
    line: &CommandLine,
) -> Result<OptionsOrReason, VmError> {
    let Some(name) = back_end(vm, device, "netdev")? else { return Ok(Ok(Vec::new())) };
    object.insert("netdev".to_owned(), json!(name));
    if line.defines(&name) {
        return Ok(Ok(Vec::new()));
    }
    let network = human_command(vm, "info network")?;
    option(vm, &network, &name)
}

/// Adds the netdevs that were added later and that no device uses. They are in the migration stream
/// all the same: QEMU (7.2 to 11.1) refuses a stream with the state of a netdev that it lacks.
pub(super) fn unused(
    vm: &mut Vm,
    line: &CommandLine,
    found: &mut Vec<Difference>,
) -> Result<(), VmError> {
    let network = human_command(vm, "info network")?;
    for name in lone_netdevs(&network) {
        if line.defines(name) {
            continue;
        }
        let remedy = match option(vm, &network, name)? {
            Ok(options) => Remedy::add(options),
            Err(reason) => Remedy::Missing(reason),
        };
        found.push(Difference::new(format!("netdev {name}"), "added later", "absent", remedy));
    }
    Ok(())
}

/// Returns the option that makes a netdev.
fn option(vm: &mut Vm, network: &str, name: &str) -> Result<OptionsOrReason, VmError> {
    if !is_plain_user_net(network, name) {
        return Ok(Err(format!("QEMU does not tell the options of its netdev {name}")));
    }
    if human_command(vm, "info usernet")?.contains("HOST_FORWARD") {
        return Ok(Err(format!("its netdev {name} may forward ports, which QEMU does not tell")));
    }
    Ok(Ok(vec![("-netdev".to_owned(), format!("user,id={name}"))]))
}

/// Returns the names of the netdevs that stand alone in the output of `info network`: neither below
/// a card, nor in a hub, which `-net` makes and which is not followed.
fn lone_netdevs(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let (name, rest) = line.trim_end().split_once(": index=")?;
        let is_lone = !name.starts_with([' ', '\\', '#']) && !rest.contains("type=nic");
        is_lone.then_some(name)
    })
}

/// Tells whether `info network` shows a netdev as one of `-netdev user` without further options.
fn is_plain_user_net(text: &str, name: &str) -> bool {
    let names = |line: &&str| line.trim_start().trim_start_matches("\\ ").starts_with(name);
    let plain = "index=0,type=user,net=10.0.2.0,restrict=off";
    text.lines().filter(names).any(|line| line.trim_end().ends_with(&format!("{name}: {plain}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_user_net_without_options_is_made_again() {
        // From QEMU 10.0.2.
        let text = "nic1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\r\n \
            \\ nd1: index=0,type=user,net=10.0.2.0,restrict=off\r\n \
            \\ nd2: index=0,type=user,net=10.0.2.0,restrict=on\r\n";
        assert!(is_plain_user_net(text, "nd1"));
        assert!(!is_plain_user_net(text, "nd2"));
        assert!(!is_plain_user_net(text, "nic1"));
    }

    #[test]
    fn a_netdev_without_a_card_is_found() {
        // From QEMU 10.0.2: a hub of `-net nic -net user`, a card with a netdev, and a netdev
        // alone.
        let text = "hub 0\r\n \\ hub0port1: #net066: index=0,type=user,net=10.0.2.0,restrict=off\r\n \
            \\ hub0port0: e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\r\n\
            nic1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\r\n \
            \\ nd1: index=0,type=user,net=10.0.2.0,restrict=off\r\n\
            nd2: index=0,type=user,net=10.0.2.0,restrict=on\r\n";
        assert_eq!(lone_netdevs(text).collect::<Vec<_>>(), ["nd2"]);
    }
}
