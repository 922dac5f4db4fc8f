//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use plugin::id::VolumeKey;

/// What `--help` prints.
pub const USAGE: &str = "\
usage: xapi-storage-qcow2 tree <sr> [<volume>] [--dot | --json]
       xapi-storage-qcow2 check <sr> [--fast] [--repair] [--json]
       xapi-storage-qcow2 status [--watch] [--json]
       xapi-storage-qcow2 --help | --version

<sr> is the directory of an SR, or the uuid of one that is attached on this host.

tree    draws the trees of an SR, or that of one volume: what lies on what, sizes, who has what active.
        Reads only, and takes no lock.
check   holds records, images, symlinks, daemons and mirrors against each other, and says what does not agree.
        --fast     does not have qemu-img check each image that nobody writes to
        --repair   puts right what leaves no doubt, and makes lost or torn records of trees anew
status  says what this host does: SRs, daemons, mirrors and how far they are, what failed last.
        --watch    goes on until no mirror does and no space is brought back
--dot   for graphviz, --json for programs.

Exit status: 0 all is well, 1 something was found or failed, 2 wrong usage.
";

/// How something is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// For people.
    Text,
    /// For graphviz.
    Dot,
    /// For programs.
    Json,
}

/// How an SR is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Images are not looked into.
    pub fast: bool,
    /// What can be put right is.
    pub repair: bool,
    /// The report is for programs.
    pub json: bool,
}

/// How a host's status is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatusOptions {
    /// Again and again, until nothing goes on.
    pub watch: bool,
    /// For programs.
    pub json: bool,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Say how the program is used.
    Help,
    /// Say which version it is.
    Version,
    /// Draw trees.
    Tree {
        /// The SR's directory or uuid.
        sr: PathBuf,
        /// The volume whose tree is asked for; all trees without one.
        volume: Option<VolumeKey>,
        /// How they are shown.
        form: Form,
    },
    /// Check an SR.
    Check {
        /// The SR's directory or uuid.
        sr: PathBuf,
        /// How.
        options: Options,
    },
    /// Say what this host does.
    Status(StatusOptions),
}

/// Reads the arguments behind the program's name.
///
/// # Errors
///
/// What is wrong with them, in words.
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Command, String> {
    let (mut flags, mut words) = (Vec::new(), Vec::new());
    let mut only_words = false;
    for argument in arguments {
        match argument.to_str() {
            Some("--") if !only_words => only_words = true,
            Some(flag) if flag.starts_with('-') && flag.len() > 1 && !only_words => flags.push(flag.to_owned()),
            _ => words.push(argument),
        }
    }
    let asks = |names: [&str; 2]| flags.iter().any(|flag| names.contains(&flag.as_str()));
    if asks(["--help", "-h"]) {
        return Ok(Command::Help);
    }
    if asks(["--version", "-V"]) {
        return Ok(Command::Version);
    }
    let mut words = words.into_iter();
    let name = words.next().ok_or("it is not said what is to be done")?;
    let name = name.to_str().unwrap_or_default();
    let known: &[&str] = match name {
        "tree" => &["--dot", "--json"],
        "check" => &["--fast", "--repair", "--json"],
        "status" => &["--watch", "--json"],
        _ => return Err(format!("there is no command {name:?}")),
    };
    if let Some(unknown) = flags.iter().find(|flag| !known.contains(&flag.as_str())) {
        return Err(format!("{name} has no option {unknown}"));
    }
    let has = |name: &str| flags.iter().any(|flag| flag == name);
    let mut sr = || words.next().filter(|sr| !sr.is_empty()).map(PathBuf::from).ok_or(format!("{name} needs an SR"));
    let command = if name == "status" {
        Command::Status(StatusOptions { watch: has("--watch"), json: has("--json") })
    } else if name == "check" {
        let sr = sr()?;
        let options = Options { fast: has("--fast"), repair: has("--repair"), json: has("--json") };
        Command::Check { sr, options }
    } else {
        let sr = sr()?;
        let volume = words.next().map(|word| word.to_string_lossy().parse::<VolumeKey>());
        let volume = volume.transpose().map_err(|error| error.to_string())?;
        let form = match (has("--dot"), has("--json")) {
            (true, true) => return Err("--dot and --json are two forms".to_owned()),
            (true, false) => Form::Dot,
            (false, true) => Form::Json,
            (false, false) => Form::Text,
        };
        Command::Tree { sr, volume, form }
    };
    match words.next() {
        Some(more) => Err(format!("{name} does not take {more:?} as well")),
        None => Ok(command),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn options_stand_anywhere() {
        let options = Options { fast: true, repair: true, json: false };
        for line in ["check --fast --repair /a", "--repair check /a --fast", "check --repair --fast -- /a"] {
            assert_eq!(of(line), Ok(Command::Check { sr: "/a".into(), options }), "{line}");
        }
        let volume = VolumeKey::random();
        let expected = Command::Tree { sr: "/a".into(), volume: Some(volume), form: Form::Dot };
        assert_eq!(of(&format!("tree /a --dot {volume}")), Ok(expected));
        assert_eq!(of("tree /a --help"), Ok(Command::Help));
        assert_eq!(of("--json status"), Ok(Command::Status(StatusOptions { watch: false, json: true })));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "",
            "grow /a",
            "status /a",
            "status --dot",
            "check",
            "check /a /b",
            "check /a --dot",
            "tree /a b",
            "tree /a --dot --json",
            "-x",
        ] {
            assert!(of(line).is_err(), "{line}");
        }
    }
}
