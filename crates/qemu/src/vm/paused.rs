//! A VM whose guest is stopped: queries its state after the stop, and resumes it at the end.

use std::time::{Duration, Instant};

use super::{PUT_BACK_TIMEOUT, RamBlockInfo, RunState, Vm, VmError};

/// A VM whose guest was stopped.
///
/// Its values were queried after the guest was stopped, and hold while the guest stays stopped;
/// [`Paused::verify`] finds out whether another client of QEMU resumed the guest or changed its RAM
/// blocks meanwhile. Dropping this resumes a guest that ran before, but reports no error: use
/// [`Paused::resume`], which does, or [`Paused::leave`].
#[derive(Debug)]
pub struct Paused<'vm> {
    vm: &'vm mut Vm,
    ran: bool,
    state: RunState,
    blocks: Vec<RamBlockInfo>,
    stopped_at: Instant,
    /// How many `RESUME` events QEMU had sent when the guest was stopped.
    resumes: u32,
    is_over: bool,
}

impl Vm {
    /// Stops the guest, and queries its state and RAM blocks. Its disks are drained when this
    /// returns.
    ///
    /// # Errors
    ///
    /// QEMU's error; the guest is then resumed, if it ran. [`VmError::LeftPaused`] if that fails
    /// too.
    pub fn pause(&mut self) -> Result<Paused<'_>, VmError> {
        let before = self.run_state()?;
        let ran = self.runs_or_sleeps(&before)?;
        let stopped_at = Instant::now();
        let mut paused = Paused {
            vm: self,
            ran,
            state: before,
            blocks: Vec::new(),
            stopped_at,
            resumes: 0,
            is_over: false,
        };
        match paused.stop() {
            Ok(()) => Ok(paused),
            Err(error) => match paused.resume() {
                Ok(()) => Err(error),
                // If QEMU has ended, no VM is left paused.
                Err(source) if source.is_closed() => Err(error),
                Err(source) => {
                    Err(VmError::LeftPaused { cause: Box::new(error), source: Box::new(source) })
                }
            },
        }
    }

    /// As [`Vm::resume_and_check`], if a migration has stopped the guest.
    fn resume_after_migration(&mut self) -> Result<(), VmError> {
        self.settle(Instant::now() + PUT_BACK_TIMEOUT)?;
        match self.run_state()? {
            RunState::PostMigrate | RunState::FinishMigrate => self.resume_and_check(),
            _ => Ok(()),
        }
    }
}

impl Paused<'_> {
    fn stop(&mut self) -> Result<(), VmError> {
        if self.ran {
            self.vm.stop()?;
        }
        self.resumes = self.vm.qmp.resumes();
        self.state = self.vm.run_state()?;
        // If the guest stopped by itself just before, because of a disk error or a panic, QEMU
        // reports another state: this pause did not stop it, and must not resume it.
        self.ran = self.ran && self.state == RunState::Paused;
        self.blocks = self.vm.ram_blocks()?;
        Ok(())
    }

    /// Returns the VM, for commands that leave the guest stopped.
    pub fn vm(&mut self) -> &mut Vm {
        self.vm
    }

    /// Tells whether the guest ran, or slept, until it was stopped by this pause.
    #[must_use]
    pub fn ran(&self) -> bool {
        self.ran
    }

    /// Returns the run state that QEMU reported after the stop.
    #[must_use]
    pub fn state(&self) -> &RunState {
        &self.state
    }

    /// Returns the RAM blocks that a save contains, as QEMU reported them after the stop.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlockInfo] {
        &self.blocks
    }

    /// Returns when the guest was told to stop.
    #[must_use]
    pub fn stopped_at(&self) -> Instant {
        self.stopped_at
    }

    /// Checks that the guest was not resumed since the stop, and that its RAM blocks are the same.
    ///
    /// # Errors
    ///
    /// [`VmError::NotStill`] says what happened meanwhile.
    pub fn verify(&mut self) -> Result<(), VmError> {
        let not_still = |what: String| Err(VmError::NotStill { what });
        let found = self.vm.run_state()?;
        let resumes = self.vm.qmp.resumes() - self.resumes;
        if resumes > 0 {
            return not_still("another client of QEMU let the guest run".to_owned());
        }
        // A migration that has completed leaves the guest stopped, but in the state PostMigrate.
        if found != self.state && found != RunState::PostMigrate {
            return not_still(format!("its run state is {found}, expected {}", self.state));
        }
        let blocks = self.vm.ram_blocks()?;
        if let Some(block) = changed_block(&self.blocks, &blocks) {
            return not_still(format!("RAM block {block:?} is not what it was"));
        }
        Ok(())
    }

    /// Resumes the guest if it ran before, or if another client has let it run since and a migration has
    /// stopped it again; if not, only takes back its disks if they were released.
    ///
    /// # Errors
    ///
    /// QEMU's error; [`VmError::WrongState`] if QEMU accepts `cont` but the guest does not run.
    pub fn resume(&mut self) -> Result<(), VmError> {
        self.is_over = true;
        let was_resumed = self.vm.qmp.resumes() > self.resumes;
        let vm = &mut *self.vm;
        match self.ran {
            true => vm.unstoppable(PUT_BACK_TIMEOUT, Vm::resume_and_check),
            false if was_resumed => vm.unstoppable(PUT_BACK_TIMEOUT, Vm::resume_after_migration),
            false if vm.has_released_disks => vm.unstoppable(PUT_BACK_TIMEOUT, Vm::take_back_disks),
            false => Ok(()),
        }
    }

    /// Leaves the guest as it is: stopped, or ended with its QEMU. Returns the time since the stop.
    pub fn leave(mut self) -> Duration {
        self.is_over = true;
        self.stopped_at.elapsed()
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            // Only a panic comes here: every other exit calls `resume` or `leave`.
            drop(self.resume());
        }
    }
}

/// Returns the name of a block that only one of the lists has, or that differs between them.
fn changed_block<'a>(before: &'a [RamBlockInfo], after: &'a [RamBlockInfo]) -> Option<&'a str> {
    let differs = |(one, other): (&'a [RamBlockInfo], &[RamBlockInfo])| {
        one.iter().find(|block| !other.contains(block)).map(|block| block.name.as_str())
    };
    [(before, after), (after, before)].into_iter().find_map(differs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, used_length: u64) -> RamBlockInfo {
        RamBlockInfo {
            name: name.to_owned(),
            page_size: 4096,
            used_length,
            total_length: 1 << 30,
            host_address: Some(1 << 40),
            read_only: false,
        }
    }

    #[test]
    fn a_block_that_came_went_or_grew_is_named() {
        let before = [block("pc.ram", 64 << 20), block("dimm0", 1 << 20)];
        assert_eq!(changed_block(&before, &before), None);
        assert_eq!(changed_block(&before, &before[..1]), Some("dimm0"));
        assert_eq!(changed_block(&before[..1], &before), Some("dimm0"));
        let grown = [block("pc.ram", 65 << 20), block("dimm0", 1 << 20)];
        assert_eq!(changed_block(&before, &grown), Some("pc.ram"));
    }
}
