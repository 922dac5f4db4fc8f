//! A plan carried out on a VM: data through the NBD export of each active disk, the rest by the VM itself.

use std::collections::BTreeMap;
use std::future::Future;

use anyhow::{Context, Result};
use bytes::Bytes;

use super::{Action, Extent, Plan, Step, fill};
use crate::nbd::{Client, Uri};

/// The longest write of the executor, in bytes.
const PIECE: u64 = 1 << 20;

/// A VM that a plan is carried out on.
pub trait Machine {
    /// Where the active disk can be written now; makes it so if it is not, as for a halted VM.
    fn export(&mut self, disk: usize) -> impl Future<Output = Result<Uri>> + Send;

    /// Takes a snapshot of the VM. Exports of a running VM stay as they are, with their clients.
    fn snapshot(&mut self, name: &str) -> impl Future<Output = Result<()>> + Send;

    /// Reverts the VM. No client is connected; exports are asked for anew afterwards.
    fn revert(&mut self, name: &str) -> impl Future<Output = Result<()>> + Send;

    /// Destroys a snapshot of the VM. Exports of a running VM stay as they are, with their clients.
    fn destroy(&mut self, name: &str) -> impl Future<Output = Result<()>> + Send;

    /// Resizes a disk. No client is connected to it, nor to any other disk of a VM that is to be halted; exports that had
    /// no client are asked for anew afterwards.
    fn resize(&mut self, disk: usize, size: u64) -> impl Future<Output = Result<()>> + Send;
}

/// Carries out every step and leaves no client connected; `done` is told the number of steps that are done.
///
/// # Errors
/// The first step that fails, by its number.
pub async fn run<M: Machine>(plan: &Plan, machine: &mut M, mut done: impl FnMut(usize)) -> Result<()> {
    let mut clients = Clients { connected: BTreeMap::new() };
    for (index, step) in plan.steps.iter().enumerate() {
        one(plan, step, machine, &mut clients).await.with_context(|| format!("steps[{index}]: {step:?}"))?;
        done(index + 1);
    }
    clients.leave_all().await
}

async fn one<M: Machine>(plan: &Plan, step: &Step, machine: &mut M, clients: &mut Clients) -> Result<()> {
    match step {
        Step::Snapshot(name) => {
            if plan.halted {
                clients.leave_all().await?;
            }
            machine.snapshot(name).await
        }
        Step::Revert(name) => {
            clients.leave_all().await?;
            machine.revert(name).await
        }
        Step::Destroy(name) => machine.destroy(name).await,
        Step::Disk { disk, action: Action::Resize(size) } => {
            // A halted VM is shut down for it, and that takes every disk's export away.
            if plan.halted {
                clients.leave_all().await?;
            }
            clients.leave(*disk).await?;
            machine.resize(*disk, *size).await
        }
        Step::Disk { disk, action } => {
            let client = clients.to(*disk, machine).await?;
            change(&client, *action).await
        }
    }
}

async fn change(client: &Client, action: Action) -> Result<()> {
    match action {
        Action::Write { range, seed } => {
            for Extent { offset, length } in pieces(range) {
                let mut data = vec![0; length as usize];
                fill(&mut data, offset, seed);
                client.write(offset, Bytes::from(data)).await?;
            }
        }
        Action::Discard(range) => {
            for Extent { offset, length } in pieces(range) {
                client.trim(offset, length as u32).await?;
            }
        }
        Action::Zero(range) => {
            for Extent { offset, length } in pieces(range) {
                client.write_zeroes(offset, length as u32).await?;
            }
        }
        Action::Resize(_) => {}
    }
    Ok(())
}

/// Cuts an extent at multiples of [`PIECE`], so that no piece divides a cluster that lies in it whole.
fn pieces(range: Extent) -> impl Iterator<Item = Extent> {
    let mut offset = range.offset;
    std::iter::from_fn(move || {
        let end = range.end().min((offset / PIECE + 1) * PIECE);
        let piece = Extent { offset, length: end.checked_sub(offset).filter(|length| *length > 0)? };
        offset = end;
        Some(piece)
    })
}

/// The connections that are open, by disk.
struct Clients {
    connected: BTreeMap<usize, Client>,
}

impl Clients {
    async fn to<M: Machine>(&mut self, disk: usize, machine: &mut M) -> Result<Client> {
        if let Some(client) = self.connected.get(&disk) {
            return Ok(client.clone());
        }
        let uri = machine.export(disk).await?;
        let client = Client::connect(&uri).await?;
        self.connected.insert(disk, client.clone());
        Ok(client)
    }

    async fn leave(&mut self, disk: usize) -> Result<()> {
        if let Some(client) = self.connected.remove(&disk) {
            client.flush().await?;
            client.disconnect().await;
        }
        Ok(())
    }

    async fn leave_all(&mut self) -> Result<()> {
        while let Some(disk) = self.connected.keys().next().copied() {
            self.leave(disk).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_an_extent_and_end_at_round_offsets() {
        let range = Extent { offset: PIECE - 3, length: PIECE + 10 };
        let cut: Vec<_> = pieces(range).map(|piece| (piece.offset, piece.length)).collect();
        assert_eq!(cut, [(PIECE - 3, 3), (PIECE, PIECE), (2 * PIECE, 7)]);
        assert_eq!(pieces(Extent { offset: 5, length: 0 }).count(), 0);
    }
}
