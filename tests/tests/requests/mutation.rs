//! What is done to a request.

use fake_xapi::wire::Json;

/// What stands for a string until it is put into the text as it is: JSON's own numbers and strings cannot say everything.
const RAW: &str = "@raw";

/// Numbers and other tokens, right and wrong.
const TOKENS: &[&str] = &[
    "-1",
    "0",
    "-0",
    "0.5",
    "1.0",
    "1e3",
    "1e400",
    "-1e400",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "18446744073709551616",
    "123456789012345678901234567890",
    "70368744177665",
    "1E-400",
    "NaN",
    "Infinity",
    "0x10",
    "01",
    "\"\\ud800\"",
    "\"\\u0000\"",
    "\"\\x41\"",
    "'text'",
    "undefined",
    "",
];

/// Texts that are no names. None is the URI of a directory.
const HOSTILE: &[&str] = &[
    "",
    " ",
    ".",
    "..",
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "..%2f..%2fetc",
    "%2e%2e/%2e%2e/etc",
    "%00",
    "%",
    "%zz",
    "$(touch /tmp/x);`x`|x&",
    "\" ' \\ \n\r\t",
    "\u{0}\u{1}\u{1b}[2J\u{7f}",
    "\u{202e}\u{feff}\u{10ffff}☃",
    "null",
    "{}",
    "-rf",
    "--help",
    "file:///etc/passwd",
    "file:///dev/null",
    "file://host/share",
    "file:///tmp/../etc/passwd",
    "file:///%2e%2e/etc/passwd",
    "nfs://user:password@host/share?x#y",
    "qsd://",
    "qsd://x/../y",
    "nbd+unix:///x?socket=/nowhere/../x",
    "nbd://[::1]:0/",
    "nbd:unix:/nowhere:exportname=",
    "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
    "00000000-0000-0000-0000-000000000000",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
];

/// Numbers that only look like chance.
pub struct Chance(u64);

impl Chance {
    /// Chance for one round of a method.
    pub fn new(seed: u64, method: &str, round: u64) -> Self {
        let mut chance = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round.wrapping_mul(0xd134_2543_de82_ef95));
        for byte in method.bytes() {
            chance.0 = chance.next() ^ u64::from(byte);
        }
        chance
    }

    /// The next number (Sebastiano Vigna's splitmix64).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below another one.
    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap()
    }

    fn one<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// Mutates a request, once or more.
pub fn mutated(request: &Json, others: &[&Json], chance: &mut Chance) -> Vec<u8> {
    if chance.below(8) == 0 {
        return no_request(request, others, chance);
    }
    let (mut request, mut tokens) = (request.clone(), Vec::new());
    for _ in 0..=chance.below(3) {
        change(&mut request, &mut tokens, chance);
    }
    let mut text = request.encode();
    for (index, token) in tokens.iter().enumerate() {
        text = text.replace(&format!("\"{RAW}{index}\""), token);
    }
    let mut bytes = text.into_bytes();
    if chance.below(6) == 0 {
        spoil(&mut bytes, chance);
    }
    bytes
}

/// Something that is not a request of the method at all.
fn no_request(request: &Json, others: &[&Json], chance: &mut Chance) -> Vec<u8> {
    let text = request.encode();
    match chance.below(9) {
        0 => Vec::new(),
        1 => b" \n\t ".to_vec(),
        2 => text.as_bytes()[..chance.below(text.len())].to_vec(),
        3 => format!("{text}{text}").into_bytes(),
        4 => [b"\xef\xbb\xbf", text.as_bytes()].concat(),
        5 => [b"\0\0", text.as_bytes()].concat(),
        6 => "[".repeat(1 + chance.below(300_000)).into_bytes(),
        7 => format!("{}{text}", " ".repeat(chance.below(1 << 20))).into_bytes(),
        _ => chance.one(others).encode().into_bytes(),
    }
}

/// Makes bytes that are no JSON any more, or none of this request.
fn spoil(bytes: &mut Vec<u8>, chance: &mut Chance) {
    let at = chance.below(bytes.len());
    match chance.below(4) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, 0xff),
        2 => bytes.extend_from_slice(b"\0garbage"),
        _ => bytes[at] = *chance.one(b"\"{}[]:,\\\x00\xc3\x1f"),
    }
}

/// Changes one value, wherever it stands.
fn change(value: &mut Json, tokens: &mut Vec<&'static str>, chance: &mut Chance) {
    match value {
        Json::Object(fields) if !fields.is_empty() => {
            let at = chance.below(fields.len());
            match chance.below(8) {
                0 => drop(fields.remove(at)),
                1 => {
                    let mut twice = fields[at].clone();
                    if chance.below(2) == 0 {
                        change(&mut twice.1, tokens, chance);
                    }
                    fields.insert(chance.below(fields.len()), twice);
                }
                2 => {
                    let unknown = (chance.one(HOSTILE).to_string(), other(tokens, chance));
                    fields.insert(chance.below(fields.len()), unknown);
                }
                3 => fields[at].0 = fields[at].0.to_uppercase(),
                _ => change(&mut fields[at].1, tokens, chance),
            }
        }
        Json::Array(all) if !all.is_empty() && chance.below(3) > 0 => {
            let at = chance.below(all.len());
            match chance.below(4) {
                0 => drop(all.remove(at)),
                1 => all.push(other(tokens, chance)),
                _ => change(&mut all[at], tokens, chance),
            }
        }
        Json::String(text) if chance.below(2) == 0 => *text = strange(text, chance),
        value => *value = other(tokens, chance),
    }
}

/// A text made of another one. What is made of a directory's URI is the URI of none but those below its own.
fn strange(text: &str, chance: &mut Chance) -> String {
    match chance.below(10) {
        0 => format!("../{text}"),
        1 => format!("{text}/.."),
        2 => format!("{text}/%2e%2e/x"),
        3 => format!("{text}\0"),
        4 => format!("{text}\n"),
        5 => format!("{text}/x"),
        6 => text.to_uppercase(),
        7 => format!("{text}?x=y#z"),
        8 => "x".repeat(chance.below(1 << 20)),
        _ => chance.one(HOSTILE).to_string(),
    }
}

/// Any value.
fn other(tokens: &mut Vec<&'static str>, chance: &mut Chance) -> Json {
    match chance.below(9) {
        0 => Json::Null,
        1 => Json::Bool(chance.below(2) == 0),
        2 => Json::Array(vec![]),
        3 => Json::Object(vec![]),
        4 => Json::Array(vec![other(tokens, chance), other(tokens, chance)]),
        5 => {
            let (mut deep, depth) = (Json::Null, chance.below(400));
            for level in 0..depth {
                deep =
                    if level % 2 == 0 { Json::Array(vec![deep]) } else { Json::Object(vec![("x".to_owned(), deep)]) };
            }
            deep
        }
        6 => Json::from(*chance.one(HOSTILE)),
        _ => {
            let token: &'static str = TOKENS[chance.below(TOKENS.len())];
            tokens.push(token);
            Json::from(format!("{RAW}{}", tokens.len() - 1).as_str())
        }
    }
}
