//! What an examination finds: one disagreement, where it is, and what can be done about it.

use std::path::{Path, PathBuf};

use crate::error::Error;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Space or order: nothing is wrong for anybody.
    Note,
    /// It does no harm today, and may tomorrow.
    Warning,
    /// A volume, or all of them, cannot be used, or is not what xapi believes.
    Error,
}

impl Severity {
    /// Gives the word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One disagreement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// The file or directory.
    pub place: PathBuf,
    /// What is wrong, in words.
    pub what: String,
    /// Whether a repair does something about it.
    pub is_repairable: bool,
    /// What the repair does or, where it does nothing, what a person can do.
    pub remedy: String,
}

impl Finding {
    /// Makes a finding that a person has to deal with.
    pub fn new(severity: Severity, place: &Path, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { severity, place: place.to_owned(), what: what.into(), is_repairable: false, remedy: remedy.into() }
    }

    /// Makes a finding that a repair deals with.
    pub fn repairable(severity: Severity, place: &Path, what: impl Into<String>, repair: impl Into<String>) -> Self {
        Self { is_repairable: true, ..Self::new(severity, place, what, repair) }
    }
}

/// Gives what an error says beside the name of the file, which a finding has already.
pub(super) fn reason_of(error: &Error) -> String {
    match error {
        Error::DamagedRecord { reason, .. } | Error::Image { reason, .. } => reason.clone(),
        Error::NewerFormat { found, known, .. } => {
            format!("it has format {found}, and this program knows formats up to {known}")
        }
        _ => error.chain(),
    }
}
