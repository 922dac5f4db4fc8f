//! Operations that reach beyond the record: begun by writing an intent down, ended by taking it out again.

use super::header::Header;
use super::locked::LockedTree;
use super::plan;
use super::tree::{Intent, Tree};
use crate::error::Result;
use crate::id::VolumeKey;
use crate::qemu::img;

impl LockedTree {
    /// Grows the node of a volume that nobody has open, and that nothing lies on.
    ///
    /// # Errors
    ///
    /// When it cannot be grown; it then has its old size, or its new one if only the last step failed and is done
    /// by the next call.
    pub fn grow(&mut self, key: VolumeKey, virtual_size: u64) -> Result<()> {
        let image = self.checked_image(self.volume(key)?.node)?;
        let intent = Intent::Resize { volume: key, node: image.node, virtual_size };
        self.commit(plan::with_intent(&self.tree, intent)?)?;
        let grown = img::resize(&image.path, virtual_size);
        let ended = self.end_resize();
        grown.and(ended)
    }

    /// Ends a resize as far as it came, which the file's header tells.
    fn end_resize(&mut self) -> Result<()> {
        let Some(Intent::Resize { node, virtual_size, .. }) = self.tree.intent else {
            return Ok(());
        };
        let header = Header::read(&self.image(node)?.path)?;
        let after: Tree = if header.virtual_size == virtual_size {
            plan::rolled_forward(&self.tree)
        } else {
            plan::rolled_back(&self.tree)
        };
        self.commit(after)
    }
}
