//! The result of a run of the suite.

use std::{fmt, time::Duration};

/// The outcome of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The backend behaves as the check requires.
    Passed,
    /// The backend does not, for this reason.
    Failed(String),
    /// The check cannot run against this KMS, for this reason.
    NotApplicable(String),
}

/// One check and its outcome.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CheckReport {
    /// The name of the check, as in the table of the module.
    pub name: &'static str,
    /// The outcome.
    pub outcome: Outcome,
    /// How long the check took.
    pub took: Duration,
}

/// The outcomes of all checks, in the order in which they ran. `Display` prints one line for each.
#[derive(Clone, Debug)]
#[must_use = "a report that no code looks at lets a failed check pass"]
pub struct Report {
    pub(super) kms: String,
    pub(super) checks: Vec<CheckReport>,
}

impl Report {
    /// The name of the backend, [`Kms::name`](crate::kms::Kms::name).
    #[must_use]
    pub fn kms(&self) -> &str {
        &self.kms
    }

    /// All checks of the suite.
    #[must_use]
    pub fn checks(&self) -> &[CheckReport] {
        &self.checks
    }

    /// The names of the checks that passed.
    #[must_use]
    pub fn passed(&self) -> Vec<&'static str> {
        self.names(|outcome| matches!(outcome, Outcome::Passed))
    }

    /// The names of the checks that failed.
    #[must_use]
    pub fn failed(&self) -> Vec<&'static str> {
        self.names(|outcome| matches!(outcome, Outcome::Failed(_)))
    }

    /// The names of the checks that do not apply. A test compares them with the ones that it
    /// expects, so that no check stops running unnoticed.
    #[must_use]
    pub fn not_applicable(&self) -> Vec<&'static str> {
        self.names(|outcome| matches!(outcome, Outcome::NotApplicable(_)))
    }

    /// Panics with the whole report if a check failed.
    ///
    /// # Panics
    /// If a check failed.
    #[track_caller]
    pub fn assert_conforming(&self) {
        assert!(self.failed().is_empty(), "the KMS backend breaks the rules:\n{self}");
    }

    fn names(&self, wanted: impl Fn(&Outcome) -> bool) -> Vec<&'static str> {
        self.checks.iter().filter(|check| wanted(&check.outcome)).map(|check| check.name).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} checks passed, {} failed, {} not applicable",
            self.kms,
            self.passed().len(),
            self.failed().len(),
            self.not_applicable().len()
        )?;
        for CheckReport { name, outcome, took } in &self.checks {
            let (word, reason) = match outcome {
                Outcome::Passed => ("passed", ""),
                Outcome::Failed(reason) => ("FAILED", reason.as_str()),
                Outcome::NotApplicable(reason) => ("not applicable", reason.as_str()),
            };
            let line = format!("{word:<15} {name:<24} {:>6.2} s  {reason}", took.as_secs_f64());
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}
