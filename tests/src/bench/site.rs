//! An SR made large quickly: trees that the plugin made are copied on disk under new uuids.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use uuid::Uuid;

/// Blocks of this size that are all zeroes are left out of a copied file.
const BLOCK: usize = 4096;
/// The length of a uuid as text.
const UUID: usize = 36;

/// Copies trees within an SR.
pub(super) struct Copier {
    trees: Vec<Template>,
    volumes: usize,
    copies: Vec<String>,
}

/// A tree as it is on disk.
struct Template {
    uuid: String,
    volumes: Vec<String>,
    /// Name and content of each file, the lock among them.
    files: Vec<(String, Vec<u8>)>,
}

impl Copier {
    /// Reads every tree of an SR; they are what is copied.
    pub(super) fn of(sr: &Path) -> Result<Self> {
        let mut volumes = BTreeMap::<String, Vec<String>>::new();
        for entry in fs::read_dir(sr.join("volumes"))? {
            let entry = entry?;
            let tree = fs::read_link(entry.path())?.file_name().context("a link to nowhere")?.to_owned();
            let name = entry.file_name().to_string_lossy().into_owned();
            volumes.entry(tree.to_string_lossy().into_owned()).or_default().push(name);
        }
        let mut trees: Vec<Template> = Vec::new();
        for (uuid, volumes) in &volumes {
            let mut files = Vec::new();
            for entry in fs::read_dir(sr.join("trees").join(uuid))? {
                let entry = entry?;
                files.push((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?));
            }
            trees.push(Template { uuid: uuid.clone(), volumes: volumes.clone(), files });
        }
        ensure!(!trees.is_empty(), "there is no tree to copy");
        // Those of one volume first: any even number of volumes is then met, and not leapt over.
        trees.sort_by_key(|tree| tree.volumes.len());
        Ok(Self { trees, volumes: volumes.values().map(Vec::len).sum(), copies: Vec::new() })
    }

    /// Copies until the SR has so many volumes. Nothing is synced: it is not for keeps.
    pub(super) fn fill(&mut self, sr: &Path, count: usize) -> Result<()> {
        while self.volumes < count {
            let template = &self.trees[self.copies.len() % self.trees.len()];
            self.copies.push(template.copy(sr)?);
            self.volumes += template.volumes.len();
        }
        Ok(())
    }

    /// The trees that were made.
    pub(super) fn copies(&self) -> &[String] {
        &self.copies
    }
}

impl Template {
    /// Makes a copy in which every uuid is another one; the copy's own.
    fn copy(&self, sr: &Path) -> Result<String> {
        let mut names = BTreeMap::from([(self.uuid.clone(), Uuid::new_v4().to_string())]);
        let images = self.files.iter().filter_map(|(name, _)| name.strip_suffix(".qcow2"));
        for old in self.volumes.iter().map(String::as_str).chain(images) {
            names.insert(old.to_owned(), Uuid::new_v4().to_string());
        }
        let directory = sr.join("trees").join(&names[&self.uuid]);
        fs::create_dir(&directory)?;
        for (name, content) in &self.files {
            let renamed = names.iter().fold(name.clone(), |name, (old, new)| name.replace(old, new));
            write_sparsely(&directory.join(renamed), content, &names)?;
        }
        for volume in &self.volumes {
            symlink(Path::new("../trees").join(&names[&self.uuid]), sr.join("volumes").join(&names[volume]))?;
        }
        Ok(names[&self.uuid].clone())
    }
}

/// Writes a file with other uuids in it, which are as long as the old ones: in a record as in a header.
fn write_sparsely(path: &Path, content: &[u8], names: &BTreeMap<String, String>) -> Result<()> {
    let mut content = content.to_vec();
    // Uuids stand only where text is: a record as a whole, an image's first block.
    let text = if path.extension().is_some_and(|e| e == "qcow2") { BLOCK.min(content.len()) } else { content.len() };
    let mut at = 0;
    while at + UUID <= text {
        let found = std::str::from_utf8(&content[at..at + UUID]).ok().and_then(|old| names.get(old));
        match found {
            Some(new) => {
                content[at..at + UUID].copy_from_slice(new.as_bytes());
                at += UUID;
            }
            None => at += 1,
        }
    }
    let file = File::create_new(path).with_context(|| path.display().to_string())?;
    for (index, block) in content.chunks(BLOCK).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, (index * BLOCK) as u64)?;
        }
    }
    file.set_len(content.len() as u64)?;
    Ok(())
}
