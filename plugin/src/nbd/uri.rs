//! NBD URIs, as xapi sends them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::id::ShortenedUri;

/// The longest path that fits a Unix socket's address.
const SOCKET_PATH_BYTES: usize = 107;

/// The longest export name of the protocol.
const EXPORT_NAME_BYTES: usize = 4096;

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host and port.
    Tcp(String, u16),
}

/// An export of an NBD server.
///
/// Read from `nbd+unix:///<export>?socket=<path>`, the form in which xapi gives Data.mirror its proxy's socket (the
/// export percent-encoded, with the `/` before it: xen-api `ocaml/xapi/storage_smapiv3_migrate.ml`), from
/// `nbd://<host>[:<port>]/<export>`, and from QEMU's `nbd:unix:<path>:exportname=<export>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    /// Where the server listens.
    pub address: Address,
    /// The export's name.
    pub export: String,
}

impl fmt::Display for NbdUri {
    /// Writes the URI anew, with nothing in it but what was understood.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Unix(path) => {
                let socket = path.to_string_lossy();
                write!(f, "nbd+unix:///{}?socket={}", encode(&self.export), encode(&socket))
            }
            Address::Tcp(host, port) if host.contains(':') => {
                write!(f, "nbd://[{host}]:{port}/{}", encode(&self.export))
            }
            Address::Tcp(host, port) => write!(f, "nbd://{host}:{port}/{}", encode(&self.export)),
        }
    }
}

impl FromStr for NbdUri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        parse(text)
            .map_err(|reason| Error::BadRequest(format!("{:?} is not an NBD URI: {reason}", ShortenedUri(text))))
    }
}

/// Reads a URI, or says what is wrong with it. Parameters that are not understood are passed over, and so is a fragment.
fn parse(text: &str) -> std::result::Result<NbdUri, &'static str> {
    let (address, export) = if let Some(rest) = text.strip_prefix("nbd+unix://") {
        let rest = before(rest, '#');
        let (path, query) = rest.split_once('?').ok_or("it has no socket parameter")?;
        let export = path.strip_prefix('/').ok_or("nbd+unix has no host part")?;
        let socket =
            query.split('&').find_map(|pair| pair.strip_prefix("socket=")).ok_or("it has no socket parameter")?;
        (unix(decode(socket)?)?, decode(export)?)
    } else if let Some(rest) = text.strip_prefix("nbd:unix:") {
        let (socket, export) = rest.split_once(":exportname=").ok_or("it has no exportname")?;
        (unix(socket.to_owned())?, export.to_owned())
    } else if let Some(rest) = text.strip_prefix("nbd://") {
        let rest = before(before(rest, '#'), '?');
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        (tcp(authority)?, decode(export)?)
    } else {
        return Err("it starts with none of nbd+unix://, nbd:unix: and nbd://");
    };
    if export.len() > EXPORT_NAME_BYTES {
        return Err("the export's name is longer than 4096 bytes");
    }
    Ok(NbdUri { address, export })
}

/// Gives what stands before a character.
fn before(text: &str, character: char) -> &str {
    text.split_once(character).map_or(text, |(before, _)| before)
}

/// Checks a socket's path.
fn unix(path: String) -> std::result::Result<Address, &'static str> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err("the socket's path is not absolute");
    }
    if path.len() > SOCKET_PATH_BYTES {
        return Err("the socket's path is longer than 107 bytes");
    }
    Ok(Address::Unix(path.into()))
}

/// Reads `host:port`; the port of the protocol is 10809.
fn tcp(authority: &str) -> std::result::Result<Address, &'static str> {
    // It would be taken for a part of the host's name, and shown with that.
    if authority.contains('@') {
        return Err("it says who logs in, and nobody does in NBD");
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            rest.split_once(']').map(|(host, port)| (host, port.strip_prefix(':'))).ok_or("a [ without ]")?
        }
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    if host.is_empty() {
        return Err("it has no host");
    }
    let port = port.map_or(Ok(10809), str::parse).map_err(|_| "the port is not a number below 65536")?;
    Ok(Address::Tcp(host.to_owned(), port))
}

/// Percent-encodes all but what needs it nowhere.
fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Undoes percent-encoding.
fn decode(text: &str) -> std::result::Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
        match (digit(), digit()) {
            (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
            _ => return Err("a % without two hexadecimal digits"),
        }
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_that_xapi_sends_is_understood() {
        let uri: NbdUri = "nbd+unix:///a%2Fb%20c?socket=/var/run/nbdproxy/export/MIR123456".parse().unwrap();
        assert_eq!(uri.export, "a/b c");
        assert_eq!(uri.address, Address::Unix("/var/run/nbdproxy/export/MIR123456".into()));
    }

    #[test]
    fn other_forms_are_understood() {
        let uri: NbdUri = "nbd:unix:/run/x.sock:exportname=e".parse().unwrap();
        assert_eq!(uri, NbdUri { address: Address::Unix("/run/x.sock".into()), export: "e".to_owned() });
        let uri: NbdUri = "nbd://1.2.3.4:10809/x".parse().unwrap();
        assert_eq!(uri, NbdUri { address: Address::Tcp("1.2.3.4".to_owned(), 10809), export: "x".to_owned() });
        let uri: NbdUri = "nbd://[::1]/".parse().unwrap();
        assert_eq!(uri, NbdUri { address: Address::Tcp("::1".to_owned(), 10809), export: String::new() });
    }

    #[test]
    fn a_uri_written_anew_is_the_same_without_what_is_not_understood() {
        for text in [
            "nbd+unix:///a%2Fb%20c?session_id=secret&socket=/run/x%26y&pass=secret",
            "nbd:unix:/run/x.sock:exportname=e",
            "nbd+unix:///e?socket=/run/x#secret",
            "nbd://1.2.3.4/x?secret",
            "nbd://1.2.3.4/x#secret",
            "nbd://[::1]/",
        ] {
            let uri: NbdUri = text.parse().unwrap();
            let again = uri.to_string();
            assert_eq!(again.parse::<NbdUri>().unwrap(), uri, "{again}");
            assert!(!again.contains("secret") && !again.contains("pass"), "{again}");
        }
        let uri: NbdUri = "nbd://1.2.3.4/x%3Fy%23z?secret".parse().unwrap();
        assert_eq!(uri.export, "x?y#z");
    }

    #[test]
    fn anything_else_is_a_bad_request() {
        let long = format!("nbd+unix:///e?socket=/{}", "x".repeat(107));
        for bad in [
            "",
            "http://x/",
            "nbd+unix:///e",
            "nbd+unix://host/e?socket=/s",
            "nbd+unix:///e?socket=relative",
            "nbd+unix:///%zz?socket=/s",
            "nbd+unix:///%ff?socket=/s",
            "nbd://:10809/x",
            "nbd://h:99999/x",
            "nbd://me@h/x",
            "nbd://me:secret@h:10809/x",
            "nbd:unix:/s",
            &long,
        ] {
            assert!(matches!(bad.parse::<NbdUri>(), Err(Error::BadRequest(_))), "{bad}");
        }
    }
}
