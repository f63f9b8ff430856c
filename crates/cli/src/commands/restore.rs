//! `vmfile restore`.

use std::process::ExitCode;

use vmfile::restore::{Destination, Mode, RestoreOptions};
use vmfile::{Control, RestoreError};

use crate::args::{RestoreArguments, RestoreMode};
use crate::exit_code::Code;
use crate::failure::Failure;
use crate::output::progress::Meter;
use crate::output::{Voice, human};
use crate::signals::Signals;

pub(crate) fn run(arguments: &RestoreArguments, voice: &Voice) -> Result<ExitCode, Failure> {
    let signals = Signals::listen().map_err(|error| Failure::system("signals", &error))?;
    let snapshot = super::open(&arguments.file)?;
    let destination = match &arguments.qmp {
        Some(socket) => {
            let vm = vmfile::Vm::connect(socket);
            let vm = vm.map_err(|error| Failure::new(Code::Vm, "no_such_vm", &error))?;
            Destination::Waiting(vm)
        }
        None if arguments.command.is_empty() => Destination::Saved,
        None => Destination::Command(arguments.command.clone()),
    };
    let options = RestoreOptions {
        mode: match arguments.mode {
            RestoreMode::Auto => Mode::Auto,
            RestoreMode::Map => Mode::Map,
            RestoreMode::Load => Mode::Load,
        },
        direct_io: arguments.engine.direct_io(),
        io: arguments.engine.io(),
        jobs: arguments.engine.jobs(),
        paused: arguments.paused,
        foreground: arguments.foreground,
    };
    let meter = Meter::new("restore", voice.progress, &signals.asked);
    let show = |progress| meter.show(progress);
    let control = Control::new(&signals.stop, &show);
    let result = vmfile::restore::restore(&snapshot, destination, &options, &control);
    drop(meter);
    let restored = result.map_err(|error| match error {
        RestoreError::Stopped => Failure { code: signals.code(), ..Failure::from(&error) },
        error => Failure::from(&error),
    })?;
    voice.answer(&restored.report, human::restore)?;
    match restored.qemu {
        Some(qemu) if arguments.foreground => {
            let status = qemu.wait().map_err(|error| Failure::system("wait for QEMU", &error))?;
            Ok(status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .map_or(ExitCode::FAILURE, ExitCode::from))
        }
        Some(qemu) => {
            drop(qemu.detach());
            Ok(ExitCode::SUCCESS)
        }
        None => Ok(ExitCode::SUCCESS),
    }
}
