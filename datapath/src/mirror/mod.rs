//! The supervisor of a mirror: a process of its own that lives as long as the mirror does.
//!
//! ```text
//!   storage daemon ── relay.sock ──► relay ── one connection ──► xapi's proxy ──► destination
//!         ▲                            ▲
//!        QMP (mirror.sock)             │ counts, cuts
//!         └────────── supervisor ──────┘◄── control.sock ── other calls
//! ```
//!
//! QEMU has no time-out for a peer that hangs, and waits for it in places where the guest waits too (docs/qemu.md). So
//! QEMU never holds the connection itself: it talks to the relay, and the supervisor cuts the relay when the peer owes
//! an answer for too long. The job then fails within milliseconds, and the guest goes on.
//!
//! A copy has the same supervisor, which reads and writes itself: see [`copy`].

mod control;
mod copy;
mod missed;
mod prepare;
mod progress;
mod relay;
mod send;
mod supervisor;
mod verify;

pub use supervisor::{ENTRY, main};
