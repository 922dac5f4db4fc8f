//! An entry in the journal's own protocol (systemd's docs/JOURNAL_NATIVE_PROTOCOL.md).

use super::IDENTIFIER;
use super::layer::Entry;
use super::syslog::FACILITY;

/// What the names of our fields begin with; the journal has names of its own for the others.
const PREFIX: &str = "QCOW2_";

/// Encodes an entry: a field for each value.
pub(super) fn encode(entry: &Entry<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    put(&mut bytes, "MESSAGE", &text(entry));
    put(&mut bytes, "PRIORITY", &entry.severity().to_string());
    put(&mut bytes, "SYSLOG_FACILITY", &FACILITY.to_string());
    put(&mut bytes, "SYSLOG_IDENTIFIER", IDENTIFIER);
    put(&mut bytes, "SYSLOG_PID", &std::process::id().to_string());
    put(&mut bytes, "CODE_MODULE", entry.module);
    for (name, value) in &entry.fields {
        put(&mut bytes, &format!("{PREFIX}{}", name.to_ascii_uppercase().replace('.', "_")), value);
    }
    bytes
}

/// Gives what `journalctl` shows without being asked for fields: the message with what it is about.
fn text(entry: &Entry<'_>) -> String {
    let shown = ["method", "volume", "mirror", "outcome", "error", "lost"];
    let fields = entry.fields.iter().filter(|(name, _)| shown.contains(name));
    fields.fold(entry.message.clone(), |text, (name, value)| format!("{text} {name}={value}"))
}

/// Adds a field; one of several lines has its length before it.
fn put(bytes: &mut Vec<u8>, name: &str, value: &str) {
    bytes.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        bytes.push(b'\n');
        bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        bytes.push(b'=');
    }
    bytes.extend_from_slice(value.as_bytes());
    bytes.push(b'\n');
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn a_value_of_several_lines_cannot_make_a_field_of_its_own() {
        let fields = vec![("dbg", "x\nPRIORITY=0".to_owned()), ("sr", "s1".to_owned())];
        let entry = Entry { level: Level::ERROR, module: "m", message: "failed".to_owned(), fields };
        let bytes = encode(&entry);
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("MESSAGE=failed\nPRIORITY=3\nSYSLOG_FACILITY=18\n"), "{text}");
        let mut expected = b"QCOW2_DBG\n".to_vec();
        expected.extend_from_slice(&12_u64.to_le_bytes());
        expected.extend_from_slice(b"x\nPRIORITY=0\nQCOW2_SR=s1\n");
        assert!(bytes.ends_with(&expected), "{text}");
    }
}
