//! xapi's observers: which of them want spans, and what they want with each.
//!
//! xapi writes a file for each observer that is enabled, `<uuid>.observer.conf` in the component's directory, as
//! assignments of a shell (xen-api `ocaml/xapi/xapi_observer.ml`, Dom0ObserverConfig), and `python3/packages/observer.py` reads
//! them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::host::Host;

/// The variable that names the directory of the observers' files.
pub(super) const VARIABLE: &str = "OBSERVER_CONFIG_DIR";

/// How the names of their files end.
const SUFFIX: &str = "observer.conf";

/// An observer that wants spans in files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Observer {
    /// The directory of its files, as it was given.
    pub directory: PathBuf,
    /// What the spans' service is called.
    pub service: String,
    /// What is said with each span.
    pub attributes: Vec<(String, String)>,
}

impl Observer {
    /// Finds the observers that are configured in a directory, which is below the host's root.
    pub fn all(host: &Host, directory: &Path) -> Vec<Self> {
        let Ok(entries) = fs::read_dir(host.below_root(directory)) else { return Vec::new() };
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(SUFFIX)));
        paths.sort();
        paths.iter().filter_map(|path| Self::parse(&fs::read_to_string(path).ok()?)).collect()
    }

    /// Reads an observer's file; none where it wants no files. Of spans over HTTP nothing is done: no call waits for another
    /// machine to be told of it.
    fn parse(text: &str) -> Option<Self> {
        let value = |key: &str| {
            let assignment = |line: &str| {
                let (name, value) = line.split_once('=')?;
                name.trim().eq_ignore_ascii_case(key).then(|| value.trim().trim_matches('\'').to_owned())
            };
            text.lines().find_map(assignment)
        };
        let directory = value("XS_EXPORTER_BUGTOOL_ENDPOINT").filter(|path| path.starts_with('/'))?;
        let attributes = value("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
        let attributes: Vec<(String, String)> = attributes
            .split(',')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        let attribute = |key: &str| attributes.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
        let service = value("OTEL_SERVICE_NAME").or_else(|| attribute("service.name"));
        Some(Self {
            directory: directory.into(),
            service: service.unwrap_or_else(|| "unknown".to_owned()),
            attributes,
        })
    }

    /// Gives the host's uuid as xapi says it, for the names of files.
    pub fn host(&self) -> &str {
        let found = self.attributes.iter().find(|(name, _)| name == "xs.host.uuid");
        found.map_or("unknown", |(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As xapi writes it.
    const FILE: &str = "OTEL_SERVICE_NAME='smapi'\n\
                        OTEL_RESOURCE_ATTRIBUTES='a=b%20c,xs.host.uuid=h,odd'\n\
                        XS_EXPORTER_ZIPKIN_ENDPOINTS='http://10.0.0.1:9411/api/v2/spans'\n\
                        XS_EXPORTER_BUGTOOL_ENDPOINT='/var/log/dt/zipkinv2/json'";

    #[test]
    fn an_observer_is_read_as_xapi_writes_it() {
        let observer = Observer::parse(FILE).unwrap();
        assert_eq!(observer.directory, Path::new("/var/log/dt/zipkinv2/json"));
        assert_eq!((observer.service.as_str(), observer.host()), ("smapi", "h"));
        let expected = [("a", "b%20c"), ("xs.host.uuid", "h")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(observer.attributes, expected);
    }

    #[test]
    fn an_observer_that_wants_no_files_gets_none() {
        for file in ["", "nonsense", "XS_EXPORTER_BUGTOOL_ENDPOINT=''", "XS_EXPORTER_BUGTOOL_ENDPOINT='relative'"] {
            assert_eq!(Observer::parse(file), None, "{file}");
        }
    }

    #[test]
    fn only_files_of_observers_are_read() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        assert_eq!(Observer::all(&host, Path::new("/etc/o")), []);
        fs::create_dir_all(root.path().join("etc/o")).unwrap();
        for name in ["all.conf", "1.observer.conf", "2.observer.conf", "2.observer.conf~"] {
            fs::write(root.path().join("etc/o").join(name), FILE).unwrap();
        }
        assert_eq!(Observer::all(&host, Path::new("/etc/o")).len(), 2);
    }
}
