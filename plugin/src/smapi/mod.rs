//! A SMAPIv3 script: one call in, one answer out.
//!
//! xapi-storage-script runs `<plugin directory>/<Method> --json` with one JSON object on standard input and reads
//! one JSON document from standard output; anything else there spoils the answer. static-vdis, which needs no xapi,
//! gives arguments instead of JSON. A failed call exits with
//! non-zero and an object of `code`, `params` and `backtrace` (xen-api `ocaml/xapi-storage-script/lib.ml`).
//!
//! An executable's table of [`Method`]s is all there is to know about what it answers:
//!
//! ```text
//! argv ──► choose ──► read stdin ──► parameters ──► execute ──► answer ──► stdout, exit status
//!             │            │              │             │
//!             └────────────┴── Error ─────┴─────────────┴─────► {code, params, backtrace}, exit 1
//! ```

mod about;
mod command_line;
mod types;

use std::ffi::OsString;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::Shortened;
use crate::log::{self, LevelFilter};
use crate::trace;
use about::About;
pub use types::{
    Backend, BlockList, ChangedBlocks, Configuration, DataStatus, Health, Keys, Operation, ProbeResult, QueryResult,
    SrStat, VolumeRecord, VolumeType, XenDisk, not_null,
};

/// One method of a plugin: its name as xapi spells the script, and what it does.
pub struct Method {
    /// The script's name, `Volume.create`.
    pub name: &'static str,
    /// Decodes the request, executes it and gives the answer; see [`typed`].
    pub call: fn(&Host, Value) -> Result<Answer>,
}

/// What a method answers, encoded when it is written: a list of thousands of volumes is then nowhere as a whole.
pub struct Answer(Box<Encode>);

/// Writes an answer.
type Encode = dyn FnOnce(&mut dyn Write) -> serde_json::Result<()>;

/// Joins a method's typed `execute` to the untyped table: decodes its parameters and encodes its answer.
///
/// # Errors
///
/// [`Error::BadRequest`] when a parameter is missing or of another type, else what `execute` gives.
pub fn typed<P, R>(host: &Host, request: Value, execute: fn(&Host, P) -> Result<R>) -> Result<Answer>
where
    P: DeserializeOwned,
    R: Serialize + 'static,
{
    let parameters =
        serde_json::from_value(request).map_err(|error| Error::BadRequest(shorten(&told(&error.to_string()))))?;
    let answer = execute(host, parameters)?;
    Ok(Answer(Box::new(move |output| serde_json::to_writer(output, &answer))))
}

/// Takes out of a decoder's error the value that is of a wrong type: in a device-config it may be a secret.
fn told(text: &str) -> String {
    let quoted = ["invalid type: ", "invalid value: "].iter().find_map(|begin| text.strip_prefix(begin));
    let parts = quoted.and_then(|rest| Some((rest.find(['"', '`'])?, rest.rfind(", expected ")?)));
    match (quoted, parts) {
        (Some(rest), Some((value, expected))) if value < expected => {
            format!("{}{}{}", &text[..text.len() - rest.len()], rest[..value].trim_end(), &rest[expected..])
        }
        _ => text.to_owned(),
    }
}

/// Keeps an error text that quotes the request from growing with it.
fn shorten(text: &str) -> String {
    match text.char_indices().nth(400) {
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], text.len()),
        None => text.to_owned(),
    }
}

/// Runs the call that this process was started for, and gives its exit status.
///
/// The method is `argv[0]`'s file name, or the first argument when the executable is called by its own name. With
/// `--list-methods` it prints the methods' names, one a line.
pub fn main(methods: &[Method]) -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let host = Host::from_environment();
    log::start(&host, LevelFilter::WARN);
    trace::begin(&host);
    let code = run(methods, &arguments, &host, &mut std::io::stdin().lock(), &mut StandardOutput);
    trace::end();
    code
}

/// Standard output without a buffer of its own. What the standard library's could not write it writes at the end of the
/// process, and there would be an answer beside the exit status of a failure.
struct StandardOutput;

impl Write for StandardOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs one call with everything it touches given: the same as [`main()`], for tests and for other front ends.
pub fn run(
    methods: &[Method],
    arguments: &[OsString],
    host: &Host,
    stdin: &mut dyn Read,
    stdout: &mut dyn Write,
) -> ExitCode {
    if arguments.get(1).is_some_and(|argument| argument == "--list-methods") {
        let names: String = methods.iter().map(|method| format!("{}\n", method.name)).collect();
        return written(stdout, names.as_bytes(), ExitCode::SUCCESS);
    }
    let begun = Instant::now();
    let chosen =
        choose(methods, arguments).and_then(|(method, rest)| match command_line::request(method.name, rest) {
            Some(request) => Ok((method, request?)),
            None => Ok((method, read(stdin)?)),
        });
    let (about, call) = match chosen {
        Ok((method, request)) => (About::of(method.name, &request), Ok((method.call, request))),
        Err(error) => (About::default(), Err(error)),
    };
    // Whatever is logged meanwhile says for which call it is.
    let span = about.span();
    let _entered = span.enter();
    let answer = call.and_then(|(call, request)| call(host, request));
    about.ended(host, begun.elapsed(), answer.as_ref().err());
    match answer {
        Ok(Answer(encode)) => {
            let mut output = BufWriter::new(stdout);
            let encoded = encode(&mut output).map_err(io::Error::from).and_then(|()| output.flush());
            if encoded.is_err() {
                // Dropped, it would try once more.
                drop(output.into_parts());
            }
            ended(encoded, ExitCode::SUCCESS)
        }
        Err(error) => {
            let chain = error.chain();
            let (code, params) = error.code();
            let backtrace = json!({"error": chain, "files": [], "lines": []});
            let value = json!({"code": code, "params": params, "backtrace": backtrace});
            written(stdout, value.to_string().as_bytes(), ExitCode::FAILURE)
        }
    }
}

/// Writes the one answer; a caller that does not read it is told by the exit status.
fn written(stdout: &mut dyn Write, bytes: &[u8], code: ExitCode) -> ExitCode {
    ended(stdout.write_all(bytes).and_then(|()| stdout.flush()), code)
}

fn ended(written: io::Result<()>, code: ExitCode) -> ExitCode {
    match written {
        Ok(()) => code,
        Err(error) => {
            tracing::error!(%error, "the answer could not be written");
            ExitCode::FAILURE
        }
    }
}

/// Finds the method that the arguments name, and gives the arguments behind the name. xapi spells one name in two ways
/// (`Plugin.query`, `Plugin.Query`).
fn choose<'a, 'b>(methods: &'a [Method], arguments: &'b [OsString]) -> Result<(&'a Method, &'b [OsString])> {
    let named = |name: &[u8]| methods.iter().find(|method| method.name.as_bytes().eq_ignore_ascii_case(name));
    let own_name = arguments.first().and_then(|argument| Path::new(argument).file_name());
    if let Some(method) = own_name.and_then(|name| named(name.as_bytes())) {
        return Ok((method, &arguments[1..]));
    }
    let Some(argument) = arguments.get(1) else {
        return Err(Error::BadRequest("no method: call this by a method's name, or give one as argument".to_owned()));
    };
    let method = named(argument.as_bytes()).ok_or_else(|| {
        Error::BadRequest(format!("{:?} is not a method of this plugin", Shortened(&argument.to_string_lossy())))
    })?;
    Ok((method, &arguments[2..]))
}

/// Reads the request.
fn read(stdin: &mut dyn Read) -> Result<Value> {
    let mut bytes = Vec::new();
    stdin.read_to_end(&mut bytes).map_err(|error| Error::io("reading the request", error))?;
    let request: Value = serde_json::from_slice(&bytes)
        .map_err(|error| Error::BadRequest(format!("the request is not JSON: {}", shorten(&error.to_string()))))?;
    if !request.is_object() {
        return Err(Error::BadRequest("the request is not a JSON object".to_owned()));
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo(host: &Host, request: Value) -> Result<Answer> {
        typed(host, request, |_, request: Value| Ok(request))
    }

    fn fail(_: &Host, _: Value) -> Result<Answer> {
        Err(Error::VolumeDoesNotExist("k1".to_owned()))
    }

    const METHODS: &[Method] =
        &[Method { name: "Volume.stat", call: echo }, Method { name: "Volume.destroy", call: fail }];

    /// Runs a call and gives its status (as printed, for comparison) and its answer.
    fn call_with(arguments: &[&str], stdin: &[u8]) -> (String, String) {
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        let mut stdout = Vec::new();
        let code = run(METHODS, &arguments, &Host::at("/dev/null"), &mut &stdin[..], &mut stdout);
        (format!("{code:?}"), String::from_utf8(stdout).unwrap())
    }

    #[test]
    fn the_link_chooses_the_method_whatever_its_case() {
        let success = format!("{:?}", ExitCode::SUCCESS);
        for name in ["/x/Volume.stat", "Volume.Stat"] {
            assert_eq!(call_with(&[name, "--json"], b"{}"), (success.clone(), "{}".to_owned()));
        }
        assert_eq!(call_with(&["/bin/plugin", "Volume.stat"], b"{}").0, success);
    }

    #[test]
    fn an_error_is_one_complete_object_and_a_failed_exit() {
        let (code, stdout) = call_with(&["Volume.destroy", "--json"], b"{}");
        assert_eq!(code, format!("{:?}", ExitCode::FAILURE));
        let value: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(value["code"], "Volume_does_not_exist");
        assert_eq!(value["params"], json!(["k1"]));
        assert_eq!(value["backtrace"], json!({"error": "volume k1 does not exist", "files": [], "lines": []}));
    }

    #[test]
    fn a_request_that_is_not_one_json_object_is_a_bad_request() {
        let deep = "[".repeat(100_000);
        for request in [&b""[..], b"[]", b"{", b"{}{}", b"null", b"{\"a\":\"\xff\"}", deep.as_bytes()] {
            let (_, stdout) = call_with(&["Volume.stat", "--json"], request);
            assert!(stdout.contains("SR_BACKEND_FAILURE_115"), "{stdout}");
        }
    }

    #[test]
    fn a_value_of_a_wrong_type_is_not_told() {
        for (wrong, expected) in [
            (json!({"password": 4711}), "invalid type: integer, expected a string"),
            (json!("4711"), "invalid type: string, expected a map"),
            (json!(["a, expected \"4711\""]), "invalid type: sequence, expected a map"),
            (json!({"a": {"4711": "b"}}), "invalid type: map, expected a string"),
        ] {
            let error = serde_json::from_value::<Configuration>(wrong).unwrap_err();
            assert_eq!(told(&error.to_string()), expected);
        }
        assert_eq!(told("missing field `sr`"), "missing field `sr`");
    }

    #[test]
    fn arguments_take_the_place_of_json_where_static_vdis_gives_them() {
        let (code, stdout) = call_with(&["/x/Volume.stat", "static-vdis", "s", "k"], b"");
        assert_eq!(code, format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(stdout, r#"{"dbg":"static-vdis","key":"k","sr":"s"}"#);
        assert_eq!(call_with(&["/bin/plugin", "Volume.stat", "static-vdis", "s", "k"], b"").1, stdout);
    }

    #[test]
    fn the_methods_are_listed_one_a_line() {
        assert_eq!(call_with(&["plugin", "--list-methods"], b"").1, "Volume.stat\nVolume.destroy\n");
    }
}
