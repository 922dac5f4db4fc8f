//! Gathers the story of a run: the trees before and after, and in between what log, wires, guests and observer saw.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Stage, Witness};
use crate::disk::{Links, Sr, Tree, qemu_img};
use crate::host::Wire;
use crate::report::Report;
use crate::script::CallRecord;
use crate::story::{Call, Failure, Felt, Guest, Kind, Mirror, Node, Pause, Phase, Sent, Story};
use crate::sxm::{Event, Failed};
use crate::wire::Json;

/// How much of an answer is told, in characters; more of one that failed.
const ANSWER: usize = 160;
const FAILED_ANSWER: usize = 900;
/// How much of a uuid stands for a volume that has no name.
const UUID_SHOWN: usize = 8;

/// A story that is being gathered.
#[derive(Debug)]
pub(super) struct Telling {
    story: Story,
    began: Instant,
    ended: Instant,
}

/// Notes when the migration ends, however it does.
pub(super) struct Running<'a>(&'a mut Telling);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.ended = Instant::now();
    }
}

impl Telling {
    /// Begins with the source as it is before the migration.
    ///
    /// # Errors
    /// If its images cannot be read.
    pub fn begin(title: &str, stage: &Stage, witness: &Witness) -> Result<Self> {
        let hosts = (stage.source.name().to_owned(), stage.destination.name().to_owned());
        let known = source_names(witness);
        let source_before = nodes(&stage.source_path, &known).context("the source before the migration")?;
        let story = Story { title: title.to_owned(), hosts, source_before, ..Story::default() };
        Ok(Self { story, began: Instant::now(), ended: Instant::now() })
    }

    /// The migration begins, and ends when what this gives is dropped.
    pub fn migrating(&mut self) -> Running<'_> {
        self.began = Instant::now();
        Running(self)
    }

    /// It has failed.
    pub fn failed(&mut self, failed: &Failed) {
        let mut error = String::new();
        let mut next: Option<&dyn std::error::Error> = Some(&failed.error);
        while let Some(cause) = next {
            let separator = if error.is_empty() { "" } else { ": " };
            // Some of the messages have their cause in them already.
            let text = cause.to_string();
            if !error.contains(&text) {
                error = format!("{error}{separator}{text}");
            }
            next = cause.source();
        }
        let swept = failed.swept.iter().map(|swept| {
            let how = match &swept.error {
                None => "destroyed".to_owned(),
                Some(error) => format!("cannot be destroyed: {error}"),
            };
            format!("{} ({}) on host {}: {how}", swept.name, swept.vdi, swept.host)
        });
        let (phase, restarted) = (failed.phase.clone(), failed.restarted);
        self.story.failure = Some(Failure { error, phase, swept: swept.collect(), restarted });
    }

    /// Takes in what was seen, and both sides as they are now. What cannot be read is left out of the story, since a run
    /// that went wrong has to be told too.
    pub async fn end(self, stage: &Stage, witness: &Witness, wires: &[Arc<Wire>], report: &Report) -> Story {
        let Self { mut story, began, ended } = self;
        let ms = |at: Instant| since(began, at);
        let (source, destination) = (source_names(witness), destination_names(witness));
        let all: Names = source.iter().chain(&destination).map(|(key, known)| (key.clone(), known.clone())).collect();
        story.ended = ms(ended);

        let events = witness.events();
        let mut phases: Vec<Phase> = Vec::new();
        for (at, name) in events.iter().filter_map(|(at, event)| match event {
            Event::Phase(name) => Some((*at, *name)),
            _ => None,
        }) {
            if let Some(last) = phases.last_mut() {
                last.to = ms(at);
            }
            phases.push(Phase { name: name.to_owned(), from: ms(at), to: story.ended });
        }
        story.phases = phases;
        story.pause = witness.pause().map(|(suspended, resumed)| {
            let (from, to) = (ms(suspended), resumed.map_or(story.ended, ms));
            let judged = witness.downtime().map_or(0.0, |downtime| to - from - downtime.as_secs_f64() * 1e3);
            Pause { from, to, judged: judged.max(0.0) }
        });
        story.calls = calls(&stage.log.calls(), stage.log.epoch(), began, &all);
        story.mirrors = wires.iter().map(|wire| mirror(wire, &ms, &all, &events)).collect();
        story.guests = witness
            .latencies()
            .await
            .into_iter()
            .map(|(disk, first, latency)| {
                let felt = |moment: &crate::guest::Moment| Felt {
                    at: ms(first) + moment.at_seconds * 1e3,
                    commands: moment.commands,
                    p50: moment.p50_seconds * 1e3,
                    p99: moment.p99_seconds * 1e3,
                    worst: moment.max_seconds * 1e3,
                };
                let of = |known: &&Known| known.disk == disk && known.kind == Kind::Leaf;
                let name =
                    source.values().find(of).map_or_else(|| format!("disk {disk}"), |known| known.name.clone());
                Guest { disk: name, moments: latency.series.iter().map(felt).collect() }
            })
            .collect();
        story.source_after = nodes(&stage.source_path, &source).unwrap_or_default();
        story.destination_after = nodes(&stage.destination_path, &destination).unwrap_or_default();
        compared(&mut story, report);
        story
    }
}

/// What is known of a volume.
#[derive(Debug, Clone)]
struct Known {
    name: String,
    disk: usize,
    kind: Kind,
}

/// By the volume's key.
type Names = BTreeMap<String, Known>;

fn source_names(witness: &Witness) -> Names {
    let known = |volume: &super::witness::Volume| Known {
        name: volume.name.clone(),
        disk: volume.disk,
        kind: if volume.snapshot.is_some() { Kind::Snapshot } else { Kind::Leaf },
    };
    witness.volumes().iter().map(|(key, volume)| (key.clone(), known(volume))).collect()
}

fn destination_names(witness: &Witness) -> Names {
    let source = source_names(witness);
    let arrived = witness.pairs().into_iter();
    arrived.filter_map(|pair| Some((pair.destination, source.get(&pair.source)?.clone()))).collect()
}

/// All nodes of an SR that is not being changed, each after the one it lies on.
fn nodes(sr: &Path, names: &Names) -> Result<Vec<Node>> {
    let sr = Sr::read(sr)?;
    let mut nodes = Vec::new();
    for tree in sr.trees() {
        let owners: BTreeMap<&str, &str> =
            tree.volumes.iter().map(|(volume, node)| (node.as_str(), volume.as_str())).collect();
        below(tree, None, None, &owners, names, &mut nodes)?;
    }
    Ok(nodes)
}

fn below(
    tree: &Tree,
    parent: Option<&str>,
    at: Option<usize>,
    owners: &BTreeMap<&str, &str>,
    names: &Names,
    into: &mut Vec<Node>,
) -> Result<()> {
    let of = |node: &&String| tree.parent(node, Links::Headers) == parent;
    let mut children: Vec<(Node, &str)> = Vec::new();
    for uuid in tree.nodes.keys().filter(of) {
        let file = &tree.nodes[uuid];
        let owner = owners.get(uuid.as_str()).copied();
        let known = owner.and_then(|volume| names.get(volume));
        let (name, kind) = match (known, owner) {
            (Some(known), _) => (known.name.clone(), known.kind),
            (None, Some(volume)) => (beginning(volume), Kind::Other),
            (None, None) => (beginning(uuid), Kind::Hidden),
        };
        let own = qemu_img::allocated(&file.image)?;
        let node = Node { name, kind, parent: at, size: file.virtual_size, own, sent: None, identical: None };
        children.push((node, uuid));
    }
    children.sort_by(|one, other| one.0.name.cmp(&other.0.name));
    for (node, uuid) in children {
        // A circle of headers has no node without a parent, so that it is never entered.
        into.push(node);
        below(tree, Some(uuid), Some(into.len() - 1), owners, names, into)?;
    }
    Ok(())
}

/// Puts what mirrors sent, and what the judge found, to the nodes by their names, which are each side's own.
fn compared(story: &mut Story, report: &Report) {
    for node in &mut story.source_before {
        let wires = story.mirrors.iter().filter(|mirror| mirror.volume == node.name);
        node.sent = (node.kind != Kind::Hidden).then(|| wires.map(|mirror| mirror.sent).sum());
    }
    for node in &mut story.destination_after {
        let judged = report.nodes.iter().find(|judged| judged.name == node.name);
        node.identical = judged.filter(|_| node.kind != Kind::Hidden).map(|judged| judged.identical);
    }
}

fn mirror(wire: &Wire, ms: &dyn Fn(Instant) -> f64, names: &Names, events: &[(Instant, Event)]) -> Mirror {
    let from = ms(wire.started());
    let samples = wire.samples();
    let samples = samples.iter().map(|sample| Sent { at: from + millis(sample.at), bytes: sample.to_destination });
    let complete = events.iter().find_map(|(at, event)| match event {
        Event::Complete { source } if source.0 == wire.source && ms(*at) >= from => Some(ms(*at)),
        _ => None,
    });
    Mirror {
        volume: named(names, &wire.source),
        destination: named(names, &wire.destination),
        from,
        complete,
        samples: samples.collect(),
        sent: wire.to_destination(),
        received: wire.from_destination(),
    }
}

fn calls(records: &[CallRecord], epoch: Instant, began: Instant, names: &Names) -> Vec<Call> {
    // The log's beginning is before the migration's.
    let offset = since(began, epoch);
    // Data.stat names nothing but an operation.
    let mut operations: BTreeMap<String, String> = BTreeMap::new();
    let mut calls = Vec::new();
    for record in records {
        let request: serde_json::Value = serde_json::from_str(&record.request).unwrap_or_default();
        let text = |name: &str| request[name].as_str().map(str::to_owned);
        let operation = request["operation"].to_string();
        let key = text("key").or_else(|| Some(text("uri")?.rsplit('/').next()?.to_owned()));
        let key = key.filter(|key| !key.is_empty()).or_else(|| operations.get(&operation).cloned());
        if let (Some(Ok(answer)), Some(key)) = (&record.answer, &key)
            && ["Data.mirror", "Data.copy"].contains(&record.method)
        {
            operations.insert(answer.encode(), key.clone());
        }
        // Of an SR's URI the last part is a directory.
        let volume = key.filter(|_| !record.method.starts_with("SR."));
        calls.push(Call {
            host: record.host.clone(),
            method: record.method.to_owned(),
            volume: volume.map_or_else(String::new, |key| named(names, &key)),
            from: offset + millis(record.started),
            to: record.ended.map(|ended| offset + millis(ended)),
            failed: matches!(record.answer, Some(Err(_))),
            answer: answer(record.answer.as_ref()),
            fault: record.fault.clone(),
        });
    }
    calls
}

fn answer(answer: Option<&Result<Json, crate::wire::Failure>>) -> String {
    let (mut text, limit) = match answer {
        None => return "no answer".to_owned(),
        Some(Ok(answer)) => (answer.encode(), ANSWER),
        Some(Err(failure)) => (failure.to_string(), FAILED_ANSWER),
    };
    if let Some((end, _)) = text.char_indices().nth(limit) {
        text.truncate(end);
        text.push('…');
    }
    text
}

fn named(names: &Names, key: &str) -> String {
    names.get(key).map_or_else(|| beginning(key), |known| known.name.clone())
}

fn beginning(uuid: &str) -> String {
    let shown: String = uuid.chars().take(UUID_SHOWN).collect();
    if shown.len() < uuid.len() { format!("{shown}…") } else { shown }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Milliseconds from one moment to another, which may be the earlier one.
fn since(began: Instant, at: Instant) -> f64 {
    at.checked_duration_since(began).map_or_else(|| -millis(began - at), millis)
}
