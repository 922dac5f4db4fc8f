//! The device-config's `uri`: `file:///absolute/path`, percent-encoded.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::id::ShortenedUri;
use crate::smapi::Configuration;

/// The device-config's key.
const KEY: &str = "uri";

/// Reads the SR's path from a device-config.
///
/// # Errors
///
/// [`Error::MissingDeviceConfig`] without a `uri`, [`Error::InvalidDeviceConfig`] when it is not the URI of an
/// absolute local path without `.` or `..` in it.
pub fn sr_path(configuration: &Configuration) -> Result<PathBuf> {
    let uri = configuration.get(KEY).ok_or(Error::MissingDeviceConfig(KEY))?;
    parse(uri).map_err(|reason| Error::InvalidDeviceConfig {
        key: KEY,
        reason: format!("{:?} {reason}", ShortenedUri(uri)),
    })
}

/// Writes the URI of an SR's path.
pub fn sr_uri(path: &Path) -> String {
    let mut uri = "file://".to_owned();
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
    uri
}

/// Decodes the URI, or says what is wrong with it.
fn parse(uri: &str) -> Result<PathBuf, &'static str> {
    let rest = uri.strip_prefix("file://").ok_or("does not begin with file://")?;
    let encoded = rest.strip_prefix("localhost").filter(|path| path.starts_with('/')).unwrap_or(rest);
    if !encoded.starts_with('/') {
        return Err("has no absolute path (file:///…)");
    }
    if encoded.contains(['?', '#']) {
        return Err("has more than a path");
    }
    let bytes = decode(encoded.as_bytes()).ok_or("has a % without two hexadecimal digits")?;
    if bytes.contains(&0) {
        return Err("has a zero byte in its path");
    }
    // The kernel takes no longer path, and an error must not carry a mebibyte about.
    if bytes.len() >= 4096 {
        return Err("is too long");
    }
    if bytes.split(|byte| *byte == b'/').any(|part| part == b".." || part == b".") {
        return Err("has . or .. in its path");
    }
    // QEMU is told file names in JSON, which can hold no other.
    let path = PathBuf::from(String::from_utf8(bytes).map_err(|_| "has a path that is not UTF-8")?);
    // Gathers the components anew: without doubled and trailing slashes one directory has one spelling.
    Ok(path.components().collect())
}

/// Decodes percent-encoding.
fn decode(encoded: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded;
    while let Some((&byte, after)) = rest.split_first() {
        if byte == b'%' {
            let (digits, after) = after.split_at_checked(2)?;
            if !digits.iter().all(u8::is_ascii_hexdigit) {
                return None;
            }
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = after;
        } else {
            bytes.push(byte);
            rest = after;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_of(uri: &str) -> Result<PathBuf> {
        sr_path(&Configuration::from([(KEY.to_owned(), uri.to_owned())]))
    }

    #[test]
    fn a_path_is_read_from_its_uri_and_written_back() {
        for (uri, path) in [
            ("file:///a/b", "/a/b"),
            ("file:///a//b/", "/a/b"),
            ("file:///a%20b%2Fc", "/a b/c"),
            ("file://localhost/a", "/a"),
        ] {
            assert_eq!(path_of(uri).unwrap(), Path::new(path), "{uri}");
        }
        let odd = PathBuf::from("/a%é\n\"x");
        assert_eq!(path_of(&sr_uri(&odd)).unwrap(), odd);
    }

    #[test]
    fn a_missing_uri_and_a_wrong_one_have_their_own_codes() {
        assert_eq!(sr_path(&Configuration::new()).unwrap_err().code().0, "SR_BACKEND_FAILURE_90");
        for uri in [
            "",
            "/a",
            "nfs://h/a",
            "file:",
            "file://a",
            "file://h/a",
            "file:///a%",
            "file:///a%0",
            "file:///a%+1",
            "file:///a%00",
            "file:///a%ff",
            "file:///a/../b",
            "file:///a/%2e%2e/b",
            "file:///a?x",
            "file:///a#x",
        ] {
            assert_eq!(path_of(uri).unwrap_err().code().0, "SR_BACKEND_FAILURE_91", "{uri}");
        }
        assert!(path_of(&format!("file:///{}", "x".repeat(1 << 20))).unwrap_err().to_string().len() < 400);
    }
}
