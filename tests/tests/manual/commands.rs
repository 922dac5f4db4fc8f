//! The commands in the documents: where they stand, and what is one.

use std::path::{Path, PathBuf};

/// A line or a block of lines that a reader may copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commands {
    /// The document, from the top of the sources.
    pub document: String,
    /// The line on which it begins, from 1.
    pub line: usize,
    /// What is to be run.
    pub text: String,
}

/// What a command begins with; anything else in a block is output, a path, or a form.
const PROGRAMS: [&str; 18] = [
    "cargo",
    "cat",
    "cd",
    "du",
    "echo",
    "fake-xapi",
    "find",
    "flock",
    "journalctl",
    "make",
    "packaging/",
    "printf",
    "rpm",
    "systemctl",
    "xapi-storage-qcow2",
    "xe",
    "xe-toolstack-restart",
    "dpkg",
];

/// The top of the sources.
pub fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The documents that have commands.
pub fn documents() -> Vec<PathBuf> {
    let files = |directory: PathBuf| {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    };
    let mut documents = vec![top().join("README.md"), top().join("CONTRIBUTING.md")];
    documents
        .extend(files(top().join("docs")).into_iter().filter(|path| path.extension().is_some_and(|e| e == "md")));
    documents.extend(files(top().join("packaging/man")));
    documents
}

/// All commands of a document: blocks of `sh`, indented blocks, `.Dl` lines of manual pages.
pub fn commands(document: &Path) -> Vec<Commands> {
    let text = std::fs::read_to_string(document).unwrap();
    let name = document.strip_prefix(top()).unwrap().display().to_string();
    let at = |line: usize, text: &str| Commands { document: name.clone(), line: line + 1, text: text.to_owned() };
    let mut found = Vec::new();
    let mut fence: Option<(usize, &str, String)> = None;
    for (number, line) in text.lines().enumerate() {
        if let Some(language) = line.strip_prefix("```") {
            fence = match fence.take() {
                None => Some((number + 1, language, String::new())),
                Some((from, "sh", block)) => {
                    found.push(at(from, &block));
                    None
                }
                Some(_) => None,
            };
        } else if let Some((_, _, block)) = &mut fence {
            block.push_str(line);
            block.push('\n');
        } else if let Some(line) = line.strip_prefix(".Dl ") {
            found.push(at(number, &line.replace("\\(dq", "\"")));
        } else if let Some(line) = line.strip_prefix("    ").filter(|line| is_command(line)) {
            found.push(at(number, line));
        }
    }
    found
}

/// Whether a line is a command, and no form of one.
fn is_command(line: &str) -> bool {
    let begins = |program: &&str| {
        line.strip_prefix(*program)
            .is_some_and(|rest| program.ends_with('/') || rest.starts_with([' ', '-']) || rest.is_empty())
    };
    PROGRAMS.iter().any(begins) && !is_form(line)
}

/// Whether a line says how a command is called in general, with what may be left out or is to be put in.
pub fn is_form(line: &str) -> bool {
    let line = line.split(" #").next().unwrap_or_default();
    line.contains(" [")
        || line.contains(" | --")
        || line.contains('<') && line.contains("> ")
        || line.ends_with('>')
        || line.contains('…')
        || line.contains(" base=")
        || line.contains(" session=")
}

/// The lines of a document that say how a program is called in general.
pub fn forms(document: &Path, program: &str) -> Vec<String> {
    let text = std::fs::read_to_string(document).unwrap();
    let lines = text.lines().filter_map(|line| line.strip_prefix("    "));
    lines
        .filter(|line| line.starts_with(program) && is_form(line) && !line.contains(" session="))
        .map(str::to_owned)
        .collect()
}

#[test]
fn commands_are_told_from_forms_and_output() {
    for command in [
        "make demo",
        "fake-xapi demo --fail a:b",
        "xe sr-scan uuid=$SR",
        "packaging/dependencies.sh run",
        "make test   # all <of> it",
        "xapi-storage-qcow2-volume gc /mnt/fast",
    ] {
        assert!(is_command(command), "{command}");
    }
    for other in [
        "fake-xapi bench [GROUP]",
        "xapi-storage-qcow2 tree <sr> [<volume>]",
        "xapi ──SMAPIv2──►",
        "passed volume: Volume.destroy",
        "xapi-storage-qcow2-volume gc <sr uuid>",
        "makes nothing",
    ] {
        assert!(!is_command(other), "{other}");
    }
}
