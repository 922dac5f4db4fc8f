//! Requests given as arguments, as static-vdis gives them.
//!
//! static-vdis (xen-api `python3/bin/static-vdis`) attaches disks when a host boots, before xapi runs, if the plugin has
//! the feature VDI_ATTACH_OFFLINE: `<dir>/<Method> <dbg> <argument>…`, where a device-config is `--configuration <key>
//! <value>` once for each key.

use std::ffi::OsString;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The methods that it calls, with the parameters that stand behind `dbg`, in their order.
const FORMS: &[(&str, &[&str])] = &[
    ("Plugin.Query", &[]),
    ("SR.attach", &[]),
    ("Volume.stat", &["sr", "key"]),
    ("Datapath.attach", &["uri", "domain"]),
    ("Datapath.activate", &["uri", "domain"]),
    ("Datapath.deactivate", &["uri", "domain"]),
    ("Datapath.detach", &["uri", "domain"]),
];

/// The option that gives a device-config's key and value.
const CONFIGURATION: &str = "--configuration";

/// Makes the request of the arguments behind a method's name; none if it comes as JSON on standard input.
///
/// # Errors
///
/// [`Error::BadRequest`] when the method cannot be called so, or the arguments are not its parameters.
pub(super) fn request(method: &str, arguments: &[OsString]) -> Option<Result<Value>> {
    let first = arguments.first()?;
    (first != "--json").then(|| parse(method, arguments))
}

fn parse(method: &str, arguments: &[OsString]) -> Result<Value> {
    let wrong = |what: &str| Error::BadRequest(format!("{method} {what}"));
    let (_, names) = FORMS
        .iter()
        .find(|(known, _)| *known == method)
        .ok_or_else(|| wrong("takes its request as JSON on standard input, after --json"))?;
    let mut words =
        arguments.iter().map(|word| word.to_str().ok_or_else(|| wrong("has an argument that is not UTF-8")));
    let (mut positional, mut configuration) = (Vec::new(), Map::new());
    while let Some(word) = words.next().transpose()? {
        if word == CONFIGURATION && method == "SR.attach" {
            let (key, value) = (words.next().transpose()?, words.next().transpose()?);
            let (Some(key), Some(value)) = (key, value) else {
                return Err(wrong("has --configuration without a key and a value"));
            };
            configuration.insert(key.to_owned(), value.into());
        } else {
            positional.push(word);
        }
    }
    if positional.len() != names.len() + 1 {
        return Err(wrong(&format!("takes {} arguments behind its dbg: {}", names.len(), names.join(", "))));
    }
    let names = ["dbg"].iter().chain(names.iter());
    let mut request: Map<String, Value> =
        names.zip(positional).map(|(name, value)| ((*name).to_owned(), value.into())).collect();
    if method == "SR.attach" {
        request.insert("configuration".to_owned(), configuration.into());
    }
    Ok(request.into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(method: &str, arguments: &[&str]) -> Option<Result<Value>> {
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        request(method, &arguments)
    }

    #[test]
    fn json_on_standard_input_is_left_to_others() {
        assert!(of("Volume.stat", &["--json"]).is_none());
        assert!(of("Volume.destroy", &[]).is_none());
    }

    #[test]
    fn each_form_of_static_vdis_is_its_request() {
        let query = of("Plugin.Query", &["static-vdis"]).unwrap().unwrap();
        assert_eq!(query, json!({"dbg": "static-vdis"}));
        let attach =
            ["static-vdis", "--configuration", "uri", "file:///a", "--configuration", "x", "--configuration"];
        assert_eq!(
            of("SR.attach", &attach).unwrap().unwrap(),
            json!({"dbg": "static-vdis", "configuration": {"uri": "file:///a", "x": "--configuration"}})
        );
        let stat = of("Datapath.attach", &["static-vdis", "qsd://a/b", "0"]).unwrap().unwrap();
        assert_eq!(stat, json!({"dbg": "static-vdis", "uri": "qsd://a/b", "domain": "0"}));
    }

    #[test]
    fn anything_else_is_a_bad_request() {
        for (method, arguments) in [
            ("Volume.destroy", &["static-vdis", "s", "k"][..]),
            ("Volume.stat", &["static-vdis", "s"]),
            ("Volume.stat", &["static-vdis", "s", "k", "more"]),
            ("SR.attach", &["static-vdis", "--configuration", "uri"]),
        ] {
            let error = of(method, arguments).unwrap().unwrap_err();
            assert_eq!(error.code().0, "SR_BACKEND_FAILURE_115", "{method} {arguments:?}");
        }
    }
}
