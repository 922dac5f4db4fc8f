//! The server's side of the handshake, for a client that chooses an export by its name.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::wire::{
    Export, FIXED_NEWSTYLE, INIT_MAGIC, NO_ZEROES, OPT_ABORT, OPT_EXPORT_NAME, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    PADDING, REP_ACK, REP_ERR_UNSUP, protocol,
};
use crate::error::{Error, Result};

/// The longest option that is read: a name has at most 4096 bytes.
const OPTION_BYTES: u32 = 8192;

/// The most options of one handshake that are answered.
const OPTIONS: usize = 64;

const DOING: &str = "the NBD handshake";

/// A client that has chosen, and waits to be told of its export.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice {
    /// The name that it gave.
    pub name: Vec<u8>,
    padded: bool,
}

impl Choice {
    /// Tells the client what it chose: after this it sends requests.
    ///
    /// # Errors
    ///
    /// When the connection ends.
    pub async fn accept(&self, writer: &mut (impl AsyncWrite + Unpin), export: Export) -> Result<()> {
        let mut bytes = export.size.to_be_bytes().to_vec();
        bytes.extend(export.flags.to_be_bytes());
        bytes.resize(bytes.len() + if self.padded { PADDING } else { 0 }, 0);
        send(writer, &bytes).await
    }
}

/// Greets a client and answers its options until it has chosen an export; `None` when it does not want one after all.
///
/// No other option than NBD_OPT_EXPORT_NAME is known here, so a client that tries a newer one falls back to it.
///
/// # Errors
///
/// When the connection ends, or the client breaks the protocol.
pub async fn negotiate(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
) -> Result<Option<Choice>> {
    let failed = |error| Error::io(DOING, error);
    let mut greeting = INIT_MAGIC.to_be_bytes().to_vec();
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    send(writer, &greeting).await?;
    let flags = reader.read_u32().await.map_err(failed)?;
    if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(protocol(DOING, format!("the client sent the flags {flags:#x}")));
    }
    for _ in 0..OPTIONS {
        let magic = reader.read_u64().await.map_err(failed)?;
        let option = reader.read_u32().await.map_err(failed)?;
        let length = reader.read_u32().await.map_err(failed)?;
        if magic != OPTION_MAGIC || length > OPTION_BYTES {
            return Err(protocol(DOING, format!("an option with magic {magic:#x} and length {length}")));
        }
        let mut data = vec![0; length as usize];
        reader.read_exact(&mut data).await.map_err(failed)?;
        match option {
            OPT_EXPORT_NAME => {
                let padded = flags & u32::from(NO_ZEROES) == 0;
                return Ok(Some(Choice { name: data, padded }));
            }
            OPT_ABORT => {
                // The client may have gone without waiting for this.
                let _ = reply(writer, option, REP_ACK).await;
                return Ok(None);
            }
            _ => reply(writer, option, REP_ERR_UNSUP).await?,
        }
    }
    Err(protocol(DOING, "more options than there are"))
}

/// Answers an option.
async fn reply(writer: &mut (impl AsyncWrite + Unpin), option: u32, kind: u32) -> Result<()> {
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(0_u32.to_be_bytes());
    send(writer, &bytes).await
}

/// Sends bytes now.
async fn send(writer: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<()> {
    let sent = async {
        writer.write_all(bytes).await?;
        writer.flush().await
    };
    sent.await.map_err(|error| Error::io(DOING, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(number: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }

    async fn negotiated(said: &[u8]) -> (Result<Option<Choice>>, Vec<u8>) {
        let mut answered = Vec::new();
        let choice = negotiate(&mut &said[..], &mut answered).await;
        (choice, answered)
    }

    #[tokio::test]
    async fn the_client_of_tapdisk_is_understood() {
        let said = [3_u32.to_be_bytes().to_vec(), option(OPT_EXPORT_NAME, b"tapdisk_client\0")].concat();
        let (choice, answered) = negotiated(&said).await;
        let choice = choice.unwrap().unwrap();
        assert_eq!(choice, Choice { name: b"tapdisk_client\0".to_vec(), padded: false });
        assert_eq!(answered.len(), 18);
        let mut told = Vec::new();
        choice.accept(&mut told, Export { size: 4096, flags: 1 }).await.unwrap();
        assert_eq!(told, [&4096_u64.to_be_bytes()[..], &[0, 1]].concat());
    }

    #[tokio::test]
    async fn a_client_that_does_not_know_better_gets_its_padding() {
        let said = [1_u32.to_be_bytes().to_vec(), option(OPT_EXPORT_NAME, b"")].concat();
        let choice = negotiated(&said).await.0.unwrap().unwrap();
        let mut told = Vec::new();
        choice.accept(&mut told, Export { size: 1, flags: 1 }).await.unwrap();
        assert_eq!(told.len(), 10 + PADDING);
    }

    #[tokio::test]
    async fn newer_options_are_refused_and_the_client_may_go_on() {
        let said = [3_u32.to_be_bytes().to_vec(), option(8, b""), option(7, b"xyz"), option(OPT_EXPORT_NAME, b"e")];
        let (choice, answered) = negotiated(&said.concat()).await;
        assert_eq!(choice.unwrap().unwrap().name, b"e");
        assert_eq!(answered.len(), 18 + 2 * 20);
        assert_eq!(answered[18 + 12..18 + 16], REP_ERR_UNSUP.to_be_bytes());
    }

    #[tokio::test]
    async fn a_client_may_change_its_mind() {
        let said = [3_u32.to_be_bytes().to_vec(), option(OPT_ABORT, b"")].concat();
        assert_eq!(negotiated(&said).await.0.unwrap(), None);
    }

    #[tokio::test]
    async fn nonsense_and_a_cut_at_any_byte_are_errors() {
        let good = [3_u32.to_be_bytes().to_vec(), option(OPT_EXPORT_NAME, b"name")].concat();
        for length in 0..good.len() {
            assert!(negotiated(&good[..length]).await.0.is_err(), "{length}");
        }
        let mut long = good.clone();
        long[4 + 12] = 0xff;
        let endless = [3_u32.to_be_bytes().to_vec(), option(8, b"").repeat(OPTIONS + 1)].concat();
        for bad in [vec![0xff; 64], vec![0; 64], long, endless] {
            assert!(negotiated(&bad).await.0.is_err(), "{bad:?}");
        }
    }
}
