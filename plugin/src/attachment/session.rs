//! Sessions: for how long what an export says of the volume's content holds (docs/mirroring.md).
//!
//! ```text
//!   opened for writing ─► session A ──── snapshot, or the next connection after writes ────► session B ─► …
//!                         base: what the volume held                                        base: A
//!                                                                                closed: the volume holds B
//! ```
//!
//! A session's token is random and names what the volume holds when the session ends. It is told to NBD clients only
//! where xapi attaches the volume before each connection, so that there is a moment to end the session in: for the
//! domain of a migration. While that is the case a session ends only with the export away, and nobody writes between
//! two sessions. Where a session cannot be ended because somebody is connected, its token is given up: it names nothing,
//! ever.

use serde::{Deserialize, Serialize};

use super::Attachment;
use super::state::Use;
use crate::error::{Error, Result};
use crate::id::{ContentId, Domain};
use crate::mirror::{Announcement, Base};
use crate::qemu::graph;
use crate::qemu::qmp::Client;

/// One life of an export that can be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Session {
    /// Names what the volume holds when the session ends.
    pub token: ContentId,
    /// What the volume held when the session began.
    pub base: Base,
    /// What the export's description says.
    pub said: Said,
}

/// What the description of an export says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Said {
    /// Nothing.
    Nothing,
    /// The session.
    This,
    /// Another session, whose promise does not hold any more.
    Stale,
}

impl Session {
    /// Begins a session, which is told to clients or not.
    pub fn begin(base: Base, is_told: bool) -> Self {
        let said = if is_told { Said::This } else { Said::Nothing };
        Self { token: ContentId::random(), base, said }
    }

    /// Gives the session after one that has ended with the export away.
    fn after(self, is_told: bool) -> Self {
        // What was never told nobody can know.
        let base = if self.said == Said::This { Base::Content(self.token) } else { Base::Unknown };
        Self::begin(base, is_told)
    }

    /// Gives what clients are to be told.
    pub fn announcement(&self) -> Option<Announcement> {
        (self.said == Said::This).then_some(Announcement { session: self.token, base: self.base })
    }
}

impl Attachment {
    /// Gives the session that goes on.
    pub(super) fn session(&self) -> Option<Session> {
        self.state.open.as_ref().and_then(|open| open.session)
    }

    /// Replaces the session, unwritten.
    fn set_session(&mut self, session: Session) {
        if let Some(open) = &mut self.state.open {
            open.session = Some(session);
        }
    }

    /// Tells whether clients may be told of the sessions of a domain that writes: others do not.
    pub(super) fn may_tell(&self, domain: &Domain) -> bool {
        let writes = |(other, usage): (&Domain, &Use)| other != domain && *usage == Use::ReadWrite;
        domain.is_migration() && !self.state.domains.iter().any(writes)
    }

    /// Begins the next session after one that has ended with the export away, for clients that are told so.
    pub(super) fn go_on_after_end(&mut self) {
        if let Some(session) = self.session().filter(|session| session.said == Said::This) {
            self.set_session(session.after(true));
        }
    }

    /// Gives a session's token up, since somebody may be writing who does not belong to the session.
    fn give_up_token(&mut self) -> Result<()> {
        let Some(session) = self.session() else { return Ok(()) };
        let said = if session.said == Said::Nothing { Said::Nothing } else { Said::Stale };
        self.set_session(Session { said, ..Session::begin(Base::Unknown, false) });
        self.save()
    }

    /// Takes note that somebody else begins to write. What the export said does not hold from then on, and is no longer
    /// said where nobody is connected.
    ///
    /// # Errors
    ///
    /// When the record cannot be written or the daemon does not answer.
    pub(super) async fn join_session(&mut self) -> Result<()> {
        self.give_up_token()?;
        if self.session().is_none_or(|session| session.said == Said::Nothing) || self.clients().await? > 0 {
            return Ok(());
        }
        let client = self.client().await?;
        self.learn_top(&client).await?;
        if self.take_export_away(&client, false).await? {
            // What is stale is not said again.
            self.put_export_back(&client).await?;
        }
        Ok(())
    }

    /// Ends the session that clients were told of, before something is done after which it could not be told what it
    /// has left. The export is then away, and the token given names what the volume holds. `None`, with the export in
    /// place, when there is none, or it cannot be ended because a client stays connected: then its token is given up.
    ///
    /// Only a migration's client is waited for: xapi's proxy closes its connection about when it calls.
    ///
    /// # Errors
    ///
    /// When the record cannot be written or the daemon does not answer.
    pub(super) async fn end_session(&mut self, client: &Client) -> Result<Option<ContentId>> {
        let Some(session) = self.session().filter(|session| session.said == Said::This) else { return Ok(None) };
        let mut active = self.state.domains.iter().filter(|(_, usage)| usage.is_active());
        let is_held = if active.all(|(domain, _)| domain.is_migration()) {
            !self.clients_are_gone().await?
        } else {
            self.clients().await? > 0
        };
        if !is_held && self.take_export_away(client, false).await? {
            return Ok(Some(session.token));
        }
        self.give_up_token()?;
        Ok(None)
    }

    /// Sees that what the export says holds for who connects next for a domain that is active for writing already: when
    /// something was written, the next session begins. Nothing is done while nothing was written.
    ///
    /// A client that `connects` after this reads the description, so nothing may be said then that does not hold. A
    /// client of this domain that has written and stays connected is cut off for that: xapi's proxy makes one connection
    /// at a time, and comes for the next when it is through with the last.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeInUse`] when the description does not hold and cannot be taken away, as another domain is
    /// connected; else when the daemon does not answer.
    pub(super) async fn renew_session(&mut self, domain: &Domain, connects: bool) -> Result<()> {
        let is_writer = self.state.domains.get(domain) == Some(&Use::ReadWrite);
        let Some(session) = self.session().filter(|_| is_writer && domain.is_migration()) else { return Ok(()) };
        self.ready()?;
        let is_told = self.may_tell(domain);
        let is_alone = !self.state.domains.iter().any(|(other, usage)| other != domain && usage.is_active());
        let is_held = if is_alone { !self.clients_are_gone().await? } else { self.clients().await? > 0 };
        let client = self.client().await?;
        self.learn_top(&client).await?;
        let Some(top) = self.state.open.as_ref().and_then(|open| open.nodes.first().copied()) else { return Ok(()) };
        let holds = session.said == Said::This && graph::is_unwritten(&client, top, session.token).await?;
        match session.said {
            Said::This if holds && !is_held => return Ok(()),
            Said::Nothing if is_held || !is_told => return Ok(()),
            // What is said holds until one of two clients writes.
            _ if is_held && (holds || !connects) => return self.give_up_token(),
            _ => {}
        }
        if !self.take_export_away(&client, is_alone && connects).await? {
            self.give_up_token()?;
            let reason = "another domain is connected, and what the export says of the content is outdated";
            let volume = self.export_name();
            return if connects { Err(Error::VolumeInUse { volume, reason: reason.to_owned() }) } else { Ok(()) };
        }
        self.set_session(session.after(is_told));
        self.save()?;
        self.put_export_back(&client).await?;
        graph::forget_writes(&client, top, session.token).await
    }
}
