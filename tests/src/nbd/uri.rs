//! The one spelling of an NBD address that SMAPIv3 knows.

use std::fmt;
use std::path::{Path, PathBuf};

use super::Error;

/// `nbd:unix:<socket>:exportname=<name>`, as a datapath plugin's attach answers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    socket: PathBuf,
    export: String,
}

impl Uri {
    /// Names an export behind a socket.
    pub fn new(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        Self { socket: socket.into(), export: export.into() }
    }

    /// Reads an address the way xapi does (ocaml/xapi-idl/storage/storage_interface.ml): exactly four parts between colons.
    ///
    /// # Errors
    /// `Error::Uri` saying which part is wrong.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let wrong = |reason| Error::Uri { text: text.to_owned(), reason };
        let parts: Vec<&str> = text.split(':').collect();
        let [scheme, transport, socket, last] = parts[..] else {
            return Err(wrong("it has not four parts between colons"));
        };
        if scheme != "nbd" || transport != "unix" {
            return Err(wrong("it does not begin with nbd:unix:"));
        }
        let export =
            last.strip_prefix("exportname=").ok_or_else(|| wrong("its last part is not exportname=<name>"))?;
        if export.is_empty() || export.contains("exportname=") {
            return Err(wrong("its export name is unusable"));
        }
        if !socket.starts_with('/') {
            return Err(wrong("its socket is not an absolute path"));
        }
        Ok(Self::new(socket, export))
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The export's name.
    pub fn export(&self) -> &str {
        &self.export
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nbd:unix:{}:exportname={}", self.socket.display(), self.export)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_written_alike() {
        let text = "nbd:unix:/run/x/nbd.sock:exportname=5b1f";
        let uri = Uri::parse(text).unwrap();
        assert_eq!(uri.socket(), Path::new("/run/x/nbd.sock"));
        assert_eq!(uri.export(), "5b1f");
        assert_eq!(uri.to_string(), text);
    }

    #[test]
    fn anything_else_is_refused_with_the_part_that_is_wrong() {
        for (text, reason) in [
            ("nbd:unix:/a", "four parts"),
            ("nbd:unix:/a:b:exportname=c", "four parts"),
            ("nbd:tcp:/a:exportname=c", "nbd:unix:"),
            ("nbd:unix:/a:name=c", "exportname=<name>"),
            ("nbd:unix:/a:exportname=", "export name"),
            ("nbd:unix:/a:exportname=exportname=", "export name"),
            ("nbd:unix:a:exportname=b", "absolute"),
        ] {
            let error = Uri::parse(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
