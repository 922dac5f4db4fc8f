//! What a mirror has to send, from what the destination announces and what this host knows.
//!
//! ```text
//!   destination            this host                        source
//!   base=B ──────────────► session B: sent content C ─────► an ancestor has content C
//!       └─────────────────────────────────────────────────► an ancestor has content B itself
//! ```
//!
//! The destination then has what that ancestor reads as, and lacks what the nodes above it have of their own.
//! Whatever is in doubt makes it a full mirror, which needs no knowledge to be right.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::announcement::{Announcement, Base};
use super::session::{Sent, Session};
use crate::error::Result;
use crate::id::{ContentId, NodeId};
use crate::store::Tree;

/// What a mirror sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Plan {
    /// Everything, zeroes included, because of this.
    Full(String),
    /// Everything but zeroes: the destination has nothing else.
    Blank,
    /// What some nodes have of their own.
    Difference {
        /// The ancestor that the destination has already.
        above: NodeId,
        /// The nodes above it, the oldest first and the mirror's own node last.
        layers: Vec<NodeId>,
    },
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full(reason) => write!(f, "everything, as {reason}"),
            Self::Blank => f.write_str("everything but zeroes, as the destination is blank"),
            Self::Difference { above, layers } => write!(f, "the {} layers above node {above}", layers.len()),
        }
    }
}

/// A node of the chain that a mirror reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// The node.
    pub node: NodeId,
    /// What it reads as with all below it, while that is known.
    pub content: Option<ContentId>,
    /// Its size in bytes.
    pub virtual_size: u64,
}

/// What is known of a destination before anything is sent.
#[derive(Clone, Copy, Debug)]
pub struct Destination<'a> {
    /// The description of its export.
    pub description: Option<&'a str>,
    /// Its size in bytes.
    pub size: Option<u64>,
}

/// Gives a node and all below it, down to the root.
///
/// # Errors
///
/// [`crate::Error::Internal`] for a node of another tree.
pub fn layers(tree: &Tree, node: NodeId) -> Result<Vec<Layer>> {
    let layer = |node: NodeId| {
        let found = tree.node(node)?;
        Ok(Layer { node, content: found.content, virtual_size: found.virtual_size })
    };
    tree.node(node)?;
    tree.chain(node).into_iter().map(layer).collect()
}

/// Plans a mirror of a chain, given top first; `find` gives what is known of a session.
pub fn plan(
    chain: &[Layer],
    destination: Destination<'_>,
    find: impl Fn(ContentId) -> Result<Option<Session>>,
) -> Plan {
    try_plan(chain, destination, find).unwrap_or_else(Plan::Full)
}

/// Plans a mirror, or says why it must be a full one.
fn try_plan(
    chain: &[Layer],
    destination: Destination<'_>,
    find: impl Fn(ContentId) -> Result<Option<Session>>,
) -> std::result::Result<Plan, String> {
    let description = destination.description.ok_or("the destination announces nothing")?;
    let announcement = description
        .parse::<Announcement>()
        .map_err(|reason| format!("the description of the destination's export promises nothing: {reason}"))?;
    let unreadable = |error: crate::Error| format!("the record of a session cannot be read: {}", error.chain());
    if find(announcement.session).map_err(unreadable)?.is_some() {
        return Err("something was sent to the destination since its content was what it announces".to_owned());
    }
    let base = match announcement.base {
        Base::Blank => return Ok(Plan::Blank),
        Base::Unknown => return Err("the destination does not know its content".to_owned()),
        Base::Content(base) => base,
    };
    let sent = match find(base).map_err(unreadable)?.map(|session| session.sent) {
        Some(Sent::Complete(content)) => Some(content),
        Some(Sent::Begun | Sent::Spoiled) | None => None,
    };
    let is_known = |layer: &Layer| layer.content.is_some_and(|content| content == base || Some(content) == sent);
    // The node itself is no candidate: with nothing to send there would be no job that a guest's writes could follow.
    let depth = chain.iter().skip(1).position(is_known).ok_or_else(|| match sent {
        Some(_) => "no ancestor has what the destination has".to_owned(),
        None => "what the destination has was not sent from here".to_owned(),
    })?;
    let (above, ancestor) = chain.split_at(depth + 1);
    let (Some(top), Some(ancestor)) = (above.first(), ancestor.first()) else {
        return Err("the chain ends before the ancestor".to_owned());
    };
    // What lies beyond the end of a smaller node below reads as zeroes, at the destination too; beyond the end of a
    // smaller one above it nobody knows.
    if !chain[..=above.len()].is_sorted_by(|upper, lower| lower.virtual_size <= upper.virtual_size) {
        return Err("the volume was larger once".to_owned());
    }
    match destination.size {
        Some(size) if size == top.virtual_size => {}
        Some(_) => return Err("the destination has another size".to_owned()),
        None => return Err("the destination does not tell its size".to_owned()),
    }
    let layers = above.iter().rev().map(|layer| layer.node).collect();
    Ok(Plan::Difference { above: ancestor.node, layers })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::id::MirrorKey;

    const MIB: u64 = 1 << 20;

    /// A chain of nodes that all have a content, the top one first.
    fn chain(sizes: &[u64]) -> Vec<Layer> {
        let layer = |size: &u64| Layer {
            node: NodeId::random(),
            content: Some(ContentId::random()),
            virtual_size: *size * MIB,
        };
        sizes.iter().map(layer).collect()
    }

    fn session(sent: Sent) -> Session {
        let text = serde_json::json!({
            "format": 1, "sent": sent, "mirror": MirrorKey::random(), "node": NodeId::random(), "size": MIB,
            "updated": 0,
        });
        serde_json::from_value(text).unwrap()
    }

    fn announced(session: ContentId, base: Base) -> String {
        Announcement { session, base }.to_string()
    }

    /// Plans for a destination of the top's size.
    fn planned(chain: &[Layer], description: &str, known: &[(ContentId, Sent)]) -> Plan {
        let size = chain.first().map(|top| top.virtual_size);
        let known: BTreeMap<_, _> = known.iter().copied().collect();
        plan(chain, Destination { description: Some(description), size }, |id| {
            Ok(known.get(&id).copied().map(session))
        })
    }

    fn difference(chain: &[Layer], depth: usize) -> Plan {
        let layers = chain[..depth].iter().rev().map(|layer| layer.node).collect();
        Plan::Difference { above: chain[depth].node, layers }
    }

    fn reason(plan: &Plan) -> &str {
        match plan {
            Plan::Full(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_layers_above_what_was_sent_before_are_sent() {
        let chain = chain(&[1, 1, 1]);
        let (session, base) = (ContentId::random(), ContentId::random());
        for depth in [1, 2] {
            let sent = Sent::Complete(chain[depth].content.unwrap());
            let plan = planned(&chain, &announced(session, Base::Content(base)), &[(base, sent)]);
            assert_eq!(plan, difference(&chain, depth));
        }
    }

    #[test]
    fn a_destination_with_the_content_of_a_node_of_ours_needs_no_session() {
        let chain = chain(&[1, 1, 1]);
        for depth in [1, 2] {
            let base = chain[depth].content.unwrap();
            for known in [vec![], vec![(base, Sent::Begun)], vec![(base, Sent::Spoiled)]] {
                let plan = planned(&chain, &announced(ContentId::random(), Base::Content(base)), &known);
                assert_eq!(plan, difference(&chain, depth));
            }
        }
    }

    #[test]
    fn of_two_ancestors_that_the_destination_may_have_the_nearer_one_counts() {
        let chain = chain(&[1, 1, 1, 1]);
        let base = chain[3].content.unwrap();
        let sent = Sent::Complete(chain[2].content.unwrap());
        let plan = planned(&chain, &announced(ContentId::random(), Base::Content(base)), &[(base, sent)]);
        assert_eq!(plan, difference(&chain, 2));
    }

    #[test]
    fn a_blank_destination_is_sent_everything_but_zeroes() {
        let session = ContentId::random();
        assert_eq!(planned(&chain(&[1]), &announced(session, Base::Blank), &[]), Plan::Blank);
    }

    #[test]
    fn a_session_in_which_something_was_sent_promises_nothing_any_more() {
        let chain = chain(&[1, 1]);
        let content = chain[1].content.unwrap();
        let session = ContentId::random();
        for sent in [Sent::Begun, Sent::Spoiled, Sent::Complete(content)] {
            for base in [Base::Blank, Base::Content(content)] {
                let plan = planned(&chain, &announced(session, base), &[(session, sent)]);
                assert!(reason(&plan).contains("was sent"), "{plan:?}");
            }
        }
    }

    #[test]
    fn what_is_not_known_makes_a_full_mirror_that_says_why() {
        let chain = chain(&[1, 1]);
        let (session, base) = (ContentId::random(), ContentId::random());
        let top = chain[0].content.unwrap();
        let known = announced(session, Base::Content(base));
        for (description, records, words) in [
            ("a disk".to_owned(), vec![], "not of this product"),
            (announced(session, Base::Unknown), vec![], "does not know"),
            (known.clone(), vec![], "not sent from here"),
            (known.clone(), vec![(base, Sent::Begun)], "not sent from here"),
            (known.clone(), vec![(base, Sent::Spoiled)], "not sent from here"),
            (known.clone(), vec![(base, Sent::Complete(ContentId::random()))], "no ancestor"),
            (known.clone(), vec![(base, Sent::Complete(top))], "no ancestor"),
            (announced(session, Base::Content(top)), vec![], "not sent from here"),
        ] {
            let plan = planned(&chain, &description, &records);
            assert!(reason(&plan).contains(words), "{plan:?}");
        }
        let destination = Destination { description: None, size: Some(MIB) };
        assert!(reason(&plan(&chain, destination, |_| Ok(None))).contains("announces nothing"));
        let destination = Destination { description: Some(&known), size: Some(MIB) };
        let unreadable = plan(&chain, destination, |_| Err(crate::Error::Internal("torn".to_owned())));
        assert!(reason(&unreadable).contains("torn"));
    }

    #[test]
    fn nodes_whose_content_nobody_named_are_no_ancestors() {
        let mut chain = chain(&[1, 1, 1]);
        let base = chain[2].content.take().unwrap();
        let plan = planned(&chain, &announced(ContentId::random(), Base::Content(base)), &[]);
        assert!(reason(&plan).contains("not sent from here"));
        let plan = planned(&[], &announced(ContentId::random(), Base::Content(base)), &[]);
        assert!(reason(&plan).contains("not sent from here"));
    }

    #[test]
    fn sizes_may_grow_on_the_way_and_not_shrink() {
        for (sizes, allowed) in [
            (&[3, 2, 1][..], true),
            (&[2, 2, 1], true),
            (&[2, 1, 2], false),
            (&[1, 2], false),
            (&[3, 1, 2, 1], false),
        ] {
            let chain = chain(sizes);
            let base = chain[sizes.len() - 1].content.unwrap();
            let plan = planned(&chain, &announced(ContentId::random(), Base::Content(base)), &[]);
            match allowed {
                true => assert_eq!(plan, difference(&chain, sizes.len() - 1)),
                false => assert!(reason(&plan).contains("larger once"), "{plan:?}"),
            }
        }
    }

    #[test]
    fn a_destination_of_another_or_an_unknown_size_gets_everything() {
        let chain = chain(&[2, 1]);
        let description = announced(ContentId::random(), Base::Content(chain[1].content.unwrap()));
        for (size, words) in [(None, "not tell"), (Some(MIB), "another size"), (Some(3 * MIB), "another size")] {
            let plan = plan(&chain, Destination { description: Some(&description), size }, |_| Ok(None));
            assert!(reason(&plan).contains(words), "{plan:?}");
        }
    }

    /// A disk's blocks that are not zero.
    type Disk = BTreeMap<u8, u8>;

    /// What a layer has of its own; zero is data too.
    fn written(disk: &Disk, own: &[(u8, u8)]) -> Disk {
        let mut disk = disk.clone();
        for (block, value) in own {
            match value {
                0 => drop(disk.remove(block)),
                value => drop(disk.insert(*block, *value)),
            }
        }
        disk
    }

    proptest! {
        /// Whatever true things are announced and recorded, the destination has the source's content afterwards.
        #[test]
        fn what_is_planned_from_true_words_gives_the_same_content(
            layers in prop::collection::vec(
                (prop::collection::vec((0..6_u8, 0..3_u8), 0..4), prop::bool::weighted(0.8)), 1..6),
            has in any::<prop::sample::Index>(),
            by_session in any::<bool>(),
            base_known in 0..3,
            written_since in prop::option::weighted(0.3, (0..6_u8, 0..3_u8)),
        ) {
            // Root first: what each layer reads as.
            let mut disks = vec![Disk::new()];
            for (own, _) in &layers {
                disks.push(written(&disks[disks.len() - 1], own));
            }
            let chain: Vec<Layer> = layers.iter().rev().map(|(_, named)| Layer {
                node: NodeId::random(),
                content: named.then(ContentId::random),
                virtual_size: MIB,
            }).collect();
            // The destination has what one of the layers, or nothing at all, reads as: nought is the blank disk.
            let has = has.index(disks.len());
            let layer = has.checked_sub(1).map(|depth| chain[chain.len() - 1 - depth]);
            let (session, token) = (ContentId::random(), ContentId::random());
            let mut known = Vec::new();
            let base = match (base_known, layer.map(|layer| layer.content)) {
                (0, _) => Base::Unknown,
                (_, None) => Base::Blank,
                (_, Some(None)) => Base::Content(token),
                (_, Some(Some(content))) if by_session => {
                    known.push((token, Sent::Complete(content)));
                    Base::Content(token)
                }
                (_, Some(Some(content))) => Base::Content(content),
            };
            let mut disk = disks[has].clone();
            if let Some(write) = written_since {
                disk = written(&disk, &[write]);
                known.push((session, Sent::Begun));
            }
            let sent = match planned(&chain, &announced(session, base), &known) {
                Plan::Full(_) => disks[layers.len()].clone(),
                // Zeroes are not sent, which must not matter.
                Plan::Blank => disk.into_iter().chain(disks[layers.len()].clone()).collect(),
                Plan::Difference { layers: sent, .. } => {
                    let own = |node: &NodeId| {
                        let depth = chain.iter().rev().position(|layer| layer.node == *node).unwrap();
                        &layers[depth].0
                    };
                    sent.iter().fold(disk, |disk, node| written(&disk, own(node)))
                }
            };
            prop_assert_eq!(&sent, &disks[layers.len()]);
        }
    }
}
