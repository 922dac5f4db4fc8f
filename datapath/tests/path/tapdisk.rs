//! The NBD client of a tapdisk, as an import has it at the other end of a connection.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// A connection whose other end was passed to an import.
pub struct Tapdisk(UnixStream);

impl Tapdisk {
    /// Passes a connection on as xapi does: one message with the datapath's name, and the end.
    pub fn pass(socket: &Path) -> Self {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let control = UnixStream::connect(socket).unwrap();
        let descriptors = [far.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let name = b"5f4ac281-9ef2-4ef6-a69d-5d4d4e33c7a0";
        assert_eq!(sendmsg(&control, &[IoSlice::new(name)], &mut ancillary, SendFlags::empty()).unwrap(), 36);
        Self(near)
    }

    /// Negotiates as tapdisk does and gives the size it is told.
    pub fn negotiate(&mut self) -> std::io::Result<u64> {
        let mut greeting = [0; 18];
        self.0.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(greeting[17] & 3, 3);
        self.0.write_all(&[&3_u32.to_be_bytes()[..], b"IHAVEOPT", &[0, 0, 0, 1, 0, 0, 0, 15]].concat())?;
        self.0.write_all(b"tapdisk_client\0")?;
        let mut export = [0; 10];
        self.0.read_exact(&mut export)?;
        Ok(u64::from_be_bytes(export[..8].try_into().unwrap()))
    }

    /// Writes bytes and waits for the answer.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.send(1, offset, data.len(), data)?;
        self.reply()
    }

    /// Reads bytes.
    pub fn read(&mut self, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
        self.send(0, offset, length, b"")?;
        self.reply()?;
        let mut data = vec![0; length];
        self.0.read_exact(&mut data)?;
        Ok(data)
    }

    /// Says goodbye and keeps the connection, as a tapdisk that is paused.
    pub fn pause(&mut self) {
        self.send(2, 0, 0, b"").unwrap();
    }

    fn send(&mut self, command: u16, offset: u64, length: usize, payload: &[u8]) -> std::io::Result<()> {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(command.to_be_bytes());
        bytes.extend(7_u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend((length as u32).to_be_bytes());
        bytes.extend(payload);
        self.0.write_all(&bytes)
    }

    fn reply(&mut self) -> std::io::Result<()> {
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply)?;
        assert_eq!(reply, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
        Ok(())
    }
}
