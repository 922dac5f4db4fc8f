//! A call: arguments and a request, as a script gets them, and the strings in it that are read further.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::Result;
use crate::host::Host;
use crate::id::{Domain, MirrorKey, SrUuid, VolumeKey, VolumeUri};
use crate::mirror::Blocks;
use crate::nbd::NbdUri;
use crate::smapi::{self, Configuration, Method, Operation};
use crate::store::{plan, sr_path, sr_uri};

/// All that requests have in them, by the names that xapi gives it.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Parameters {
    dbg: String,
    sr: Option<String>,
    key: Option<String>,
    uri: Option<String>,
    domain: Option<String>,
    remote: Option<String>,
    size: Option<i128>,
    persistent: Option<bool>,
    configuration: Configuration,
    operation: Option<Operation>,
    blocklist: Option<(i64, Vec<(i64, i64)>)>,
    v: Option<String>,
}

const METHODS: &[Method] = &[
    Method { name: "Plugin.Query", call: |host, request| smapi::typed(host, request, execute) },
    Method { name: "SR.attach", call: |host, request| smapi::typed(host, request, execute) },
    Method { name: "Volume.stat", call: |host, request| smapi::typed(host, request, execute) },
    Method { name: "Datapath.attach", call: |host, request| smapi::typed(host, request, execute) },
    Method { name: "Data.mirror", call: |host, request| smapi::typed(host, request, execute) },
];

/// Reads what is read further. Whatever was accepted has one spelling, but for a URI.
fn execute(_: &Host, parameters: Parameters) -> Result<Parameters> {
    if let Some(text) = &parameters.sr {
        assert_eq!(&text.parse::<SrUuid>()?.to_string(), text);
    }
    if let Some(text) = &parameters.key {
        assert_eq!(&text.parse::<VolumeKey>()?.to_string(), text);
    }
    if let Some(text) = &parameters.uri {
        assert_eq!(&text.parse::<VolumeUri>()?.to_string(), text);
    }
    if let Some(text) = &parameters.domain {
        let domain: Domain = text.parse()?;
        assert!(domain.as_str() == text && (text.len() > 2 || !domain.is_migration()));
    }
    if let Some(text) = &parameters.remote {
        let remote: NbdUri = text.parse()?;
        assert!(remote.export.len() <= 4096, "{remote:?}");
    }
    if let Some(size) = parameters.size {
        let bytes = plan::size(size)?;
        assert!(i128::from(bytes) >= size && i128::from(bytes) - size < 4096);
    }
    if let Some(Operation::MirrorV1(key) | Operation::CopyV1(key)) = &parameters.operation {
        key.parse::<MirrorKey>()?;
    }
    if let Some((block, pairs)) = &parameters.blocklist {
        let blocks = Blocks::new(*block, pairs, 1 << 40)?;
        assert!(blocks.bytes() <= 1 << 40);
        assert!(blocks.ranges().windows(2).all(|two| two[0].offset + two[0].length < two[1].offset));
    }
    if !parameters.configuration.is_empty() {
        let path = sr_path(&parameters.configuration)?;
        assert!(path.is_absolute(), "{}", path.display());
        let again = Configuration::from([("uri".to_owned(), sr_uri(&path))]);
        assert_eq!(sr_path(&again).unwrap(), path);
    }
    Ok(parameters)
}

/// Runs the call whose arguments are the input's first line, between spaces, with the rest as its request.
pub(super) fn run(input: &[u8]) {
    let line = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let (words, mut request) = (&input[..line], input.get(line + 1..).unwrap_or_default());
    let arguments: Vec<OsString> =
        words.split(|byte| *byte == b' ').map(|word| OsString::from_vec(word.to_vec())).collect();
    let mut stdout = Vec::new();
    let host = Host::at("/dev/null");
    smapi::run(METHODS, &arguments, &host, &mut request, &mut stdout);
    if arguments.get(1).is_some_and(|argument| argument == "--list-methods") {
        return;
    }
    // One document and nothing else, whatever was asked.
    let answer: Value = serde_json::from_slice(&stdout).unwrap();
    if let Some(code) = answer.get("code") {
        assert!(code.as_str().is_some_and(|code| !code.is_empty()) && answer["params"].is_array(), "{answer}");
        let error = answer["backtrace"]["error"].as_str().unwrap();
        assert!(!error.is_empty() && error.len() <= 2000, "an error of {} bytes: {:.200}", error.len(), error);
        assert!(stdout.len() <= 8000, "{} bytes of answer", stdout.len());
    } else {
        assert!(answer.get("dbg").is_some(), "{answer}");
    }
}
