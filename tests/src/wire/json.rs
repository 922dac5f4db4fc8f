//! A JSON value that keeps what the daemon distinguishes, its strict parser and its compact encoder.

use std::collections::HashSet;
use std::fmt::{self, Write as _};

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// A JSON value: integers are 64 bits and apart from floats, objects keep their order.
#[derive(Debug, Clone, PartialEq)]
pub enum Json {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number written without fraction and exponent, within 64 bits.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// A string.
    String(String),
    /// An array.
    Array(Vec<Json>),
    /// An object, fields in the order they were written.
    Object(Vec<(String, Json)>),
}

/// Says where an answer is not what its type asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{at}: expected {expected}, found {found}")]
pub struct Malformed {
    /// The path of the value, like `volume.keys.a`.
    pub at: String,
    /// What the type asks for.
    pub expected: String,
    /// What stands there.
    pub found: String,
}

impl Malformed {
    /// Makes one from the value found.
    pub fn new(at: impl Into<String>, expected: impl Into<String>, found: &Json) -> Self {
        let mut found = found.encode();
        if found.len() > 120 {
            let cut = (0..=120).rev().find(|i| found.is_char_boundary(*i)).unwrap_or(0);
            found.truncate(cut);
            found.push('…');
        }
        Self { at: at.into(), expected: expected.into(), found }
    }

    fn absent(at: String, expected: &str) -> Self {
        Self { at, expected: expected.into(), found: "nothing".into() }
    }
}

impl Json {
    /// Parses exactly one document, surrounded by nothing but white space.
    ///
    /// # Errors
    /// Text that is not JSON or has something before or after it, an integer beyond 64 bits, a field named twice.
    pub fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(text)
    }

    /// Encodes without white space, text as raw UTF-8, control characters as `\u00xx`.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut out = String::new();
        self.encode_to(&mut out);
        out
    }

    fn encode_to(&self, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Self::Int(n) => {
                let _ = write!(out, "{n}");
            }
            Self::Float(x) => {
                let _ = write!(out, "{x:?}");
            }
            Self::String(s) => encode_string(s, out),
            Self::Array(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    item.encode_to(out);
                }
                out.push(']');
            }
            Self::Object(fields) => {
                out.push('{');
                for (i, (name, value)) in fields.iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    encode_string(name, out);
                    out.push(':');
                    value.encode_to(out);
                }
                out.push('}');
            }
        }
    }

    /// Accepts `null` and nothing else.
    pub fn unit(&self, at: &str) -> Result<(), Malformed> {
        match self {
            Self::Null => Ok(()),
            other => Err(Malformed::new(at, "null", other)),
        }
    }

    /// Accepts a string.
    pub fn string(&self, at: &str) -> Result<String, Malformed> {
        match self {
            Self::String(s) => Ok(s.clone()),
            other => Err(Malformed::new(at, "a string", other)),
        }
    }

    /// Accepts `true` or `false`.
    pub fn bool(&self, at: &str) -> Result<bool, Malformed> {
        match self {
            Self::Bool(b) => Ok(*b),
            other => Err(Malformed::new(at, "a boolean", other)),
        }
    }

    /// Accepts a 64-bit integer in integer form.
    pub fn int(&self, at: &str) -> Result<i64, Malformed> {
        match self {
            Self::Int(n) => Ok(*n),
            other => Err(Malformed::new(at, "an integer", other)),
        }
    }

    /// Accepts any number.
    pub fn number(&self, at: &str) -> Result<f64, Malformed> {
        match self {
            #[expect(clippy::cast_precision_loss, reason = "a progress is a fraction")]
            Self::Int(n) => Ok(*n as f64),
            Self::Float(x) => Ok(*x),
            other => Err(Malformed::new(at, "a number", other)),
        }
    }

    /// Accepts an array.
    pub fn array(&self, at: &str) -> Result<&[Json], Malformed> {
        match self {
            Self::Array(items) => Ok(items),
            other => Err(Malformed::new(at, "an array", other)),
        }
    }

    /// Accepts an array of strings.
    pub fn strings(&self, at: &str) -> Result<Vec<String>, Malformed> {
        self.array(at)?.iter().enumerate().map(|(i, v)| v.string(&format!("{at}[{i}]"))).collect()
    }

    /// Accepts an object whose values are strings.
    pub fn string_map(&self, at: &str) -> Result<Vec<(String, String)>, Malformed> {
        match self {
            Self::Object(fields) => {
                fields.iter().map(|(k, v)| Ok((k.clone(), v.string(&format!("{at}.{k}"))?))).collect()
            }
            other => Err(Malformed::new(at, "an object of strings", other)),
        }
    }

    /// Accepts `["Tag", payload]`; a bare `"Tag"` is refused.
    pub fn variant(&self, at: &str) -> Result<(&str, &Json), Malformed> {
        match self {
            Self::Array(items) => match items.as_slice() {
                [Self::String(tag), payload] => Ok((tag, payload)),
                _ => Err(Malformed::new(at, "[\"Tag\", payload]", self)),
            },
            other => Err(Malformed::new(at, "[\"Tag\", payload]", other)),
        }
    }

    /// Accepts an object, whose fields can then be taken by name.
    pub fn fields<'a>(&'a self, at: &str) -> Result<Fields<'a>, Malformed> {
        match self {
            Self::Object(entries) => Ok(Fields { at: at.to_owned(), entries }),
            other => Err(Malformed::new(at, "an object", other)),
        }
    }
}

impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.encode())
    }
}

impl From<&str> for Json {
    fn from(s: &str) -> Self {
        Self::String(s.to_owned())
    }
}

impl From<&String> for Json {
    fn from(s: &String) -> Self {
        Self::String(s.clone())
    }
}

/// The fields of an object; those nobody asks for are ignored.
#[derive(Debug)]
pub struct Fields<'a> {
    at: String,
    entries: &'a [(String, Json)],
}

impl<'a> Fields<'a> {
    /// Decodes a field that has to be there.
    pub fn required<T>(
        &self,
        name: &str,
        decode: impl FnOnce(&'a Json, &str) -> Result<T, Malformed>,
    ) -> Result<T, Malformed> {
        let at = format!("{}.{name}", self.at);
        match self.get(name) {
            Some(value) => decode(value, &at),
            None => Err(Malformed::absent(at, "a value")),
        }
    }

    /// Decodes a field that may be absent; `null` is not absence.
    pub fn optional<T>(
        &self,
        name: &str,
        decode: impl FnOnce(&'a Json, &str) -> Result<T, Malformed>,
    ) -> Result<Option<T>, Malformed> {
        self.get(name).map(|value| decode(value, &format!("{}.{name}", self.at))).transpose()
    }

    fn get(&self, name: &str) -> Option<&'a Json> {
        self.entries.iter().find(|(k, _)| k == name).map(|(_, v)| v)
    }
}

fn encode_string(s: &str, out: &mut String) {
    out.push('"');
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\0'..='\u{1f}' | '\u{7f}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, b: bool) -> Result<Json, E> {
        Ok(Json::Bool(b))
    }

    fn visit_i64<E>(self, n: i64) -> Result<Json, E> {
        Ok(Json::Int(n))
    }

    fn visit_u64<E: de::Error>(self, n: u64) -> Result<Json, E> {
        i64::try_from(n).map(Json::Int).map_err(|_| E::custom(format!("{n} is beyond 64 bits, signed")))
    }

    fn visit_f64<E>(self, x: f64) -> Result<Json, E> {
        Ok(Json::Float(x))
    }

    fn visit_str<E>(self, s: &str) -> Result<Json, E> {
        Ok(Json::String(s.to_owned()))
    }

    fn visit_string<E>(self, s: String) -> Result<Json, E> {
        Ok(Json::String(s))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Json::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut fields: Vec<(String, Json)> = Vec::new();
        let mut names = HashSet::new();
        while let Some((name, value)) = map.next_entry::<String, Json>()? {
            if !names.insert(name.clone()) {
                return Err(de::Error::custom(format!("field {name:?} stands twice")));
            }
            fields.push((name, value));
        }
        Ok(Json::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_document_and_nothing_else_is_accepted() {
        assert_eq!(Json::parse(b" null\n").unwrap(), Json::Null);
        for bad in ["", "null null", "log line\nnull", "null\nlog", "{", "nul", "\"a\" x"] {
            assert!(Json::parse(bad.as_bytes()).is_err(), "{bad:?} was accepted");
        }
        assert!(Json::parse(b"\"\xff\"").is_err(), "text that is not UTF-8 was accepted");
    }

    #[test]
    fn integers_are_64_bits_and_no_floats() {
        assert_eq!(Json::parse(b"9223372036854775807").unwrap().int("x"), Ok(i64::MAX));
        assert_eq!(Json::parse(b"-1").unwrap().int("x"), Ok(-1));
        assert!(Json::parse(b"9223372036854775808").is_err());
        for float in ["1.0", "1e9", "-0.0", "99999999999999999999"] {
            let accepted = Json::parse(float.as_bytes()).ok().and_then(|v| v.int("x").ok());
            assert_eq!(accepted, None, "{float}");
        }
    }

    #[test]
    fn a_field_that_stands_twice_is_refused() {
        assert!(Json::parse(br#"{"a":1,"a":1}"#).is_err());
    }

    #[test]
    fn text_is_encoded_raw_and_control_characters_escaped() {
        let text = Json::String("a\"b\\c/ö\n\u{1}\u{7f}".into());
        assert_eq!(text.encode(), "\"a\\\"b\\\\c/ö\\u000a\\u0001\\u007f\"");
        assert_eq!(Json::parse(text.encode().as_bytes()).unwrap(), text);
    }

    #[test]
    fn null_is_no_absence() {
        let value = Json::parse(br#"{"a":null}"#).unwrap();
        let fields = value.fields("x").unwrap();
        assert_eq!(fields.optional("b", Json::string), Ok(None));
        assert!(fields.optional("a", Json::string).is_err());
        assert!(fields.required("b", Json::string).is_err());
    }
}
