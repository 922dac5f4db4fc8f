//! A run told to people.

use std::fmt;

use super::Outcome;
use crate::draw;

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = &self.report;
        writeln!(f, "{}", self.drawing)?;
        for node in &report.nodes {
            let identical = if node.identical { "identical" } else { "DIFFERENT" };
            writeln!(f, "{:12} {} -> {} {identical}", node.name, node.source, node.destination)?;
        }
        writeln!(f)?;
        let properties = report.properties;
        for (name, holds) in [
            ("topology", properties.topology),
            ("content", properties.content),
            ("acknowledged writes", properties.acknowledged_writes),
            ("source clean", properties.source_clean),
            ("destination clean", properties.destination_clean),
        ] {
            writeln!(f, "{name:20} {}", if holds { "yes" } else { "NO" })?;
        }
        writeln!(f)?;
        for (name, bytes) in [
            ("on the wire", report.bytes_on_the_wire),
            ("physical at the destination", report.physical_bytes),
            ("physical at the source", report.source_physical_bytes),
            ("unique at the source", report.unique_allocated_bytes),
        ] {
            writeln!(f, "{name:28} {:>10}", draw::size(bytes))?;
        }
        for guest in &report.guests {
            let (longest, p99) = (guest.latency.max_seconds * 1e3, guest.latency.p99_seconds * 1e3);
            let (writes, failed) = (guest.acknowledged, guest.failed);
            writeln!(
                f,
                "guest: {writes} writes acknowledged in {:.1} s, {failed} failed, 99 of 100 within {p99:.1} ms, \
                 longest {longest:.1} ms",
                guest.seconds
            )?;
        }
        let phases: Vec<String> =
            report.seconds.iter().map(|(name, seconds)| format!("{name} {seconds:.2} s")).collect();
        writeln!(f, "{}", phases.join(", "))?;
        if let Some(downtime) = report.downtime_seconds {
            writeln!(f, "downtime {downtime:.3} s")?;
        }
        for call in &self.calls {
            writeln!(f, "{call}")?;
        }
        for problem in &report.problems {
            writeln!(f, "problem: {problem}")?;
        }
        write!(f, "flow {}: {}", report.flow, if report.ok { "everything holds" } else { "FAILED" })
    }
}
