//! How a script says that it failed.

use super::json::{Json, Malformed};

/// A failed script call, as SMAPIv2 sees it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code} {params:?}")]
pub struct Failure {
    /// The error code, passed on verbatim.
    pub code: String,
    /// The parameters of the code.
    pub params: Vec<String>,
    /// Where it happened; absent when the failure is the caller's own.
    pub backtrace: Option<Backtrace>,
}

/// The backtrace that goes with every error of a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backtrace {
    /// The exception.
    pub error: String,
    /// Source files, innermost first.
    pub files: Vec<String>,
    /// Lines in them.
    pub lines: Vec<i64>,
}

impl Failure {
    /// A failure that the caller of the script makes up, without a backtrace.
    pub fn own(code: &str, params: &[&str]) -> Self {
        Self { code: code.into(), params: params.iter().map(|p| (*p).to_owned()).collect(), backtrace: None }
    }

    /// What becomes of an answer that breaks the protocol.
    pub fn script_failed(script: &str, description: &str, cause: &str) -> Self {
        Self::own("SCRIPT_FAILED", &[script, description, cause])
    }

    /// Decodes the error document of a script that exited non-zero.
    ///
    /// # Errors
    /// A missing, null or partial backtrace, or a parameter that is no string: the code is then lost.
    pub fn decode(value: &Json) -> Result<Self, Malformed> {
        let fields = value.fields("error")?;
        Ok(Self {
            code: fields.required("code", Json::string)?,
            params: fields.required("params", Json::strings)?,
            backtrace: Some(fields.required("backtrace", |v, at| {
                let fields = v.fields(at)?;
                Ok(Backtrace {
                    error: fields.required("error", Json::string)?,
                    files: fields.required("files", Json::strings)?,
                    lines: fields.required("lines", |v, at| v.array(at)?.iter().map(|n| n.int(at)).collect())?,
                })
            })?),
        })
    }

    /// The host that holds the volume, if this is how a plugin says so: by the parameters, whatever the code.
    #[must_use]
    pub fn activated_on_another_host(&self) -> Option<&str> {
        match self.params.as_slice() {
            [tag, host] if tag == "Activated_on_another_host" => Some(host),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(text: &str) -> Result<Failure, Malformed> {
        Failure::decode(&Json::parse(text.as_bytes()).unwrap())
    }

    #[test]
    fn a_full_error_is_decoded() {
        let failure =
            decode(r#"{"code":"C","params":["a"],"backtrace":{"error":"e","files":["f"],"lines":[1]}}"#).unwrap();
        assert_eq!((failure.code.as_str(), failure.params.as_slice()), ("C", &["a".to_owned()][..]));
        assert_eq!(failure.backtrace.unwrap().lines, [1]);
    }

    #[test]
    fn an_error_that_lacks_anything_is_refused() {
        for bad in [
            r#"{"code":"C","params":[]}"#,
            r#"{"code":"C","params":[],"backtrace":null}"#,
            r#"{"code":"C","params":[],"backtrace":{"error":"e","files":[]}}"#,
            r#"{"code":"C","params":[1],"backtrace":{"error":"e","files":[],"lines":[]}}"#,
            r#"{"code":"C","params":[],"backtrace":{"error":"e","files":[],"lines":["1"]}}"#,
            r#"{"code":1,"params":[],"backtrace":{"error":"e","files":[],"lines":[]}}"#,
            r#"{"params":[],"backtrace":{"error":"e","files":[],"lines":[]}}"#,
        ] {
            assert!(decode(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn the_other_host_is_known_by_the_parameters_alone() {
        assert_eq!(Failure::own("X", &["Activated_on_another_host", "u"]).activated_on_another_host(), Some("u"));
        assert_eq!(Failure::own("Activated_on_another_host", &["u"]).activated_on_another_host(), None);
    }
}
