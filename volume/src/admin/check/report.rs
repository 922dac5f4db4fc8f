//! What a check says in the end.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use plugin::error::{Error, Result};
use plugin::id::TreeId;
use plugin::store::{Finding, Rebuilt, Severity};
use serde_json::json;

use super::Findings;

/// What was found, what was done about it, and what is left.
#[derive(Debug)]
pub struct Report {
    path: PathBuf,
    /// What is found now, after a repair where there was one.
    left: Findings,
    /// What a repair has put right.
    repaired: Vec<Finding>,
    /// What a repair has to say.
    remarks: Vec<String>,
}

impl Report {
    /// Reports an examination.
    pub fn of(path: &Path, found: Findings) -> Self {
        Self { path: path.to_owned(), left: found, repaired: Vec::new(), remarks: Vec::new() }
    }

    /// Reports a repair: what was found before it, and what after.
    pub fn of_repair(path: &Path, before: Findings, after: Findings, remarks: Vec<String>) -> Self {
        let same = |one: &Finding, other: &Finding| one.place == other.place && one.what == other.what;
        let is_left = |finding: &Finding| after.list.iter().any(|left| same(left, finding));
        let repaired = before.list.into_iter().filter(|finding| !is_left(finding)).collect();
        Self { path: path.to_owned(), left: after, repaired, remarks }
    }

    /// Tells whether nothing is wrong now.
    pub fn is_well(&self) -> bool {
        self.left.list.is_empty()
    }

    /// Gives the report for people: a line for each finding, and a last one.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        for finding in &self.repaired {
            let _ = writeln!(text, "repaired {}", line(&self.path, finding));
        }
        for finding in &self.left.list {
            let remedy = if finding.is_repairable { "--repair: " } else { "" };
            let severity = finding.severity.word();
            let _ = writeln!(text, "{severity} {}; {remedy}{}", line(&self.path, finding), finding.remedy);
        }
        for remark in &self.remarks {
            let _ = writeln!(text, "remark {remark}");
        }
        let Findings { trees, images, passed_over, .. } = &self.left;
        let looked = format!("{trees} trees, {images} images looked into, {passed_over} in use");
        let _ = if self.is_well() {
            writeln!(text, "{}: all is well ({looked})", self.path.display())
        } else {
            let count = |severity| self.left.list.iter().filter(|finding| finding.severity == severity).count();
            let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
            let notes = count(Severity::Note);
            writeln!(text, "{}: {errors} errors, {warnings} warnings, {notes} notes ({looked})", self.path.display())
        };
        text
    }

    /// Gives the report for programs.
    pub fn json(&self) -> Result<String> {
        let finding = |finding: &Finding| {
            json!({
                "severity": finding.severity.word(),
                "path": finding.place.to_string_lossy(),
                "what": finding.what,
                "repairable": finding.is_repairable,
                "remedy": finding.remedy,
            })
        };
        let report = json!({
            "path": self.path.to_string_lossy(),
            "well": self.is_well(),
            "trees": self.left.trees,
            "images": self.left.images,
            "in_use": self.left.passed_over,
            "findings": self.left.list.iter().map(finding).collect::<Vec<_>>(),
            "repaired": self.repaired.iter().map(finding).collect::<Vec<_>>(),
            "remarks": self.remarks,
        });
        serde_json::to_string_pretty(&report)
            .map(|text| text + "\n")
            .map_err(|error| Error::Internal(format!("the report cannot be encoded: {error}")))
    }
}

/// Describes a finding: where, from the SR on, and what. On one line, whatever a file is called.
fn line(sr: &Path, finding: &Finding) -> String {
    let place = finding.place.strip_prefix(sr).unwrap_or(&finding.place);
    let place = if place.as_os_str().is_empty() { "." } else { &place.to_string_lossy() };
    format!("{place}: {}", finding.what).replace(|character: char| character.is_control(), "?")
}

/// Says how a record was made anew.
pub fn of_rebuilt(id: TreeId, made: &Rebuilt) -> String {
    if made.is_exact {
        return format!("tree {id} was made anew from the copy of its record, which agrees with its images");
    }
    let volumes = made.tree.volumes.len() - made.recovered.len();
    let mut text = format!(
        "tree {id} was made anew from the headers of its images: {} nodes, {volumes} volumes with what was known of them",
        made.tree.nodes.len()
    );
    if !made.recovered.is_empty() {
        let _ = write!(text, ", {} volumes made for data whose volume is not known", made.recovered.len());
    }
    for key in &made.lost {
        let _ = write!(text, ", no data found of volume {key}");
    }
    text + "; see that each holds what you expect before you start its VM"
}
