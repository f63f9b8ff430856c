//! How a test says how many cases it has tried.

use std::fmt::Display;

use crate::case::Case;

/// Prints the line that says how many cases a test has tried. The number must be counted where they are
/// tried; a test may print several lines, which are added up.
///
/// A test of a crate that has no `vmfile-testing` prints the line by itself, as `cases: 30 kills`.
#[expect(clippy::print_stdout, reason = "the test runner reads this line")]
pub fn cases(number: impl Display, case: Case) {
    println!("cases: {number} {case}");
}
