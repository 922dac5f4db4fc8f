//! Mirrors, as every call but their supervisor sees them: a record each, and a way to end them.
//!
//! ```text
//!   Data.mirror ──makes──► <run>/mirrors/<key>/state.json ◄──writes── supervisor ──QMP──► storage daemon
//!                                   ▲          ▲                          ▲
//!   Data.stat ──────────────reads───┘          │                          │
//!   Datapath.deactivate, Volume.snapshot ──────┴─────control.sock: end ───┘
//! ```
//!
//! A mirror that was reported complete and broke later is the one thing that xapi cannot see: it asks once more and
//! then only deactivates the source (xen-api `ocaml/xapi/storage_smapiv3_migrate.ml`). So Datapath.deactivate fails
//! for it, until a call shows that xapi knows: see [`MirrorRecord::must_be_told`].

mod announcement;
mod blocks;
mod control;
mod ending;
pub mod job;
mod people;
mod plan;
mod record;
mod session;
mod speed;

pub use announcement::{Announcement, Base};
pub use blocks::{Blocks, Range};
pub use control::{EndReply, EndRequest, How};
pub use ending::{
    acknowledge, before_deactivate, before_detach, end, end_for_snapshot, end_unless_running, forget_gone,
    forget_volume, is_running, reap, source_activated, start_lock,
};
pub use people::{ForPeople, summary};
pub use plan::{Destination, Layer, Plan, layers, plan};
pub use record::{MirrorRecord, Phase, Progress, Unreadable, WHOLE, now};
pub use session::{Sent, Session, Sessions};
pub use speed::{Speed, Speedometer};

/// The pseudo domain under which a mirror opens a volume that is not active.
pub const OFFLINE_DOMAIN: &str = "mirror";
