//! A line for /dev/log, as syslog(3) writes it: `<priority>Nov 23 10:07:45 tag[pid]: text`.

use std::fmt::Write;
use std::time::SystemTime;

use super::IDENTIFIER;
use super::layer::Entry;
use crate::clock;

/// local2, which goes to /var/log/SMlog on XenServer, like all that storage managers say.
pub(super) const FACILITY: u8 = 18;

/// The most of a line; rsyslog takes 8096 bytes in one, others less.
const LINE_BYTES: usize = 4000;

/// Writes an entry on one line, its values behind the message as `name=value`. The time is in UTC, for the receivers take
/// their own: rsyslog's imuxsock and the journal pass over it.
pub(super) fn line(entry: &Entry<'_>, time: SystemTime) -> String {
    let priority = FACILITY << 3 | entry.severity();
    let (stamp, pid) = (clock::rfc3164(time), std::process::id());
    let mut line = format!("<{priority}>{stamp} {IDENTIFIER}[{pid}]: ");
    push(&mut line, &entry.message);
    for (name, value) in &entry.fields {
        // Writing to a string does not fail.
        let _ = write!(line, " {name}=");
        let is_plain = !value.is_empty() && !value.contains([' ', '"', '=']) && !value.contains(char::is_control);
        if is_plain {
            line.push_str(value);
        } else {
            let _ = write!(line, "{value:?}");
        }
    }
    if line.len() > LINE_BYTES {
        let end = (0..=LINE_BYTES).rev().find(|end| line.is_char_boundary(*end)).unwrap_or_default();
        line.truncate(end);
        line.push('…');
    }
    line
}

/// Adds text that is to stay on the line.
fn push(line: &mut String, text: &str) {
    line.extend(text.chars().map(|character| if character.is_control() { ' ' } else { character }));
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use tracing::Level;

    use super::*;

    fn written(message: &str, fields: Vec<(&'static str, String)>) -> String {
        let entry = Entry { level: Level::WARN, module: "plugin::gc", message: message.to_owned(), fields };
        line(&entry, UNIX_EPOCH + Duration::from_secs(1_795_428_465))
    }

    #[test]
    fn an_entry_is_one_line_whatever_is_in_it() {
        let fields = vec![("sr", "s1".to_owned()), ("dbg", "a \"task\"\nb".to_owned()), ("empty", String::new())];
        let expected = format!(
            "<148>Nov 23 10:07:45 xapi-storage-qcow2[{}]: one two sr=s1 dbg=\"a \\\"task\\\"\\nb\" empty=\"\"",
            std::process::id()
        );
        assert_eq!(written("one\ntwo", fields), expected);
    }

    #[test]
    fn a_line_has_a_bound() {
        assert!(written(&"é".repeat(LINE_BYTES), Vec::new()).len() <= LINE_BYTES + '…'.len_utf8());
    }
}
