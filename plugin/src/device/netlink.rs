//! What the kernel's nbd driver is asked by generic netlink (Linux `include/uapi/linux/nbd-netlink.h`).
//!
//! The older way, ioctls on a device that is open, is that of one process which then has to stay in the kernel, and knows
//! only the devices that are there already.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

use crate::nbd::Export;

/// The family of generic netlink that tells the others' numbers, and what it is asked.
const CONTROL: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;

const INDEX: u16 = 1;
const SIZE: u16 = 2;
const BLOCK_SIZE: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const SOCKET_ITEM: u16 = 1;
const SOCKET: u16 = 1;

const VERSION: u8 = 1;
const REQUEST_AND_ACKNOWLEDGE: u16 = 1 | 4;
/// The type of a message that ends what a request is answered by.
const OUTCOME: u16 = 2;
/// The lengths of a message's two headers, and of an attribute's.
const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
const ATTRIBUTE: usize = 4;

/// The flags of an export that the driver has a use for: read-only, flush, FUA, trim, and, since Linux 6.10, zeroes.
const KNOWN_FLAGS: u16 = 0x6f;

/// The sectors of a disk as its guest sees it.
const SECTOR: u64 = 512;

/// After how many seconds without an answer the driver gives a disk up: a day. Left out, it is half a minute before Linux
/// 5.4, which a file server that is restarted may take.
const PATIENCE: u64 = 24 * 60 * 60;

/// A way to ask the driver.
pub(super) struct Driver {
    socket: OwnedFd,
    family: u16,
}

impl Driver {
    /// Finds the driver, which has to be loaded.
    ///
    /// # Errors
    ///
    /// When it is not there.
    pub fn find() -> io::Result<Self> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(GENERIC))?;
        let mut asked = Vec::new();
        attribute(&mut asked, FAMILY_NAME, b"nbd\0");
        let control = Self { socket, family: CONTROL };
        let told = control.ask(GET_FAMILY, &asked)?;
        let family = find(&told, FAMILY_ID).and_then(|id| Some(u16::from_ne_bytes(*id.first_chunk()?)));
        let family = family.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Self { family, ..control })
    }

    /// Makes the device of a number show an export, of which `socket` is a connection in the transmission phase. One that
    /// is not there is made.
    ///
    /// # Errors
    ///
    /// EBUSY when the device is in use or open; else the kernel refuses.
    pub fn connect(&self, index: u32, socket: BorrowedFd<'_>, export: Export) -> io::Result<()> {
        self.ask(CONNECT, &connection(index, socket.as_raw_fd().cast_unsigned(), export)).map(drop)
    }

    /// Ends what the device of a number shows: whoever waits for it, or has it open, gets errors. One that shows nothing
    /// is left as it is.
    ///
    /// # Errors
    ///
    /// When there is no such device.
    pub fn disconnect(&self, index: u32) -> io::Result<()> {
        let mut asked = Vec::new();
        attribute(&mut asked, INDEX, &index.to_ne_bytes());
        self.ask(DISCONNECT, &asked).map(drop)
    }

    /// Asks something and gives the attributes of the answer.
    fn ask(&self, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
        let message = message(self.family, command, attributes);
        sendto(&self.socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut told = Vec::new();
        let mut buffer = [0; 8192];
        loop {
            let (length, _) = recv(&self.socket, &mut buffer, RecvFlags::empty())?;
            if take(&buffer[..length], &mut told)? {
                return Ok(told);
            }
        }
    }
}

/// Makes the attributes of [`CONNECT`].
fn connection(index: u32, socket: u32, export: Export) -> Vec<u8> {
    let (mut item, mut items, mut asked) = (Vec::new(), Vec::new(), Vec::new());
    attribute(&mut item, SOCKET, &socket.to_ne_bytes());
    attribute(&mut items, SOCKET_ITEM, &item);
    attribute(&mut asked, INDEX, &index.to_ne_bytes());
    let flags = u64::from(export.flags & KNOWN_FLAGS);
    for (kind, value) in [(SIZE, export.size), (BLOCK_SIZE, SECTOR), (TIMEOUT, PATIENCE), (SERVER_FLAGS, flags)] {
        attribute(&mut asked, kind, &value.to_ne_bytes());
    }
    attribute(&mut asked, SOCKETS, &items);
    asked
}

/// Makes a request.
fn message(family: u16, command: u8, attributes: &[u8]) -> Vec<u8> {
    let mut bytes = ((HEADER + GENERIC_HEADER + attributes.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend(family.to_ne_bytes());
    bytes.extend(REQUEST_AND_ACKNOWLEDGE.to_ne_bytes());
    // One request at a time: no number tells answers apart, and the kernel knows who asks.
    bytes.extend([0; 8]);
    bytes.extend([command, VERSION, 0, 0]);
    bytes.extend(attributes);
    bytes
}

/// Adds an attribute.
fn attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend(((ATTRIBUTE + value.len()) as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Takes the messages that came together, adds their attributes to what was told, and says whether that is all.
fn take(mut bytes: &[u8], told: &mut Vec<u8>) -> io::Result<bool> {
    let broken = || io::Error::from(io::ErrorKind::InvalidData);
    while !bytes.is_empty() {
        let length = bytes.first_chunk().map(|length| u32::from_ne_bytes(*length) as usize).ok_or_else(broken)?;
        let message = bytes.get(..length).filter(|message| message.len() >= HEADER + 4).ok_or_else(broken)?;
        if message[4..6] == OUTCOME.to_ne_bytes() {
            let error = message[HEADER..].first_chunk().map(|error| i32::from_ne_bytes(*error)).ok_or_else(broken)?;
            return if error == 0 { Ok(true) } else { Err(io::Error::from_raw_os_error(error.saturating_neg())) };
        }
        told.extend(&message[HEADER + GENERIC_HEADER..]);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// Finds an attribute's value.
fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let found = attributes.get(..length).filter(|found| found.len() >= ATTRIBUTE)?;
        if found[2..4] == kind.to_ne_bytes() {
            return Some(&found[ATTRIBUTE..]);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_again_and_nonsense_is_not() {
        let asked = connection(1000, 7, Export { size: 1 << 20, flags: 0xffff });
        assert_eq!(find(&asked, INDEX).unwrap(), 1000_u32.to_ne_bytes());
        assert_eq!(find(&asked, SIZE).unwrap(), (1_u64 << 20).to_ne_bytes());
        assert_eq!(find(&asked, SERVER_FLAGS).unwrap(), 0x6f_u64.to_ne_bytes());
        let item = find(find(&asked, SOCKETS).unwrap(), SOCKET_ITEM).unwrap();
        assert_eq!(find(item, SOCKET).unwrap(), 7_u32.to_ne_bytes());
        assert_eq!(find(&asked, 9), None);
        for length in 0..asked.len() {
            let _ = find(&asked[..length], SOCKETS);
        }
        assert_eq!(find(&[0; 8], INDEX), None);
    }

    #[test]
    fn an_answer_ends_with_its_outcome() {
        let outcome = |error: i32| {
            let mut bytes = message(OUTCOME, 0, &[]);
            bytes.truncate(HEADER);
            bytes.extend(error.to_ne_bytes());
            bytes.extend([0; 16]);
            let length = bytes.len() as u32;
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            bytes
        };
        let mut value = Vec::new();
        attribute(&mut value, INDEX, &5_u32.to_ne_bytes());
        let answer = message(30, CONNECT, &value);
        let mut told = Vec::new();
        assert!(!take(&answer, &mut told).unwrap());
        assert_eq!(told, value);
        assert!(take(&[answer.clone(), outcome(0)].concat(), &mut told).unwrap());
        assert_eq!(take(&outcome(-libc::EBUSY), &mut told).unwrap_err().raw_os_error(), Some(libc::EBUSY));
        for length in 1..answer.len() {
            assert!(take(&answer[..length], &mut told).is_err(), "{length}");
        }
    }
}
