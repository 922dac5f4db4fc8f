//! `status`: what this host does now: its SRs, daemons and mirrors, and what failed last.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::status::{Detail, Status, draw};

use crate::arguments::StatusOptions;

/// How often those who watch are shown what is new.
const EACH: Duration = Duration::from_millis(500);

/// Describes the host. Who watches is shown it again and again until nothing goes on any more, each time in the same place
/// if that is a terminal; what is given is the end then.
///
/// # Errors
///
/// None but what is this program's own fault: what cannot be read is shown in its place.
pub fn execute(host: &Host, options: StatusOptions) -> Result<String> {
    let mut screen = Screen { is_terminal: io::stdout().is_terminal(), lines: 0 };
    loop {
        let status = Status::of(host, Detail::Brief);
        let text = if options.json {
            let text = serde_json::to_string(&status);
            text.map_err(|error| Error::Internal(format!("the status cannot be encoded: {error}")))? + "\n"
        } else {
            draw(&status)
        };
        if !options.watch || !status.is_busy() {
            return Ok(screen.back() + &text);
        }
        screen.show(&text);
        std::thread::sleep(EACH);
    }
}

/// Where it is shown.
struct Screen {
    is_terminal: bool,
    /// Lines that are to be written over.
    lines: usize,
}

impl Screen {
    /// What takes a terminal back to where the last text began, and clears the rest (ECMA-48: CPL, ED).
    fn back(&self) -> String {
        if self.is_terminal && self.lines > 0 { format!("\u{1b}[{}F\u{1b}[J", self.lines) } else { String::new() }
    }

    fn show(&mut self, text: &str) {
        let text = self.back() + text;
        // Who has closed it does not want it.
        let mut stdout = io::stdout().lock();
        if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
            std::process::exit(0);
        }
        self.lines = text.lines().count();
    }
}
