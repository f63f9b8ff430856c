//! If a save comes to a limit of the host, the VM runs on as before.

use vmfile_testing::{Case, ControlGroup, Qemu, Random, Release, TestResult, cases, requires};

use crate::run::{Said, program};
use crate::trial::{Trial, WAYS};

/// The kernel kills a process that has no memory left: vmfile, its guardian, or both.
#[test]
fn a_save_that_is_killed_because_memory_runs_out_harms_nobody() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut trial = Trial::begin(&qemu, Random::new(0))?;
    for way in ["--route direct", "--route stream", "--live"] {
        let words: Vec<&str> = way.split(' ').collect();
        let way = WAYS.iter().position(|way| *way == words).ok_or("a way")?;
        let mut killed = 0;
        for mib in [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192] {
            let group = requires!(ControlGroup::with_memory(mib));
            let what = format!("{words:?} with {mib} MiB");
            let file = trial.directory.path().join("vm.vmf");
            let mut code = None;
            trial.end_a_save((&what, way, &file), |trial| {
                let mut command = group.command(program());
                let said = Said::from(command.args(trial.words(way, &file)).output()?);
                code = said.code;
                Ok((said, 0))
            })?;
            if code == Some(0) {
                println!("{words:?}: {killed} of the limits killed it, {mib} MiB are enough");
                break;
            }
            killed += u32::from(code.is_none());
            assert!(mib < 192, "{what} fails");
        }
    }
    cases(trial.ended, Case::Shortage);
    trial.next_save_is_right()
}
