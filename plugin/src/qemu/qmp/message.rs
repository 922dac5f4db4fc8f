//! What a monitor sends, decoded as far as it takes to route it.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::error::Error;

/// An event, with whatever data its name implies.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, known to us or not.
    pub name: String,
    /// Its data; null when it has none.
    pub data: Value,
}

/// A command's return value, or the refusal.
pub(super) type Answer = Result<Value, Refusal>;

/// Why the daemon refused a command.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Refusal {
    class: String,
    desc: String,
}

impl Refusal {
    /// Makes this crate's error of it.
    pub fn into_error(self, command: &str) -> Error {
        if self.desc.contains("No space left on device") || self.desc.contains("Disk quota exceeded") {
            return Error::NoSpace { doing: format!("QMP {command}"), source: None };
        }
        Error::Qmp { command: command.to_owned(), class: self.class, desc: self.desc }
    }
}

/// One message.
pub(super) enum Message {
    /// An answer to the command with this id.
    Answer(u64, Answer),
    /// An event.
    Event(Event),
}

/// The fields by which messages are told apart.
#[derive(Deserialize)]
struct Raw {
    #[serde(default, deserialize_with = "some")]
    r#return: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    id: Option<u64>,
    #[serde(rename = "QMP")]
    greeting: Option<IgnoredAny>,
}

/// Decodes a value that is there, even `null`.
fn some<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl Message {
    /// Decodes one line.
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        let raw: Raw =
            serde_json::from_slice(line).map_err(|error| format!("the monitor sent what is no message: {error}"))?;
        match raw {
            Raw { event: Some(name), data, .. } => Ok(Self::Event(Event { name, data })),
            Raw { id: Some(id), error: Some(refusal), .. } => Ok(Self::Answer(id, Err(refusal))),
            Raw { id: Some(id), r#return: Some(value), .. } => Ok(Self::Answer(id, Ok(value))),
            // What cannot be parsed has no id to answer to.
            Raw { error: Some(refusal), .. } => Err(format!("the monitor did not understand: {}", refusal.desc)),
            // Whoever was greeted has to begin anew, and what was sent meanwhile may have been refused.
            Raw { greeting: Some(_), .. } => Err("the monitor greeted twice".to_owned()),
            _ => Err("the monitor sent neither an answer nor an event".to_owned()),
        }
    }
}
