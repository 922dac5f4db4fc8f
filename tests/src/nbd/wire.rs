//! Numbers and headers of the NBD protocol, from the NBD project's doc/proto.md.

/// The first eight bytes of a server's greeting, "NBDMAGIC".
pub const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// The next eight, and the start of each option, "IHAVEOPT".
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// The start of each option's reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// The start of each command.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// The start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// The start of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag of both sides: fixed newstyle.
pub const FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag of both sides: no padding after the old export name option.
pub const NO_ZEROES: u16 = 2;

/// Chooses an export and starts the transmission, without any answer but its size and flags.
pub const OPT_EXPORT_NAME: u32 = 1;
/// Asks for an export and starts the transmission.
pub const OPT_GO: u32 = 7;
/// Asks for structured replies.
pub const OPT_STRUCTURED_REPLY: u32 = 8;

/// An option is done.
pub const REP_ACK: u32 = 1;
/// A piece of information about an export.
pub const REP_INFO: u32 = 3;
/// Set in every option reply that is an error.
pub const REP_ERROR_BIT: u32 = 1 << 31;

/// Size and transmission flags of an export.
pub const INFO_EXPORT: u16 = 0;
/// The export's description.
pub const INFO_DESCRIPTION: u16 = 2;
/// The export's block sizes.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flag: the export cannot be written.
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: flush is known.
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: trim is known.
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: write-zeroes is known.
pub const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;

/// Chunk flag: the last of a reply.
pub const CHUNK_DONE: u16 = 1;
/// Chunk without content.
pub const CHUNK_NONE: u16 = 0;
/// Chunk of data at an offset.
pub const CHUNK_OFFSET_DATA: u16 = 1;
/// Chunk of zeroes at an offset.
pub const CHUNK_OFFSET_HOLE: u16 = 2;
/// Chunk types from here on are errors.
pub const CHUNK_ERROR_BIT: u16 = 1 << 15;

/// The most that is ever asked for or accepted in one command, in bytes; doc/proto.md's own advice.
pub const LARGEST_PAYLOAD: u32 = 32 << 20;

/// A transmission command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Reads bytes.
    Read,
    /// Writes bytes.
    Write,
    /// Says goodbye; has no reply.
    Disconnect,
    /// Makes finished writes durable.
    Flush,
    /// Says that bytes are not needed any more.
    Trim,
    /// Makes bytes read as zeroes.
    WriteZeroes,
}

impl Command {
    /// The number on the wire.
    pub fn number(self) -> u16 {
        match self {
            Command::Read => 0,
            Command::Write => 1,
            Command::Disconnect => 2,
            Command::Flush => 3,
            Command::Trim => 4,
            Command::WriteZeroes => 6,
        }
    }

    /// The name in doc/proto.md.
    pub fn name(self) -> &'static str {
        match self {
            Command::Read => "NBD_CMD_READ",
            Command::Write => "NBD_CMD_WRITE",
            Command::Disconnect => "NBD_CMD_DISC",
            Command::Flush => "NBD_CMD_FLUSH",
            Command::Trim => "NBD_CMD_TRIM",
            Command::WriteZeroes => "NBD_CMD_WRITE_ZEROES",
        }
    }
}

/// The header of a command as it goes on the wire.
pub fn request_header(command: Command, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut header = [0; 28];
    header[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    header[6..8].copy_from_slice(&command.number().to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..28].copy_from_slice(&length.to_be_bytes());
    header
}

/// The name of an option's error reply.
pub fn option_error(reply: u32) -> String {
    let name = match reply ^ REP_ERROR_BIT {
        1 => "NBD_REP_ERR_UNSUP",
        2 => "NBD_REP_ERR_POLICY",
        3 => "NBD_REP_ERR_INVALID",
        4 => "NBD_REP_ERR_PLATFORM",
        5 => "NBD_REP_ERR_TLS_REQD",
        6 => "NBD_REP_ERR_UNKNOWN",
        7 => "NBD_REP_ERR_SHUTDOWN",
        8 => "NBD_REP_ERR_BLOCK_SIZE_REQD",
        9 => "NBD_REP_ERR_TOO_BIG",
        other => return format!("error reply {other}"),
    };
    name.to_owned()
}
