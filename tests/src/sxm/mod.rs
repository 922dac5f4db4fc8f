//! Storage migration: the three flows, what they remember, and how they clean up.

mod state;

pub use state::{MirrorId, Receiving, Sending, State};
