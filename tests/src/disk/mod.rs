//! Disks judged by QEMU's own tools and by the files of an SR, never by the code under test.
//!
//! - [`qemu_img`] runs qemu-img: chains, comparison, checks, raw copies, allocation. Every image may be in use.
//! - [`known`] remembers what it has said of small files.
//! - [`Sr`] reads an SR's directory: the backing links in the qcow2 headers, and the records beside them.
//! - [`Topology`] is which volume's content is based on which other's, nodes that no volume names contracted away.
//! - [`judge()`] holds the pairs of a migration against each other.
//!
//! All of it blocks: call it from a blocking task where others wait.

mod content;
mod judge;
pub mod known;
pub mod qemu_img;
mod quiet;
mod sr;
mod topology;

pub use content::{Fingerprint, RawCopy};
pub use judge::{Judgement, Pair, Shape, judge, model_holds};
pub use sr::{Inventory, Links, Node, Sr, Tree};
pub use topology::Topology;
