//! What a fault is, and the list of all.

use crate::wrapper::{Answer, Call};

/// A rule that a plugin breaks.
pub struct Fault {
    /// What the plugin does wrong.
    pub breaks: &'static str,
    /// The check that is meant to catch it: its group and its title.
    pub check: &'static str,
    /// What the check's reason has to have in it.
    pub sign: &'static str,
    /// A script that the plugin lacks.
    pub without: &'static str,
    /// What it answers; what the real one does, where it says nothing.
    pub act: fn(&Call) -> Option<Answer>,
}

/// A fault in what is answered.
pub const fn fault(
    breaks: &'static str,
    check: &'static str,
    sign: &'static str,
    act: fn(&Call) -> Option<Answer>,
) -> Fault {
    Fault { breaks, check, sign, without: "", act }
}

/// All faults.
pub fn all() -> Vec<Fault> {
    let mut faults = crate::answers::faults();
    faults.extend(crate::srs::faults());
    faults.extend(crate::volumes::faults());
    faults.extend(crate::datapaths::faults());
    faults.extend(crate::compose::faults());
    faults.extend(crate::copies::faults());
    faults
}

pub const CREATE: &str = "volume: Volume.create answers a volume as asked, and Volume.stat and SR.ls tell the same";
pub const ISOLATION: &str = "data: writes to a volume do not show in its snapshots";
pub const UNKNOWN: &str = "volume: every other Volume call on an unknown key says Volume_does_not_exist";
pub const SAME_ANSWER: &str = "order: attach answers every domain the same, and again while it is active";
