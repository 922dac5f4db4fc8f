//! What a destination says of its content in the description of its NBD export.
//!
//! ```text
//!   xapi-storage-qcow2 session=<uuid> base=<uuid>
//!   xapi-storage-qcow2 session=<uuid> base=blank
//!   xapi-storage-qcow2 session=<uuid>
//! ```
//!
//! It promises: when the session began the content was exactly what `base` names, and what was written since was
//! written by clients of this export. Words are separated by one space. A word `key=value` with another key is for
//! newer programs and changes nothing of that.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::ContentId;

/// The first word, by which other products' descriptions are told apart.
const PRODUCT: &str = "xapi-storage-qcow2";

/// The word for a volume that nothing was ever written to.
const BLANK: &str = "blank";

/// What the content of a volume was when a session began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Base {
    /// Nobody knows.
    #[default]
    Unknown,
    /// It read as zeroes, and took no space.
    Blank,
    /// It was what this names.
    Content(ContentId),
}

/// A destination's promise about its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Announcement {
    /// The life of the export that the promise is made in.
    pub session: ContentId,
    /// What the content was when the session began.
    pub base: Base,
}

impl fmt::Display for Announcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PRODUCT} session={}", self.session)?;
        match self.base {
            Base::Unknown => Ok(()),
            Base::Blank => write!(f, " base={BLANK}"),
            Base::Content(id) => write!(f, " base={id}"),
        }
    }
}

impl FromStr for Announcement {
    /// What is wrong with the description, in words.
    type Err = String;

    /// Parses a description; one that is not exactly as [`Self`] is written promises nothing.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(' ');
        if words.next() != Some(PRODUCT) {
            return Err("it is not of this product".to_owned());
        }
        let (mut session, mut base) = (None, None);
        for word in words {
            let again = match word.split_once('=') {
                Some(("session", id)) => session.replace(content(id)?).is_some(),
                Some(("base", BLANK)) => base.replace(Base::Blank).is_some(),
                Some(("base", id)) => base.replace(Base::Content(content(id)?)).is_some(),
                Some((key, _)) if !key.is_empty() => false,
                _ => return Err("it has a word that is not key=value".to_owned()),
            };
            if again {
                return Err("it says the same thing twice".to_owned());
            }
        }
        let session = session.ok_or_else(|| "it names no session".to_owned())?;
        Ok(Self { session, base: base.unwrap_or_default() })
    }
}

/// Parses a content's id.
fn content(text: &str) -> Result<ContentId, String> {
    text.parse().map_err(|_| "it has a session or a base that is not a lower-case uuid".to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: &str = "aaaaaaaa-0000-4000-8000-000000000001";
    const B: &str = "bbbbbbbb-0000-4000-8000-000000000002";

    fn announcements() -> impl Strategy<Value = Announcement> {
        (0..3).prop_map(|base| Announcement {
            session: ContentId::random(),
            base: match base {
                0 => Base::Unknown,
                1 => Base::Blank,
                _ => Base::Content(ContentId::random()),
            },
        })
    }

    proptest! {
        #[test]
        fn what_is_announced_reads_back(announcement in announcements()) {
            prop_assert_eq!(announcement.to_string().parse(), Ok(announcement));
        }

        #[test]
        fn what_a_newer_program_adds_changes_nothing(
            announcement in announcements(),
            added in "[a-z]{1,4}-[a-z]{0,3}=[!-~]{0,8}",
        ) {
            prop_assert_eq!(format!("{announcement} {added}").parse(), Ok(announcement));
        }

        #[test]
        fn a_description_with_one_character_missing_never_says_something_else(
            announcement in announcements(),
            at in any::<prop::sample::Index>(),
        ) {
            let mut text = announcement.to_string();
            text.remove(at.index(text.len()));
            if let Ok(found) = text.parse::<Announcement>() {
                prop_assert_eq!(found, Announcement { base: Base::Unknown, ..announcement });
            }
        }

        #[test]
        fn any_text_is_judged(text in any::<String>()) {
            prop_assert!(text.parse::<Announcement>().is_err());
        }
    }

    #[test]
    fn descriptions_that_promise_nothing_are_refused_in_words() {
        for (text, words) in [
            (String::new(), "product"),
            ("my disk".to_owned(), "product"),
            (format!("another-product session={A} base={B}"), "product"),
            (format!(" xapi-storage-qcow2 session={A}"), "product"),
            (format!("xapi-storage-qcow2\tsession={A}"), "product"),
            (format!("xapi-storage-qcow22 session={A}"), "product"),
            ("xapi-storage-qcow2".to_owned(), "no session"),
            (format!("xapi-storage-qcow2 base={B}"), "no session"),
            (format!("xapi-storage-qcow2 session={A} session={A}"), "twice"),
            (format!("xapi-storage-qcow2 session={A} base={B} base={B}"), "twice"),
            (format!("xapi-storage-qcow2 session={A} base={B} base=blank"), "twice"),
            (format!("xapi-storage-qcow2 session={A} base="), "uuid"),
            (format!("xapi-storage-qcow2 session={A} base=Blank"), "uuid"),
            (format!("xapi-storage-qcow2 session={A} base={B}x"), "uuid"),
            (format!("xapi-storage-qcow2 session={A} base={}", B.to_uppercase()), "uuid"),
            (format!("xapi-storage-qcow2 session={A}\nbase={B}"), "uuid"),
            (format!("xapi-storage-qcow2 session={A} base={B}\0"), "uuid"),
            (format!("xapi-storage-qcow2 session={A}  base={B}"), "key=value"),
            (format!("xapi-storage-qcow2 session={A} "), "key=value"),
            (format!("xapi-storage-qcow2 session={A} but not really"), "key=value"),
            (format!("xapi-storage-qcow2 session={A} =x"), "key=value"),
        ] {
            let reason = text.parse::<Announcement>().unwrap_err();
            assert!(reason.contains(words), "{text:?}: {reason}");
        }
    }
}
