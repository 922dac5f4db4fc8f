//! What qemu-img has said of small files: the same bytes give the same answer.
//!
//! Thousands of cases that begin with copies of one SR ask it the same again and again, and most of the answer's time is
//! the process's start.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::Hasher;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;

/// What larger files take is better left to qemu-img, in bytes on disk.
const SMALL: u64 = 1 << 20;

/// And what has holes that take longer to read than an answer does, in bytes: a file is made longer when it takes data under
/// a guest.
const SHORT: u64 = 16 << 20;

/// What was asked: the kind of answer, and the length and two hashes of each file.
type Question = (TypeId, Vec<[u64; 3]>);

static KNOWN: Mutex<Option<HashMap<Question, Box<dyn Any + Send>>>> = Mutex::new(None);

/// Gives the answer to a question that depends on nothing but the content of the files; each kind of question has an
/// answer of its own type. Only what succeeds is remembered.
///
/// # Errors
/// Those of the question.
pub fn of<T: Any + Clone + Send>(files: &[&Path], ask: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(files) = files.iter().map(|file| bytes(file)).collect::<Option<Vec<_>>>() else { return ask() };
    let key = (TypeId::of::<T>(), files);
    let lock = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = lock().as_ref().and_then(|known| known.get(&key)?.downcast_ref::<T>().cloned()) {
        return Ok(known);
    }
    let answer = ask()?;
    lock().get_or_insert_default().insert(key, Box::new(answer.clone()));
    Ok(answer)
}

/// Gives what tells a small file's content from others'.
fn bytes(file: &Path) -> Option<[u64; 3]> {
    let metadata = std::fs::metadata(file).ok()?;
    if metadata.blocks() * 512 > SMALL || metadata.len() > SHORT {
        return None;
    }
    let content = std::fs::read(file).ok()?;
    let hash = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        hasher.write_u8(salt);
        hasher.write(&content);
        hasher.finish()
    };
    Some([content.len() as u64, hash(0), hash(1)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_once_is_asked_again_only_of_other_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let [one, same, other] = ["one", "same", "other"].map(|name| directory.path().join(name));
        for (file, content) in [(&one, b"content"), (&same, b"content"), (&other, b"CONTENT")] {
            std::fs::write(file, content).unwrap();
        }
        let mut asked = 0;
        let mut ask = |files: &[&Path]| {
            of(files, || {
                asked += 1;
                Ok(asked)
            })
            .unwrap()
        };
        assert_eq!([ask(&[&one]), ask(&[&same]), ask(&[&other])], [1, 1, 2]);
        assert_eq!([ask(&[&one, &other]), ask(&[&one])], [3, 1]);
        std::fs::write(&one, b"changed").unwrap();
        assert_eq!(ask(&[&one]), 4);
    }

    #[test]
    fn another_kind_of_question_has_another_answer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(of(&[file.path()], || Ok(1_u8)).unwrap(), 1);
        assert_eq!(of(&[file.path()], || Ok("one")).unwrap(), "one");
        assert!(of::<i64>(&[file.path()], || anyhow::bail!("no answer")).is_err());
        assert_eq!(of(&[file.path()], || Ok(3_i64)).unwrap(), 3);
    }
}
