//! The report of a migration, as JSON.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::guest::Account;

/// What a migration did and what of it holds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Whether the migration ended as it should and every property holds.
    pub ok: bool,
    /// The flow: leaf, tree or base.
    pub flow: String,
    /// What must hold after a migration.
    pub properties: Properties,
    /// Every volume that was migrated.
    pub nodes: Vec<Node>,
    /// Bytes that the source sent through the proxies.
    pub bytes_on_the_wire: u64,
    /// Bytes that the destination sent back: answers, and what was read to be compared.
    pub bytes_back: u64,
    /// Bytes that the destination's node files take on their file system.
    pub physical_bytes: u64,
    /// Bytes that the source's node files took on theirs.
    pub source_physical_bytes: u64,
    /// Bytes of data in the source's node files, each for itself: the least that there is to carry.
    pub unique_allocated_bytes: u64,
    /// How long each phase took.
    pub seconds: Phases,
    /// From the suspension of the VM to its resumption; absent for a halted VM.
    pub downtime_seconds: Option<f64>,
    /// What the guests went through, one a disk, where there were any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<Account>,
    /// What is wrong, for people.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// What must hold after a migration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Properties {
    /// Every volume is based on the same one as at the source.
    pub topology: bool,
    /// Every volume reads the same as at the source.
    pub content: bool,
    /// Every write that the guest saw acknowledged is there.
    pub acknowledged_writes: bool,
    /// After a success the source holds no volume and no node file; after a failure it is as it was.
    pub source_clean: bool,
    /// The destination holds nothing but what was migrated; after a failure nothing at all.
    pub destination_clean: bool,
}

/// One volume of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Node {
    /// What people call it: the snapshot's name, or the disk's.
    pub name: String,
    /// The volume at the source.
    pub source: String,
    /// The volume at the destination.
    pub destination: String,
    /// The volume at the source that it is based on.
    pub parent: Option<String>,
    /// Whether source and destination read the same.
    pub identical: bool,
}

/// Seconds a phase, in the order in which they were passed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Phases(Vec<(String, f64)>);

impl Properties {
    /// Whether all of them hold.
    pub fn all(self) -> bool {
        let Self { topology, content, acknowledged_writes, source_clean, destination_clean } = self;
        topology && content && acknowledged_writes && source_clean && destination_clean
    }
}

impl Phases {
    /// Adds seconds to a phase.
    pub fn add(&mut self, phase: &str, seconds: f64) {
        match self.0.iter_mut().find(|(name, _)| name == phase) {
            Some((_, sum)) => *sum += seconds,
            None => self.0.push((phase.to_owned(), seconds)),
        }
    }

    /// The phases and their seconds.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, seconds)| (name.as_str(), *seconds))
    }
}

impl Serialize for Phases {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, seconds) in self.iter() {
            map.serialize_entry(name, &seconds)?;
        }
        map.end()
    }
}

impl Report {
    /// The report as it goes to a file: indented, with a last line feed.
    ///
    /// # Errors
    /// Never for a report; the encoder's type wants it.
    pub fn to_json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_a_report_is_there_under_its_name() {
        let mut report = Report { flow: "tree".into(), ..Report::default() };
        report.seconds.add("copy", 1.0);
        report.seconds.add("attach", 0.5);
        report.seconds.add("copy", 0.25);
        report.nodes.push(Node {
            name: "snap1".into(),
            source: "s".into(),
            destination: "d".into(),
            parent: None,
            identical: true,
        });
        let text = report.to_json().unwrap();
        assert!(text.find("copy").unwrap() < text.find("attach").unwrap());
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["seconds"]["copy"], 1.25);
        assert_eq!(json["properties"]["acknowledged_writes"], false);
        assert_eq!(json["nodes"][0]["parent"], serde_json::Value::Null);
        for field in
            ["ok", "bytes_on_the_wire", "bytes_back", "physical_bytes", "unique_allocated_bytes", "downtime_seconds"]
        {
            assert!(json.get(field).is_some(), "{field}");
        }
        assert!(json.get("guests").is_none() && json.get("problems").is_none());
    }

    #[test]
    fn one_property_that_fails_is_enough() {
        let all = Properties {
            topology: true,
            content: true,
            acknowledged_writes: true,
            source_clean: true,
            destination_clean: true,
        };
        assert!(all.all());
        assert!(!Properties { content: false, ..all }.all() && !Properties { source_clean: false, ..all }.all());
    }
}
