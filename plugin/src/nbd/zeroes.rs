//! The zeroes that QEMU begins a full mirror with, kept from a destination that has nothing but zeroes.
//!
//! ```text
//!   QEMU ── option ──────────────► destination
//!   QEMU ◄──────────────── reply ─ destination
//!   QEMU ── WRITE_ZEROES ─┐
//!   QEMU ◄──────── done ──┘
//!   QEMU ── any other request ───► destination      from here on every byte
//! ```
//!
//! `sync: full` zeroes the whole target before it copies: that takes as long as the disk is large, and leaves tables for
//! all of it. On a destination that reads as zeroes such a request changes nothing, so whoever answers it in the
//! destination's place lets nothing be missed, as long as no other request was passed on before. The protocol is NBD's
//! `doc/proto.md`.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::wire::{REPLY_MAGIC, REQUEST_BYTES, REQUEST_MAGIC, WRITE_ZEROES};

/// What begins every option: the first half of NBD's IHAVEOPT.
const OPTION_MAGIC: u32 = 0x4948_4156;
/// The length of an option without its data.
const OPTION_BYTES: usize = 16;
/// The longest data of an option that is passed on.
const OPTION_DATA: u32 = 64 << 10;

/// What begins every request with an extended header.
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// What begins every reply to one.
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;
/// The length of an extended header, of a request or a reply.
const EXTENDED_REQUEST_BYTES: usize = 32;

/// NBD_REPLY_FLAG_DONE: the only chunk of a reply.
const DONE: u16 = 1;
/// NBD_REPLY_TYPE_NONE: a chunk that says no more than that.
const NONE: u16 = 0;

/// What a client sends, as far as it was looked at and not yet taken.
pub struct Ahead<R> {
    reader: R,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Ahead<R> {
    /// Looks at nothing yet.
    pub fn new(reader: R) -> Self {
        Self { reader, buffer: Vec::with_capacity(OPTION_DATA as usize) }
    }

    /// Gives what was looked at and not taken, and the reader for what follows.
    pub fn into_parts(self) -> (Vec<u8>, R) {
        (self.buffer, self.reader)
    }

    /// Passes the client's options on until its first request, which is left; `false` when the client ends before.
    ///
    /// # Errors
    ///
    /// When either end breaks, or an option is longer than any is.
    pub async fn pass_options(&mut self, peer: &mut (impl AsyncWrite + Unpin), sent: &AtomicU64) -> io::Result<bool> {
        loop {
            match self.magic().await? {
                None => return Ok(false),
                Some(OPTION_MAGIC) => {}
                Some(_) => return Ok(true),
            }
            let Some(header) = self.look(OPTION_BYTES).await? else { return Ok(false) };
            let data = u32::from_be_bytes(field(header, OPTION_BYTES - 4));
            if data > OPTION_DATA {
                let reason = format!("QEMU's NBD client sent an option of {data} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
            let length = OPTION_BYTES + data as usize;
            let Some(option) = self.look(length).await? else { return Ok(false) };
            peer.write_all(option).await?;
            peer.flush().await?;
            sent.fetch_add(length as u64, Ordering::Relaxed);
            self.buffer.drain(..length);
        }
    }

    /// Answers the client's requests as done as long as they write zeroes; the first other one is left. Counts in
    /// `answered`.
    ///
    /// # Errors
    ///
    /// When the client breaks off.
    pub async fn answer_zeroes(
        &mut self,
        replies: &mut (impl AsyncWrite + Unpin),
        answered: &AtomicU64,
    ) -> io::Result<()> {
        loop {
            let length = match self.magic().await? {
                Some(REQUEST_MAGIC) => REQUEST_BYTES,
                Some(EXTENDED_REQUEST_MAGIC) => EXTENDED_REQUEST_BYTES,
                _ => return Ok(()),
            };
            let Some(header) = self.look(length).await? else { return Ok(()) };
            if u16::from_be_bytes(field(header, 6)) != WRITE_ZEROES {
                return Ok(());
            }
            replies.write_all(&done(header)).await?;
            answered.fetch_add(1, Ordering::Relaxed);
            self.buffer.drain(..length);
        }
    }

    /// Looks at the four bytes that everything begins with; `None` when the client ends before.
    async fn magic(&mut self) -> io::Result<Option<u32>> {
        Ok(self.look(4).await?.map(|bytes| u32::from_be_bytes(field(bytes, 0))))
    }

    /// Looks at the next bytes without taking them; `None` when the client ends before.
    async fn look(&mut self, length: usize) -> io::Result<Option<&[u8]>> {
        while self.buffer.len() < length {
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
        Ok(self.buffer.get(..length))
    }
}

/// Makes the reply that a request was carried out.
fn done(header: &[u8]) -> Vec<u8> {
    let cookie: [u8; 8] = field(header, 8);
    let mut bytes = Vec::with_capacity(EXTENDED_REQUEST_BYTES);
    if header.len() == EXTENDED_REQUEST_BYTES {
        let offset: [u8; 8] = field(header, 16);
        bytes.extend(EXTENDED_REPLY_MAGIC.to_be_bytes());
        bytes.extend(DONE.to_be_bytes());
        bytes.extend(NONE.to_be_bytes());
        bytes.extend(cookie);
        bytes.extend(offset);
        bytes.extend(0_u64.to_be_bytes());
    } else {
        // Allowed where replies are structured too: only reads must be answered in chunks.
        bytes.extend(REPLY_MAGIC.to_be_bytes());
        bytes.extend(0_u32.to_be_bytes());
        bytes.extend(cookie);
    }
    bytes
}

/// Gives a field of a header that is long enough for it.
fn field<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    header.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(data: &[u8]) -> Vec<u8> {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(7_u32.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn request(kind: u16, cookie: u64, offset: u64) -> Vec<u8> {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(4096_u32.to_be_bytes());
        bytes
    }

    fn extended(kind: u16, cookie: u64, offset: u64) -> Vec<u8> {
        let mut bytes = request(kind, cookie, offset);
        bytes[..4].copy_from_slice(&EXTENDED_REQUEST_MAGIC.to_be_bytes());
        bytes.truncate(24);
        bytes.extend(4096_u64.to_be_bytes());
        bytes
    }

    /// Runs both steps on what a client sends; gives what is passed on, what it is answered, and what is left.
    async fn run(said: &[u8]) -> (Vec<u8>, Vec<u8>, Vec<u8>, u64) {
        let (mut passed, mut answers) = (Vec::new(), Vec::new());
        let (sent, answered) = (AtomicU64::new(0), AtomicU64::new(0));
        let mut ahead = Ahead::new(said);
        if ahead.pass_options(&mut passed, &sent).await.unwrap() {
            ahead.answer_zeroes(&mut answers, &answered).await.unwrap();
        }
        assert_eq!(sent.load(Ordering::Relaxed), passed.len() as u64);
        let (buffer, rest) = ahead.into_parts();
        (passed, answers, [&buffer, rest].concat(), answered.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn zeroes_are_answered_until_the_first_other_request() {
        let options = [option(b""), option(&[7; 300])].concat();
        for (make, reply) in [(request as fn(u16, u64, u64) -> Vec<u8>, 16), (extended, 32)] {
            let rest = [make(1, 3, 0), vec![9; 4096], make(WRITE_ZEROES, 4, 0)].concat();
            let zeroes = [make(WRITE_ZEROES, 1, 0), make(WRITE_ZEROES, 2, 4096)].concat();
            let (passed, answers, left, answered) = run(&[&options[..], &zeroes, &rest].concat()).await;
            assert_eq!((&passed, &left, answered), (&options, &rest, 2));
            assert_eq!(answers.len(), 2 * reply);
            assert_eq!(answers[8..16], 1_u64.to_be_bytes());
        }
    }

    #[tokio::test]
    async fn whatever_else_comes_first_is_passed_on() {
        for kind in [0, 1, 2, 3, 4, 5, 7, 99] {
            let said = request(kind, 1, 0);
            assert_eq!(run(&said).await, (vec![], vec![], said, 0));
        }
        let unknown = vec![0xaa; 64];
        assert_eq!(run(&unknown).await, (vec![], vec![], unknown, 0));
    }

    #[tokio::test]
    async fn a_client_that_breaks_off_at_any_byte_loses_nothing_that_it_said() {
        let said = [option(b"abc"), request(WRITE_ZEROES, 1, 0), request(1, 2, 0)].concat();
        for length in 0..said.len() {
            let (passed, _, left, answered) = run(&said[..length]).await;
            assert_eq!(passed.len() + left.len() + answered as usize * REQUEST_BYTES, length);
        }
    }

    #[tokio::test]
    async fn an_option_without_end_is_refused() {
        let mut said = option(b"");
        said[12] = 0xff;
        let mut ahead = Ahead::new(&said[..]);
        assert!(ahead.pass_options(&mut Vec::new(), &AtomicU64::new(0)).await.is_err());
    }
}
