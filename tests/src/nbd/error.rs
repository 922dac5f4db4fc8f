//! What goes wrong with an NBD connection.

use std::fmt;

/// Why an NBD connection, a negotiation or a command failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The URI is not `nbd:unix:<socket>:exportname=<name>`.
    Uri {
        /// The text that was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Nobody answers at the socket.
    Connect {
        /// The socket's path.
        socket: String,
        /// What the system said.
        reason: String,
    },
    /// The server refused an option of the handshake.
    Refused {
        /// The option, as doc/proto.md calls it.
        option: &'static str,
        /// The reply's type, e.g. `NBD_REP_ERR_UNKNOWN`.
        reply: String,
        /// The server's own text, often empty.
        text: String,
    },
    /// The server said something that the protocol does not allow.
    Protocol(String),
    /// The connection is gone; whether commands in flight took effect is not known.
    Lost(String),
    /// The server answered a command with an error.
    Command {
        /// The command, as doc/proto.md calls it.
        command: &'static str,
        /// Where it would have worked, in bytes.
        offset: u64,
        /// How many bytes it was about.
        length: u64,
        /// The NBD error number.
        errno: u32,
    },
    /// The request cannot be sent: outside the export, larger than the server takes, or not supported by it.
    Request(String),
}

impl Error {
    /// Whether it is unknown what the failed command did.
    pub fn is_uncertain(&self) -> bool {
        matches!(self, Error::Lost(_) | Error::Protocol(_) | Error::Command { .. })
    }

    /// Whether the connection can still be used.
    pub fn is_fatal(&self) -> bool {
        !matches!(self, Error::Command { .. } | Error::Request(_))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Uri { text, reason } => write!(f, "not an NBD address, {reason}: {text:?}"),
            Error::Connect { socket, reason } => write!(f, "cannot connect to {socket}: {reason}"),
            Error::Refused { option, reply, text } if text.is_empty() => {
                write!(f, "the NBD server refused {option} with {reply}")
            }
            Error::Refused { option, reply, text } => {
                write!(f, "the NBD server refused {option} with {reply}: {text}")
            }
            Error::Protocol(what) => write!(f, "the NBD server broke the protocol: {what}"),
            Error::Lost(why) => write!(f, "the NBD connection is lost: {why}"),
            Error::Command { command, offset, length, errno } => {
                write!(f, "{command} of {length} bytes at {offset} failed with {} ({errno})", name_of(*errno))
            }
            Error::Request(what) => write!(f, "impossible NBD request: {what}"),
        }
    }
}

impl std::error::Error for Error {}

/// The name of an NBD error number; the protocol fixes them, whatever the host's own numbers are.
fn name_of(errno: u32) -> &'static str {
    match errno {
        1 => "EPERM",
        5 => "EIO",
        12 => "ENOMEM",
        22 => "EINVAL",
        28 => "ENOSPC",
        75 => "EOVERFLOW",
        95 => "ENOTSUP",
        108 => "ESHUTDOWN",
        _ => "an unknown error",
    }
}
