//! `vmfile list`.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::failure::Failure;
use crate::output::{Printer, one_line, size};

pub(crate) fn run(printer: &Printer) -> Result<ExitCode, Failure> {
    let vms = vmfile::list::list().map_err(|error| Failure::from(&error))?;
    printer.answer(&vms, |vms| {
        if vms.is_empty() {
            return "no VM runs on this host\n".to_owned();
        }
        let mut text = format!(
            "{:>8}  {:<20} {:>9}  {:<20} {:<21} QMP\n",
            "PID", "NAME", "RAM", "BACKING", "ROUTES"
        );
        for vm in vms {
            let path = |path: &PathBuf| one_line(&path.display().to_string());
            let qmp = vm.qmp.as_ref().map_or("-".to_owned(), path);
            let routes = if vm.routes.is_empty() { "-".to_owned() } else { vm.routes.join(",") };
            text.push_str(&format!(
                "{:>8}  {:<20} {:>9}  {:<20} {:<21} {qmp}\n",
                vm.pid,
                one_line(vm.name.as_deref().unwrap_or("-")),
                vm.ram_bytes.map_or("-".to_owned(), size::bytes),
                if vm.backing.is_empty() { "-".to_owned() } else { vm.backing.join(",") },
                routes,
            ));
            for words in vm.reason.iter().chain(&vm.note) {
                text.push_str(&format!("{:>8}  {}\n", "", one_line(words)));
            }
        }
        text
    })?;
    Ok(ExitCode::SUCCESS)
}
