//! Runs programs, and tells the user about it.

use std::error::Error;
use std::process::Command;

/// Prints one line about what xtask does next.
pub(crate) fn say(what: &str) {
    println!("xtask: {what}");
}

/// Runs a program to its end; the error names it, its arguments and its exit status.
pub(crate) fn run(command: &mut Command) -> Result<(), Box<dyn Error>> {
    let status = command.status().map_err(|error| format!("{}: {error}", shown(command)))?;
    if status.success() { Ok(()) } else { Err(format!("{}: {status}", shown(command)).into()) }
}

/// Runs a program and returns what it printed.
pub(crate) fn output(command: &mut Command) -> Result<String, Box<dyn Error>> {
    let output = command.output().map_err(|error| format!("{}: {error}", shown(command)))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}: {}\n{errors}", shown(command), output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Returns the command as text, as typed into a shell.
pub(crate) fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text += &argument.to_string_lossy();
    }
    text
}
