//! What QEMU's process has from those who started it: a restored VM has what the restoring vmfile has.

use std::collections::BTreeMap;

use vmfile_format::checksum;
use vmfile_format::manifest::SurroundingsMeta;
use vmfile_qemu::{ProcessInfo, Surroundings};

/// Where the kernel has the sessions of users who have logged in, by systemd's names: each login is another
/// group, and none has limits of its own.
const SESSIONS: &str = "/user.slice/";

/// Returns what a process has that this one has not; `None` if they have the same.
pub(crate) fn of_process(process: &ProcessInfo) -> Option<SurroundingsMeta> {
    let found = Surroundings::of(process.pid).besides(&Surroundings::own());
    (found != Surroundings::default()).then(|| SurroundingsMeta {
        control_group: found.control_group,
        network_namespace: found.network_namespace,
        limits: found
            .limits
            .into_iter()
            .map(|(name, limit)| (name, (limit != u64::MAX).then_some(limit)))
            .collect(),
        environment: digests(found.environment),
    })
}

/// Returns the names of variables with the checksums of their values, which may be secret.
fn digests(variables: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, String> {
    let digest = |value: Vec<u8>| format!("{:032x}", checksum(&value));
    variables.into_iter().map(|(name, value)| (name, digest(value))).collect()
}

/// Says what of this the restored VM has not.
pub(crate) fn lost(saved: &SurroundingsMeta) -> Vec<String> {
    compare(saved, Surroundings::own())
}

fn compare(saved: &SurroundingsMeta, own: Surroundings) -> Vec<String> {
    let mut lost = Vec::new();
    let is_session = |group: &str| group.starts_with(SESSIONS);
    match (&saved.control_group, &own.control_group) {
        (Some(group), Some(own)) if group != own && !(is_session(group) && is_session(own)) => {
            lost.push(format!("the VM ran in the control group {group}, and runs in {own} now"));
        }
        _ => {}
    }
    match (&saved.network_namespace, &own.network_namespace) {
        (Some(namespace), Some(own)) if namespace != own => lost.push(format!(
            "the VM ran in the network namespace {namespace}, and runs in {own} now"
        )),
        _ => {}
    }
    let lower = saved.limits.iter().filter_map(|(name, limit)| {
        let (was, is) = (limit.unwrap_or(u64::MAX), *own.limits.get(name)?);
        let was_text = limit.map_or("unlimited".to_owned(), |limit| limit.to_string());
        (is < was).then(|| format!("{name} {is} (it was {was_text})"))
    });
    let lower: Vec<String> = lower.collect();
    if !lower.is_empty() {
        lost.push(format!("the VM has lower limits than before: {}", lower.join(", ")));
    }
    let own = digests(own.environment);
    let known = saved.environment.iter().filter(|(name, _)| Surroundings::has_variable(name));
    let other = known.filter(|(name, value)| own.get(*name) != Some(*value));
    let other: Vec<&str> = other.map(|(name, _)| name.as_str()).collect();
    if !other.is_empty() {
        let names = other.join(", ");
        lost.push(format!("the VM had other values of {names} in its environment than vmfile has"));
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_worse_than_before_is_said() {
        let mut own = Surroundings::own();
        own.control_group = Some("/user.slice/session-1.scope".into());
        own.network_namespace = Some("net:[1]".into());
        own.limits = [("Max open files".into(), 1024), ("Max locked memory".into(), 9)].into();
        own.environment = [("TZ".into(), b"UTC".to_vec())].into();
        let text = |text: &str| Some(text.to_owned());
        let mut saved = SurroundingsMeta {
            control_group: text("/user.slice/session-2.scope"),
            network_namespace: text("net:[1]"),
            limits: [("Max open files".into(), Some(100)), ("Max processes".into(), None)].into(),
            environment: digests([("TZ".into(), b"UTC".to_vec())].into()),
        };
        assert_eq!(compare(&saved, own.clone()), [""; 0]);
        saved.control_group = text("/machine.slice/vm.scope");
        saved.network_namespace = text("net:[2]");
        saved.limits =
            [("Max open files".into(), Some(4096)), ("Max locked memory".into(), None)].into();
        saved.environment = digests([("TZ".into(), b"CET".to_vec())].into());
        assert_eq!(
            compare(&saved, own),
            [
                "the VM ran in the control group /machine.slice/vm.scope, and runs in \
                 /user.slice/session-1.scope now",
                "the VM ran in the network namespace net:[2], and runs in net:[1] now",
                "the VM has lower limits than before: Max locked memory 9 (it was unlimited), Max \
                 open files 1024 (it was 4096)",
                "the VM had other values of TZ in its environment than vmfile has",
            ]
        );
    }
}
