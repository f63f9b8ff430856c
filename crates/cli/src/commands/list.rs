//! `vmfile list`.

use std::process::ExitCode;

use crate::failure::Failure;
use crate::output::{Voice, size};

pub(crate) fn run(voice: &Voice) -> Result<ExitCode, Failure> {
    let vms = vmfile::list::list().map_err(|error| Failure::from(&error))?;
    voice.answer(&vms, |vms| {
        if vms.is_empty() {
            return "no VM runs on this host\n".to_owned();
        }
        let mut text = format!(
            "{:>8}  {:<20} {:>9}  {:<20} {:<21} QMP\n",
            "PID", "NAME", "RAM", "BACKING", "ROUTES"
        );
        for vm in vms {
            let qmp = vm.qmp.as_ref().map_or("-".to_owned(), |path| path.display().to_string());
            let routes = if vm.routes.is_empty() { "-".to_owned() } else { vm.routes.join(",") };
            text.push_str(&format!(
                "{:>8}  {:<20} {:>9}  {:<20} {:<21} {qmp}\n",
                vm.pid,
                vm.name.as_deref().unwrap_or("-"),
                vm.ram_bytes.map_or("-".to_owned(), size::bytes),
                if vm.backing.is_empty() { "-".to_owned() } else { vm.backing.join(",") },
                routes,
            ));
            for words in vm.reason.iter().chain(&vm.note) {
                text.push_str(&format!("{:>8}  {words}\n", ""));
            }
        }
        text
    })?;
    Ok(ExitCode::SUCCESS)
}
