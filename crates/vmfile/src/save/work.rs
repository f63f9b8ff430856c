//! What the routes work with.

use std::time::Instant;

use vmfile_format::manifest::VmMeta;
use vmfile_pages::control::Control;
use vmfile_pages::draft::{Draft, SaveFacts};
use vmfile_qemu::{Footprint, RamBlockInfo, Vm};

use super::base::ChosenBase;
use super::disks::Disks;
use super::options::{After, SaveOptions};
use super::report::RouteUsed;
use crate::error::SaveError;
use crate::guard::Guard;
use crate::secrets;

/// What a route works with.
pub(super) struct Work<'a> {
    pub(super) vm: &'a mut Vm,
    pub(super) guard: &'a Guard,
    /// The RAM blocks as they are since the guest was stopped; empty while it runs.
    pub(super) blocks: &'a [RamBlockInfo],
    pub(super) draft: &'a Draft,
    pub(super) disks: &'a mut Disks,
    pub(super) options: &'a SaveOptions,
    pub(super) base: &'a mut ChosenBase,
    pub(super) control: &'a Control<'a>,
    pub(super) meta: &'a mut VmMeta,
    pub(super) warnings: &'a mut Vec<String>,
    /// When the guest was paused for the save; `None` while it runs.
    pub(super) paused_at: Option<Instant>,
    /// What the save may have changed, for the guardian. Of a guest that runs while it is saved, it says
    /// whether the guest may stand still because of the save: what stops it later is not this save.
    pub(super) footprint: Footprint<'a>,
}

impl Work<'_> {
    /// Returns what the manifest says of this save.
    pub(super) fn facts(&self, route: RouteUsed, pause_seconds: f64, live: bool) -> SaveFacts {
        let mut vm = self.meta.clone();
        if !self.options.with_secrets {
            secrets::leave_out(&mut vm);
        }
        let route = route.name();
        SaveFacts {
            route: route.to_owned(),
            live: Some(live),
            pause_seconds: Some(pause_seconds),
            saved_at_unix_seconds: None,
            vm,
        }
    }

    /// Says, and tells the guardian, whether the guest may stand still because of the save from now on.
    pub(super) fn set_may_stand(&mut self, may_stand: bool) -> Result<(), SaveError> {
        if self.footprint.may_stand != may_stand {
            self.footprint.may_stand = may_stand;
            self.guard.watch_save(&self.footprint)?;
        }
        Ok(())
    }

    pub(super) fn seconds_paused(&self) -> f64 {
        self.paused_at.map_or(0.0, |at| at.elapsed().as_secs_f64())
    }

    /// Whether the VM ends once the file is durable.
    pub(super) fn is_last(&self) -> bool {
        self.options.after == After::Quit
    }

    /// Whether the guest stands still after the save, in a QEMU that lives on.
    pub(super) fn stays_paused(&self) -> bool {
        match self.options.after {
            After::Quit => false,
            After::Pause => true,
            After::Resume => self.meta.run_state != "running",
        }
    }

    /// Notes that QEMU will be in a state from which it does not send the VM once more.
    pub(super) fn warn_of_postmigrate(&mut self, reason: &str) {
        self.warnings.push(format!(
            "the VM is paused in QEMU's state postmigrate and cannot be saved again before it has \
             run; --route direct leaves it as it was ({reason})"
        ));
    }
}
