//! What a test needs of the machine, and how it reports what is missing.

use std::env;

use rustix::process::geteuid;

/// Something that a test needs and this machine does not have.
#[derive(Debug)]
pub struct Missing {
    reason: String,
    may_be_missing_in_ci: bool,
}

impl Missing {
    /// States what is missing. With `CI=true` the test fails: there setup installs everything.
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Missing {
        Missing { reason: reason.into(), may_be_missing_in_ci: false }
    }

    /// States what is missing, and that no setup can supply it, so that CI may skip it as well.
    #[must_use]
    pub fn beyond_setup(reason: impl Into<String>) -> Missing {
        Missing { reason: reason.into(), may_be_missing_in_ci: true }
    }

    /// Prints the line that marks a skipped test.
    ///
    /// # Panics
    ///
    /// With `CI=true`, unless [`Missing::beyond_setup`] made this value.
    #[expect(clippy::print_stdout, reason = "the test runner reads this line")]
    pub fn skip(&self) {
        let in_ci = env::var("CI").is_ok_and(|value| value == "true");
        assert!(!in_ci || self.may_be_missing_in_ci, "must not be skipped in CI: {}", self.reason);
        println!("skipped: {}", self.reason);
    }
}

/// Evaluates to what the test needs, or ends the test as skipped.
///
/// `requires!(qemu >= "9.0")` is the QEMU of that version or later; any other expression must be a
/// `Result<T, Missing>`, and evaluates to its `T`. For functions that return
/// [`TestResult`](crate::TestResult).
#[macro_export]
macro_rules! requires {
    (qemu >= $version:literal) => {
        $crate::requires!($crate::Qemu::at_least($version))
    };
    ($need:expr) => {
        match $need {
            Ok(value) => value,
            Err(missing) => {
                $crate::Missing::skip(&missing);
                return Ok(());
            }
        }
    };
}

/// Requires that the test runs as root.
///
/// # Errors
///
/// When it does not.
pub fn root() -> Result<(), Missing> {
    if geteuid().is_root() { Ok(()) } else { Err(Missing::new("needs root")) }
}
