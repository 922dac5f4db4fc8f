//! Identifiers, parsed once where they enter and never checked again.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, Result};

/// The URI scheme of volumes, which is also the name of the datapath plugin.
pub const SCHEME: &str = "qsd";

/// Declares a newtype over a UUID in its lower-case, hyphenated form.
macro_rules! uuid_newtype {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// Makes a new random identifier.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// Gives the UUID itself.
            pub fn uuid(&self) -> Uuid {
                self.0
            }
        }

        impl FromStr for $name {
            type Err = Error;

            /// Parses the lower-case, hyphenated form and no other: the string becomes a file name and is
            /// compared as a string by xapi, so one identifier has one spelling.
            fn from_str(text: &str) -> Result<Self> {
                match Uuid::try_parse(text) {
                    Ok(uuid) if uuid.as_hyphenated().to_string() == text => Ok(Self(uuid)),
                    _ => Err(Error::BadRequest(format!(
                        concat!("{:?} is not ", $what, " (a lower-case uuid)"),
                        Shortened(text)
                    ))),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }
    };
}

uuid_newtype!(
    /// An SR, as xapi names it.
    SrUuid,
    "an SR"
);
uuid_newtype!(
    /// A volume: xapi's `key`, which equals its `uuid` because xapi uses either as the VDI's location
    /// (xen-api `ocaml/xapi/xapi_vm_migrate.ml`, update_snapshot_info).
    VolumeKey,
    "a volume's key"
);
uuid_newtype!(
    /// A node: one qcow2 file.
    NodeId,
    "a node"
);
uuid_newtype!(
    /// A tree: all nodes that share a root.
    TreeId,
    "a tree"
);
uuid_newtype!(
    /// A content: what a node and all below it read as, for as long as nobody writes. Made at random, so that equal ids
    /// mean equal bytes wherever they are found; equal bytes may well have different ids.
    ContentId,
    "a content"
);
uuid_newtype!(
    /// A mirror: the key that Data.mirror gives and Data.stat takes.
    MirrorKey,
    "a mirror"
);

impl SrUuid {
    /// Takes an SR's uuid as xapi chose it.
    pub fn from_uuid(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

/// Who uses a datapath: a domain id, or one of xapi's names for its own uses (`MIR…`, `CP…`, `u0_…`, `-1`).
///
/// Opaque, up to 255 bytes of printable ASCII; the same string may be active on several volumes at once.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Domain(String);

impl Domain {
    /// Gives the string as xapi sent it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Tells whether xapi made this name for the receiving side of a mirror or copy
    /// (xen-api `ocaml/xapi/xapi_vm_migrate.ml`: `MIR` or `CP` and six hexadecimal digits).
    ///
    /// Such a domain has no guest: when no NBD client is connected, nobody uses the volume through it.
    pub fn is_migration(&self) -> bool {
        let digits = self.0.strip_prefix("MIR").or_else(|| self.0.strip_prefix("CP"));
        digits.is_some_and(|rest| rest.len() == 6 && rest.bytes().all(|byte| byte.is_ascii_hexdigit()))
    }

    /// Tells whether xapi made this name for dom0 itself: `u0_` and the datapath's name, as xapi-storage-script makes it
    /// of domain 0 (xen-api `ocaml/xapi-storage-script/main.ml`, domain_of), or what `static-vdis` calls it.
    pub fn is_control_domain(&self) -> bool {
        self.0 == "0" || self.0.starts_with("u0_")
    }
}

impl FromStr for Domain {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.is_empty() || text.len() > 255 || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::BadRequest(format!("{:?} is not a domain", Shortened(text))));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Domain {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Domain> for String {
    fn from(domain: Domain) -> Self {
        domain.0
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The URI of a volume, `qsd://<sr uuid>/<volume uuid>`, stable for the life of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VolumeUri {
    /// The SR that holds the volume.
    pub sr: SrUuid,
    /// The volume.
    pub volume: VolumeKey,
}

impl FromStr for VolumeUri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts =
            text.strip_prefix(SCHEME).and_then(|rest| rest.strip_prefix("://")).and_then(|rest| rest.split_once('/'));
        let Some((sr, volume)) = parts else {
            return Err(Error::BadRequest(format!(
                "{:?} is not a volume's URI ({SCHEME}://<sr uuid>/<volume uuid>)",
                ShortenedUri(text)
            )));
        };
        Ok(Self { sr: sr.parse()?, volume: volume.parse()? })
    }
}

impl fmt::Display for VolumeUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}://{}/{}", self.sr, self.volume)
    }
}

/// A request's string in an error: its first 100 characters, so that a name of a mebibyte does not come back.
pub struct Shortened<'a>(pub &'a str);

impl fmt::Debug for Shortened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(100) {
            Some((end, _)) => write!(f, "{:?}… ({} bytes)", &self.0[..end], self.0.len()),
            None => write!(f, "{:?}", self.0),
        }
    }
}

/// A request's URI in an error: as [`Shortened`], without what may be a secret, which is who logs in and any parameter. Of
/// one that is wrongly written more may be missing: where a password ends is not known then.
pub struct ShortenedUri<'a>(pub &'a str);

impl fmt::Debug for ShortenedUri<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, rest) = match self.0.split_once("://") {
            Some((scheme, rest)) if !scheme.contains(['@', '?', '#']) => (format!("{scheme}://"), rest),
            _ => (String::new(), self.0),
        };
        let (path, parameters) = rest.split_at(rest.find(['?', '#']).unwrap_or(rest.len()));
        // A path alone, where nobody can log in.
        let is_path = rest.starts_with('/') && !rest.starts_with("//");
        let path = match path.rfind('@') {
            _ if is_path => path.to_owned(),
            _ if parameters.contains('@') => "…".to_owned(),
            Some(at) => format!("…{}", &path[at..]),
            None => path.to_owned(),
        };
        Shortened(&format!("{scheme}{path}{}", if parameters.is_empty() { "" } else { "?…" })).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_has_one_spelling() {
        let text = "3f0b1f6e-9f3c-4d4e-8c9f-1d2b3a4c5d6e";
        assert_eq!(text.parse::<VolumeKey>().unwrap().to_string(), text);
        for bad in [
            "",
            "../3f0b1f6e-9f3c-4d4e-8c9f-1d2b3a4c5d6e",
            "3F0B1F6E-9F3C-4D4E-8C9F-1D2B3A4C5D6E",
            "3f0b1f6e9f3c4d4e8c9f1d2b3a4c5d6e",
            "{3f0b1f6e-9f3c-4d4e-8c9f-1d2b3a4c5d6e}",
            "3f0b1f6e-9f3c-4d4e-8c9f-1d2b3a4c5d6e\0",
        ] {
            assert!(bad.parse::<VolumeKey>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_volume_uri_reads_back_and_takes_nothing_else() {
        let uri = VolumeUri { sr: SrUuid::random(), volume: VolumeKey::random() };
        assert_eq!(uri.to_string().parse::<VolumeUri>().unwrap(), uri);
        for bad in ["", "qsd://", "qsd://a/b", "file:///x"] {
            assert!(bad.parse::<VolumeUri>().is_err(), "{bad:?}");
        }
        assert!(format!("{uri}/").parse::<VolumeUri>().is_err());
        assert!(format!("{uri}?x=1").parse::<VolumeUri>().is_err());
    }

    #[test]
    fn a_uri_is_shown_without_what_may_be_a_secret() {
        for (uri, shown) in [
            ("nbd+unix:///e?socket=/s&session_id=x", r#""nbd+unix:///e?…""#),
            ("nfs://me:secret@host/a", r#""nfs://…@host/a""#),
            ("nfs://me:se/cr@et@host/a", r#""nfs://…@host/a""#),
            ("nfs://me:se?cr#et@host/a", r#""nfs://…?…""#),
            ("smb://host/share;me:secret@x", r#""smb://…@x""#),
            ("//me:secret@host/a", r#""…@host/a""#),
            ("me:secret@host:/a", r#""…@host:/a""#),
            ("me@x://secret@host", r#""…@host""#),
            ("file:///a@b", r#""file:///a@b""#),
            ("/a@b#c", r#""/a@b?…""#),
            ("nonsense", r#""nonsense""#),
        ] {
            assert_eq!(format!("{:?}", ShortenedUri(uri)), shown);
        }
    }

    #[test]
    fn only_xapis_own_names_for_a_migration_count_as_such() {
        for (domain, expected) in [
            ("MIR0a1b2c", true),
            ("CPffffff", true),
            ("MIR", false),
            ("7", false),
            ("-1", false),
            ("CPU123456", false),
        ] {
            assert_eq!(domain.parse::<Domain>().unwrap().is_migration(), expected, "{domain}");
        }
    }

    #[test]
    fn an_error_shows_only_the_start_of_a_long_string() {
        let error = "x".repeat(1 << 20).parse::<VolumeKey>().unwrap_err().to_string();
        assert!(error.len() < 300, "{}", error.len());
    }
}
