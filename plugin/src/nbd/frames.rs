//! Requests and simple replies as bytes, for who has several under way on one connection.

use super::wire::{FLUSH, READ, REPLY_MAGIC, REQUEST_MAGIC, WRITE, WRITE_ZEROES, protocol};
use crate::error::Result;

/// The length of a request without its payload.
pub const REQUEST_BYTES: usize = super::wire::REQUEST_BYTES;

/// The length of a simple reply without its payload.
pub const REPLY_BYTES: usize = 16;

/// What is requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Bytes, which follow the reply.
    Read,
    /// That the bytes which follow the request are taken.
    Write,
    /// That what was written is made durable.
    Flush,
    /// That a range reads as zeroes; it need take no space.
    WriteZeroes,
}

/// Makes a request, to be followed by its payload if it has one.
pub fn request(command: Command, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_BYTES] {
    let command = match command {
        Command::Read => READ,
        Command::Write => WRITE,
        Command::Flush => FLUSH,
        Command::WriteZeroes => WRITE_ZEROES,
    };
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Takes a reply apart: the request's cookie and, if the request failed, the error, whose numbers are Linux's.
///
/// # Errors
///
/// When it is no simple reply.
pub fn reply(bytes: [u8; REPLY_BYTES]) -> Result<(u64, Option<u32>)> {
    let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = bytes;
    let (magic, error) = (u32::from_be_bytes([m0, m1, m2, m3]), u32::from_be_bytes([e0, e1, e2, e3]));
    if magic != REPLY_MAGIC {
        return Err(protocol("reading a reply by NBD", format!("its magic is {magic:#x}")));
    }
    Ok((u64::from_be_bytes(cookie), (error != 0).then_some(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_as_the_protocol_has_them() {
        let frame = request(Command::Flush, 0x0102_0304_0506_0708, 0x1112_1314_1516_1718, 0x2122_2324);
        let expected = [
            0x25, 0x60, 0x95, 0x13, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17,
            0x18, 0x21, 0x22, 0x23, 0x24,
        ];
        assert_eq!(frame, expected);
        let good = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 9];
        assert_eq!(reply(good).unwrap(), (9, Some(5)));
        assert!(reply([0; 16]).is_err());
    }
}
