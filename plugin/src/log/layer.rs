//! The layer that makes entries of the host's log: an event with the fields of the spans around it.

use std::fmt::{self, Debug, Write};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::sink::Sink;
use crate::host::Host;

/// The bytes that are kept of a value.
const VALUE_BYTES: usize = 2000;

/// One entry.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    /// How much it matters.
    pub level: Level,
    /// The module that says it.
    pub module: &'a str,
    /// What is said.
    pub message: String,
    /// The values with it, the outermost span's first.
    pub fields: Vec<(&'static str, String)>,
}

/// Writes entries to the host's log.
pub(super) struct HostLog {
    sink: Sink,
}

impl HostLog {
    pub fn new(host: &Host) -> Self {
        Self { sink: Sink::new(host) }
    }

    /// Tells whether the host has a log.
    pub fn is_there(&self) -> bool {
        self.sink.is_there()
    }
}

/// A span's fields, and in an event its message.
#[derive(Default)]
struct Fields {
    message: String,
    values: Vec<(&'static str, String)>,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.keep(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut text = String::new();
        // Writing to a string does not fail; what is written may, and is then as far as it came.
        let _ = write!(text, "{value:?}");
        self.keep(field, &text);
    }
}

impl Fields {
    fn keep(&mut self, field: &Field, value: &str) {
        let value = shortened(value);
        match field.name() {
            "message" => self.message = value,
            name => self.values.push((name, value)),
        }
    }
}

fn shortened(text: &str) -> String {
    let end = (0..=VALUE_BYTES.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    if end < text.len() { format!("{}…", &text[..end]) } else { text.to_owned() }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for HostLog {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut own = Fields::default();
        event.record(&mut own);
        let mut fields = Vec::new();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(found) = span.extensions().get::<Fields>() {
                fields.extend(found.values.iter().cloned());
            }
        }
        fields.append(&mut own.values);
        let metadata = event.metadata();
        let (level, module) = (*metadata.level(), metadata.target());
        self.sink.send(Entry { level, module, message: own.message, fields });
    }
}

impl fmt::Debug for HostLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HostLog")
    }
}

impl Entry<'_> {
    /// Gives the severity that syslog and the journal have for the level (RFC 5424, table 2).
    pub fn severity(&self) -> u8 {
        match self.level {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_value_is_cut_between_characters() {
        let text = "é".repeat(VALUE_BYTES);
        let kept = shortened(&text);
        assert!(kept.len() <= VALUE_BYTES + '…'.len_utf8() && kept.ends_with('…'));
        assert_eq!(shortened("short"), "short");
    }
}
