//! The administrator's program `xapi-storage-qcow2`: draws an SR's trees, checks an SR, repairs what is safe, and says
//! what the host does.
//!
//! docs/commands.md describes it. It works on an SR that is attached, given by its uuid, and on any directory that holds
//! one. Exit status: 0 when all is well, 1 when something was found or failed, 2 when it was called wrongly.

mod arguments;
mod check;
mod place;
mod status;
mod tree;

use std::io::{self, Write};
use std::process::ExitCode;

use plugin::Error;
use plugin::host::Host;
use plugin::log::{self, LevelFilter};

use crate::arguments::Command;

/// Something was found, or failed.
const FOUND: u8 = 1;

/// The command line is not one.
const MISUSED: u8 = 2;

fn main() -> ExitCode {
    let command = match arguments::parse(std::env::args_os().skip(1)) {
        Ok(command) => command,
        Err(wrong) => {
            say(io::stderr(), &format!("xapi-storage-qcow2: {wrong}\n\n{}", arguments::USAGE));
            return ExitCode::from(MISUSED);
        }
    };
    log::start_for_people(LevelFilter::ERROR);
    let host = Host::from_environment();
    let done = match command {
        Command::Help => Ok((arguments::USAGE.to_owned(), true)),
        Command::Version => Ok((format!("xapi-storage-qcow2 {}\n", env!("CARGO_PKG_VERSION")), true)),
        Command::Tree { sr, volume, form } => tree::execute(&host, &sr, volume, form).map(|text| (text, true)),
        Command::Check { sr, options } => check::execute(&host, &sr, options),
        Command::Status(options) => status::execute(&host, options).map(|text| (text, true)),
    };
    match done {
        Ok((text, is_well)) => {
            say(io::stdout(), &text);
            if is_well { ExitCode::SUCCESS } else { ExitCode::from(FOUND) }
        }
        Err(error) => {
            say(io::stderr(), &format!("xapi-storage-qcow2: {}\n", error.told()));
            let is_misuse = matches!(error, Error::BadRequest(_) | Error::SrNotAttached(_));
            ExitCode::from(if is_misuse { MISUSED } else { FOUND })
        }
    }
}

/// Writes text to where people read; one who has closed it does not want it.
fn say(mut to: impl Write, text: &str) {
    drop(to.write_all(text.as_bytes()));
}
