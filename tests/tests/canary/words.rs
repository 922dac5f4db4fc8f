//! The strings that are sent, and where each may come out again.

/// Where a string could come out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The answer of a call, which goes to whoever sent it.
    Answer,
    /// The error of a call.
    Refusal,
    /// Standard error of a call.
    Stderr,
    /// The host's log.
    Log,
    /// A span for xapi's observers.
    Span,
    /// A file below /run.
    Runtime,
    /// The last failures.
    Failures,
    /// Arguments and environment of what the calls executed.
    Executed,
    /// The same of what runs, as /proc has it.
    Process,
    /// Plugin.diagnostics.
    Diagnostics,
    /// `xapi-storage-qcow2 status`.
    Status,
    /// `xapi-storage-qcow2 tree`.
    Tree,
    /// `xapi-storage-qcow2 check`.
    Check,
}

/// A string that is sent.
pub struct Word {
    /// What it is.
    pub what: &'static str,
    /// The string.
    pub text: &'static str,
    /// Where it may come out.
    places: &'static [Place],
    /// Of which methods it may be in the answer; of all if there are none.
    methods: &'static [&'static str],
}

/// What comes out nowhere.
const fn secret(what: &'static str, text: &'static str) -> Word {
    Word { what, text, places: &[], methods: &[] }
}

/// What a caller has chosen to call something.
const fn shown(what: &'static str, text: &'static str, places: &'static [Place]) -> Word {
    Word { what, text, places, methods: &[] }
}

use Place::{Answer, Diagnostics, Runtime, Status, Tree};

pub const PASSWORD: &str = "cpasswordQ7vXw3kLz";
pub const NUMBER: &str = "48151623427310842";
pub const STRING: &str = "cstringB5nGw7qTd";
pub const URI_USER: &str = "curiuserK2mPq8sVt";
pub const URI_PASSWORD: &str = "curipassN6bFh4jRx";
pub const URI_QUERY: &str = "curiqueryT9cDg5wYu";
pub const URI_FRAGMENT: &str = "curifragJ3zMv7nSe";
pub const REMOTE_USER: &str = "cremuserH8kWp2xLf";
pub const REMOTE_PASSWORD: &str = "crempassV4tQb6dJy";
pub const REMOTE_QUERY: &str = "cremqueryG5rZs9mCa";
pub const REMOTE_FRAGMENT: &str = "cremfragS6pNd3fHt";
pub const CREDENTIAL: &str = "cenvironX8gRj6pBe";
pub const BAGGAGE: &str = "cbaggageW2yTk9hNo";
pub const DATA: &str = "cguestdataL7fVn4sKi";
pub const SR_NAME: &str = "csrnameD6wHm3vPq";
pub const SR_DESCRIPTION: &str = "csrdescrF9jXb5tZu";
pub const NAME: &str = "cvolnameR4nKs8gWe";
pub const DESCRIPTION: &str = "cvoldescrM2qLd7yVo";
pub const VALUE: &str = "ckeyvalueC5hTf9rJa";

/// All of them.
pub const WORDS: &[Word] = &[
    // SR.create's answer is the device-config that xapi is to keep.
    Word { what: "a device-config's password", text: PASSWORD, places: &[Answer], methods: &["SR.create"] },
    secret("a device-config's password that is a number", NUMBER),
    secret("a device-config that is a string", STRING),
    secret("who logs in by a device-config's uri", URI_USER),
    secret("the password in a device-config's uri", URI_PASSWORD),
    secret("the query of a device-config's uri", URI_QUERY),
    secret("the fragment of a device-config's uri", URI_FRAGMENT),
    secret("who logs in by a remote", REMOTE_USER),
    secret("the password in a remote", REMOTE_PASSWORD),
    secret("the query of a remote", REMOTE_QUERY),
    secret("the fragment of a remote", REMOTE_FRAGMENT),
    secret("a credential in the caller's environment", CREDENTIAL),
    secret("what comes with a trace", BAGGAGE),
    secret("a guest's data", DATA),
    shown("an SR's name", SR_NAME, &[Answer, Runtime, Diagnostics, Status, Tree]),
    shown("an SR's description", SR_DESCRIPTION, &[Answer, Runtime]),
    shown("a volume's name", NAME, &[Answer, Diagnostics, Tree]),
    shown("a volume's description", DESCRIPTION, &[Answer]),
    shown("the value of a volume's key", VALUE, &[Answer]),
];

/// Says which words are where they may not be; `which` is the method, file or process.
pub fn judge(place: Place, which: &str, bytes: &[u8]) -> Vec<String> {
    let is_allowed = |word: &Word| {
        word.places.contains(&place) && (place != Answer || word.methods.is_empty() || word.methods.contains(&which))
    };
    let text = String::from_utf8_lossy(bytes);
    let wrong = WORDS.iter().filter(|word| !is_allowed(word) && text.contains(word.text));
    wrong.map(|word| format!("{} ({}) is at {place:?} of {which}", word.what, word.text)).collect()
}
