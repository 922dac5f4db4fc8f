//! The negotiation before the first command: greeting, structured replies, the export.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Error, wire};

/// The longest option reply that is read; a description has at most 4,096 bytes.
const LONGEST_OPTION_REPLY: u32 = 64 << 10;

/// What to ask a server for.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Whether structured replies are asked for.
    pub structured: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { structured: true }
    }
}

/// What a server says of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Its size in bytes.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
    /// Its description, if it has one.
    pub description: Option<String>,
    /// The smallest length and alignment of a command, in bytes.
    pub minimum_block: u32,
    /// The best length of a command, in bytes.
    pub preferred_block: u32,
    /// The longest command, in bytes.
    pub maximum_block: u32,
    /// Whether replies are structured.
    pub structured: bool,
}

impl Export {
    /// Whether it refuses writes.
    pub fn read_only(&self) -> bool {
        self.flags & wire::FLAG_READ_ONLY != 0
    }

    /// Whether it knows a command.
    pub(super) fn knows(&self, command: wire::Command) -> bool {
        let flag = match command {
            wire::Command::Flush => wire::FLAG_SEND_FLUSH,
            wire::Command::Trim => wire::FLAG_SEND_TRIM,
            wire::Command::WriteZeroes => wire::FLAG_SEND_WRITE_ZEROES,
            wire::Command::Read | wire::Command::Write | wire::Command::Disconnect => return true,
        };
        self.flags & flag != 0
    }
}

struct OptionReply {
    kind: u32,
    data: Vec<u8>,
}

/// Negotiates an export on a fresh connection; on success the next byte from the server is a reply to a command.
pub(super) async fn negotiate<S>(stream: &mut S, name: &str, options: Options) -> Result<Export, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let magic = stream.read_u64().await.map_err(lost)?;
    let again = stream.read_u64().await.map_err(lost)?;
    if magic != wire::GREETING_MAGIC || again != wire::OPTION_MAGIC {
        return Err(Error::Protocol("the greeting is not newstyle NBD".to_owned()));
    }
    let offered = stream.read_u16().await.map_err(lost)?;
    if offered & wire::FIXED_NEWSTYLE == 0 {
        return Err(Error::Protocol("the server is not fixed newstyle".to_owned()));
    }
    let flags = u32::from(offered & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES));
    stream.write_u32(flags).await.map_err(lost)?;
    let structured = options.structured && ask_for_structured_replies(stream).await?;
    go(stream, name, structured).await
}

/// Returns whether the server agreed; a server that does not know the option is no error.
async fn ask_for_structured_replies<S>(stream: &mut S) -> Result<bool, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send_option(stream, wire::OPT_STRUCTURED_REPLY, &[]).await?;
    let reply = read_option_reply(stream, wire::OPT_STRUCTURED_REPLY).await?;
    match reply.kind {
        wire::REP_ACK => Ok(true),
        kind if kind & wire::REP_ERROR_BIT != 0 => Ok(false),
        kind => Err(Error::Protocol(format!("reply {kind} to NBD_OPT_STRUCTURED_REPLY"))),
    }
}

async fn go<S>(stream: &mut S, name: &str, structured: bool) -> Result<Export, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let length = u32::try_from(name.len()).map_err(|_| Error::Request("the export name is too long".to_owned()))?;
    let mut data = Vec::with_capacity(name.len() + 10);
    data.extend_from_slice(&length.to_be_bytes());
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&2u16.to_be_bytes());
    data.extend_from_slice(&wire::INFO_DESCRIPTION.to_be_bytes());
    data.extend_from_slice(&wire::INFO_BLOCK_SIZE.to_be_bytes());
    send_option(stream, wire::OPT_GO, &data).await?;

    let mut size_and_flags = None;
    let mut description = None;
    // What doc/proto.md lets a client assume of a server that does not tell.
    let (mut minimum_block, mut preferred_block, mut maximum_block) = (1, 4096, wire::LARGEST_PAYLOAD);
    loop {
        let reply = read_option_reply(stream, wire::OPT_GO).await?;
        match reply.kind {
            wire::REP_ACK => break,
            wire::REP_INFO => {
                let (kind, rest) = split_u16(&reply.data)?;
                match kind {
                    wire::INFO_EXPORT => {
                        let (size, rest) = split_u64(rest)?;
                        let (flags, _) = split_u16(rest)?;
                        size_and_flags = Some((size, flags));
                    }
                    wire::INFO_DESCRIPTION => description = Some(String::from_utf8_lossy(rest).into_owned()),
                    wire::INFO_BLOCK_SIZE => {
                        let (first, rest) = split_u32(rest)?;
                        let (second, rest) = split_u32(rest)?;
                        let (third, _) = split_u32(rest)?;
                        (minimum_block, preferred_block) = (first.max(1), second);
                        maximum_block = third.min(wire::LARGEST_PAYLOAD);
                    }
                    _ => {}
                }
            }
            kind if kind & wire::REP_ERROR_BIT != 0 => {
                return Err(Error::Refused {
                    option: "NBD_OPT_GO",
                    reply: wire::option_error(kind),
                    text: String::from_utf8_lossy(&reply.data).into_owned(),
                });
            }
            kind => return Err(Error::Protocol(format!("reply {kind} to NBD_OPT_GO"))),
        }
    }
    let (size, flags) =
        size_and_flags.ok_or_else(|| Error::Protocol("NBD_OPT_GO without NBD_INFO_EXPORT".to_owned()))?;
    Ok(Export { size, flags, description, minimum_block, preferred_block, maximum_block, structured })
}

async fn send_option<S: AsyncWrite + Unpin>(stream: &mut S, option: u32, data: &[u8]) -> Result<(), Error> {
    let length = u32::try_from(data.len()).map_err(|_| Error::Request("an option is too long".to_owned()))?;
    let mut message = Vec::with_capacity(16 + data.len());
    message.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    message.extend_from_slice(&option.to_be_bytes());
    message.extend_from_slice(&length.to_be_bytes());
    message.extend_from_slice(data);
    stream.write_all(&message).await.map_err(lost)
}

async fn read_option_reply<S: AsyncRead + Unpin>(stream: &mut S, option: u32) -> Result<OptionReply, Error> {
    if stream.read_u64().await.map_err(lost)? != wire::OPTION_REPLY_MAGIC {
        return Err(Error::Protocol("an option's reply has the wrong magic".to_owned()));
    }
    let answered = stream.read_u32().await.map_err(lost)?;
    if answered != option {
        return Err(Error::Protocol(format!("option {option} was asked for and {answered} answered")));
    }
    let kind = stream.read_u32().await.map_err(lost)?;
    let length = stream.read_u32().await.map_err(lost)?;
    if length > LONGEST_OPTION_REPLY {
        return Err(Error::Protocol(format!("an option's reply of {length} bytes")));
    }
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await.map_err(lost)?;
    Ok(OptionReply { kind, data })
}

fn lost(error: std::io::Error) -> Error {
    Error::Lost(format!("during the handshake: {error}"))
}

fn short() -> Error {
    Error::Protocol("an information reply is too short".to_owned())
}

fn split_u16(data: &[u8]) -> Result<(u16, &[u8]), Error> {
    let (head, rest) = data.split_first_chunk().ok_or_else(short)?;
    Ok((u16::from_be_bytes(*head), rest))
}

fn split_u32(data: &[u8]) -> Result<(u32, &[u8]), Error> {
    let (head, rest) = data.split_first_chunk().ok_or_else(short)?;
    Ok((u32::from_be_bytes(*head), rest))
}

fn split_u64(data: &[u8]) -> Result<(u64, &[u8]), Error> {
    let (head, rest) = data.split_first_chunk().ok_or_else(short)?;
    Ok((u64::from_be_bytes(*head), rest))
}
