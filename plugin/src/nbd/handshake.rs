//! The start of an NBD connection: the server's greeting, and what it says of an export.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::wire::{
    FIXED_NEWSTYLE, INFO_DESCRIPTION, INFO_EXPORT, INIT_MAGIC, NO_ZEROES, OPT_GO, OPT_INFO, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, REP_ACK, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_ERROR, REP_INFO, protocol,
};
use crate::error::{Error, Result};

/// The longest answer to an option that is read: the protocol's strings are at most 4096 bytes.
const REPLY_BYTES: u32 = 8192;

/// The most answers to one option that are read; the protocol has four kinds of information.
const REPLIES: usize = 32;

/// A server's greeting, to be played to another client of the same connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    flags: u16,
}

/// What a client says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFlags(u32);

impl Greeting {
    /// Reads the greeting of a server that negotiates options.
    ///
    /// # Errors
    ///
    /// When the connection ends, or the peer does not speak the fixed newstyle handshake.
    pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Self> {
        let doing = "reading the NBD server's greeting";
        let failed = |error| Error::io(doing, error);
        let init = stream.read_u64().await.map_err(failed)?;
        let option = stream.read_u64().await.map_err(failed)?;
        if init != INIT_MAGIC || option != OPTION_MAGIC {
            return Err(protocol(doing, format!("the magic is {init:#x} {option:#x}")));
        }
        let flags = stream.read_u16().await.map_err(failed)?;
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(protocol(doing, "the server does not speak fixed newstyle".to_owned()));
        }
        Ok(Self { flags })
    }

    /// Gives the greeting as the server sent it.
    pub fn to_bytes(self) -> [u8; 18] {
        let mut bytes = [0; 18];
        bytes[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[16..].copy_from_slice(&self.flags.to_be_bytes());
        bytes
    }

    /// Gives what QEMU's client answers to this greeting (QEMU `nbd/client.c`): each of the two flags that it knows
    /// and the server offers. Whoever speaks before it on the same connection must have said the same.
    pub fn client_flags(self) -> ClientFlags {
        ClientFlags(u32::from(self.flags & (FIXED_NEWSTYLE | NO_ZEROES)))
    }
}

impl ClientFlags {
    /// Gives the flags as they are sent.
    pub fn to_bytes(self) -> [u8; 4] {
        self.0.to_be_bytes()
    }
}

/// What a server says of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its size in bytes, where the server tells it before the transmission phase.
    pub size: Option<u64>,
    /// Its transmission flags, which come with its size.
    pub flags: Option<u16>,
    /// Its description, where it has one.
    pub description: Option<String>,
}

/// Asks a server about an export, after its greeting was read; the connection stays in the option phase.
///
/// Sends the client's flags first. A server that knows neither the option nor anything of the export leaves the
/// answer empty: only the export's own client must be told that it does not exist.
///
/// # Errors
///
/// When the connection ends or the peer breaks the protocol, and when it says that there is no such export.
pub async fn query_export(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    greeting: Greeting,
    export: &str,
) -> Result<ExportInfo> {
    let doing = "asking the NBD server about the export";
    let asked = ask(stream, doing, OPT_INFO, greeting, export, &[INFO_DESCRIPTION]).await?;
    Ok(asked.unwrap_or_default())
}

/// Chooses an export, after the server's greeting was read: what follows is the transmission phase.
///
/// Sends the client's flags first. `None` when the server does not know the option (NBD_OPT_GO); the connection is
/// then still in the option phase, for NBD_OPT_EXPORT_NAME. That one comes second because a server cannot refuse it
/// but by hanging up, and because QEMU's crashes when the client is gone before it has answered (docs/qemu.md).
///
/// # Errors
///
/// When the connection ends or the peer breaks the protocol, and when it refuses the export.
pub async fn choose_export(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    greeting: Greeting,
    export: &str,
) -> Result<Option<ExportInfo>> {
    let doing = "choosing the NBD server's export";
    match ask(stream, doing, OPT_GO, greeting, export, &[]).await? {
        Ok(info) => Ok(Some(info)),
        Err(REP_ERR_UNSUP) => Ok(None),
        Err(refusal) => Err(protocol(doing, format!("it answers {export:?} with error {refusal:#x}"))),
    }
}

/// Sends the client's flags and an option about an export, and gathers what the server says; or the error with which
/// it answers.
async fn ask(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    doing: &str,
    option: u32,
    greeting: Greeting,
    export: &str,
    kinds: &[u16],
) -> Result<std::result::Result<ExportInfo, u32>> {
    let failed = |error| Error::io(doing, error);
    let mut about = Vec::new();
    let name =
        u32::try_from(export.len()).map_err(|_| protocol(doing, "the export's name is too long".to_owned()))?;
    about.extend(name.to_be_bytes());
    about.extend(export.as_bytes());
    about.extend((kinds.len() as u16).to_be_bytes());
    about.extend(kinds.iter().flat_map(|kind| kind.to_be_bytes()));
    let mut request = greeting.client_flags().to_bytes().to_vec();
    request.extend(OPTION_MAGIC.to_be_bytes());
    request.extend(option.to_be_bytes());
    request.extend((about.len() as u32).to_be_bytes());
    request.extend(about);
    stream.write_all(&request).await.map_err(failed)?;
    stream.flush().await.map_err(failed)?;

    let mut info = ExportInfo::default();
    for _ in 0..REPLIES {
        let magic = stream.read_u64().await.map_err(failed)?;
        let answered = stream.read_u32().await.map_err(failed)?;
        let kind = stream.read_u32().await.map_err(failed)?;
        let length = stream.read_u32().await.map_err(failed)?;
        if magic != OPTION_REPLY_MAGIC || answered != option || length > REPLY_BYTES {
            let reason = format!("a reply with magic {magic:#x}, option {answered}, length {length}");
            return Err(protocol(doing, reason));
        }
        let mut payload = vec![0; length as usize];
        stream.read_exact(&mut payload).await.map_err(failed)?;
        match kind {
            REP_ACK => return Ok(Ok(info)),
            REP_INFO => take_info(&payload, &mut info),
            REP_ERR_UNKNOWN => return Err(protocol(doing, format!("it has no export {export:?}"))),
            error if error & REP_ERROR != 0 => return Ok(Err(error)),
            other => return Err(protocol(doing, format!("a reply of type {other}"))),
        }
    }
    Err(protocol(doing, "more replies than there are kinds of information".to_owned()))
}

/// Takes what is known to us from one NBD_REP_INFO; the rest is passed over, as the protocol wants it.
fn take_info(payload: &[u8], info: &mut ExportInfo) {
    let Some((kind, rest)) = payload.split_first_chunk::<2>() else { return };
    match u16::from_be_bytes(*kind) {
        INFO_EXPORT => {
            if let Some((size, flags)) = rest.split_first_chunk::<8>() {
                info.size = Some(u64::from_be_bytes(*size));
                info.flags = flags.first_chunk().map(|flags| u16::from_be_bytes(*flags));
            }
        }
        INFO_DESCRIPTION => info.description = String::from_utf8(rest.to_vec()).ok(),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the query against a peer that sends `bytes` whatever it is asked, and then closes.
    async fn answered(bytes: &[u8]) -> Result<ExportInfo> {
        let (mut near, mut far) = tokio::io::duplex(1 << 16);
        far.write_all(bytes).await.unwrap();
        far.shutdown().await.unwrap();
        let greeting = Greeting::read(&mut near).await?;
        query_export(&mut near, greeting, "e").await
    }

    fn greeting(flags: u16) -> Vec<u8> {
        Greeting { flags }.to_bytes().to_vec()
    }

    fn reply(kind: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(OPT_INFO.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend((payload.len() as u32).to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    #[tokio::test]
    async fn size_and_description_are_read() {
        let size = [&[0, 0][..], &4096_u64.to_be_bytes(), &[0, 1]].concat();
        let text = [&[0, 2][..], b"session=x"].concat();
        let bytes = [greeting(3), reply(REP_INFO, &size), reply(REP_INFO, &text), reply(REP_ACK, b"")].concat();
        let info = answered(&bytes).await.unwrap();
        assert_eq!(info, ExportInfo { size: Some(4096), flags: Some(1), description: Some("session=x".to_owned()) });
    }

    #[tokio::test]
    async fn a_server_without_the_option_tells_nothing() {
        let bytes = [greeting(3), reply(REP_ERROR | 1, b"")].concat();
        assert_eq!(answered(&bytes).await.unwrap(), ExportInfo::default());
    }

    #[tokio::test]
    async fn a_missing_export_is_an_error_that_names_it() {
        let bytes = [greeting(3), reply(REP_ERR_UNKNOWN, b"")].concat();
        assert!(answered(&bytes).await.unwrap_err().chain().contains("\"e\""));
    }

    #[tokio::test]
    async fn nonsense_is_refused_without_reading_on() {
        let mut oversized = reply(REP_INFO, b"");
        oversized[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        let endless = reply(REP_INFO, &[0, 9]).repeat(REPLIES + 1);
        for bytes in [vec![0; 18], greeting(0), [greeting(3), oversized].concat(), [greeting(3), endless].concat()] {
            let error = answered(&bytes).await.unwrap_err();
            assert!(
                matches!(&error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::InvalidData),
                "{error:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_connection_cut_at_any_byte_is_an_error() {
        let bytes = [greeting(3), reply(REP_ACK, b"")].concat();
        for length in 0..bytes.len() {
            assert!(answered(&bytes[..length]).await.is_err(), "{length}");
        }
    }

    /// Chooses an export of a peer that sends `bytes` whatever it is asked, and then closes.
    async fn chosen(bytes: &[u8]) -> Result<Option<ExportInfo>> {
        let (mut near, mut far) = tokio::io::duplex(1 << 16);
        far.write_all(bytes).await.unwrap();
        far.shutdown().await.unwrap();
        let greeting = Greeting::read(&mut near).await?;
        choose_export(&mut near, greeting, "e").await
    }

    fn reply_to_go(kind: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = reply(kind, payload);
        bytes[8..12].copy_from_slice(&OPT_GO.to_be_bytes());
        bytes
    }

    #[tokio::test]
    async fn a_chosen_export_has_size_and_flags() {
        let size = [&[0, 0][..], &4096_u64.to_be_bytes(), &[1, 3]].concat();
        let bytes = [greeting(3), reply_to_go(REP_INFO, &size), reply_to_go(REP_ACK, b"")].concat();
        let expected = ExportInfo { size: Some(4096), flags: Some(0x103), description: None };
        assert_eq!(chosen(&bytes).await.unwrap(), Some(expected));
    }

    #[tokio::test]
    async fn only_a_server_that_does_not_know_the_option_is_asked_in_another_way() {
        let bytes = [greeting(3), reply_to_go(REP_ERR_UNSUP, b"")].concat();
        assert_eq!(chosen(&bytes).await.unwrap(), None);
        for refusal in [REP_ERROR | 2, REP_ERROR | 5, REP_ERR_UNKNOWN] {
            let bytes = [greeting(3), reply_to_go(refusal, b"")].concat();
            assert!(chosen(&bytes).await.unwrap_err().chain().contains("\"e\""), "{refusal:#x}");
        }
    }

    #[test]
    fn the_client_says_what_qemu_says_to_the_same_greeting() {
        assert_eq!(Greeting { flags: 3 }.client_flags().to_bytes(), [0, 0, 0, 3]);
        assert_eq!(Greeting { flags: 1 }.client_flags().to_bytes(), [0, 0, 0, 1]);
        assert_eq!(Greeting { flags: 0x8003 }.client_flags().to_bytes(), [0, 0, 0, 3]);
    }
}
