//! DATA calls: mirrors and the NBD server that receives them.

use super::sr::decoded;
use super::{Error, Result, Sr, Vdi, Vm};
use crate::host::{Host, lock};
use crate::nbd::Uri;
use crate::wire::{Attached, MirrorStatus, Operation, Request};

impl Host {
    /// `DATA.mirror`: the domain goes as it is, and the stat is remembered for the polls to come.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn data_mirror(&self, dbg: &str, sr: &Sr, vdi: &Vdi, vm: &Vm, remote: &str) -> Result<Operation> {
        let attached = self.attached(sr)?;
        let volume = self.volume_of_datapath(dbg, &attached, vdi).await?;
        lock(&self.stat_cache).insert((sr.clone(), vdi.clone()), volume.clone());
        let (plugin, uri) = self.choose_datapath(&volume, true)?;
        let answer = self.runner().call(&plugin.dir, &Request::data_mirror(dbg, &uri, &vm.0, remote)).await?;
        decoded("Data.mirror", Operation::decode(&answer))
    }

    /// `DATA.stat`: the volume is looked up again only once the mirror has completed or failed.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn data_stat(&self, dbg: &str, sr: &Sr, vdi: &Vdi, operation: &Operation) -> Result<MirrorStatus> {
        let attached = self.attached(sr)?;
        let key = (sr.clone(), vdi.clone());
        let cached = lock(&self.stat_cache).get(&key).cloned();
        let volume = match cached {
            Some(volume) => volume,
            None => self.volume_of_datapath(dbg, &attached, vdi).await?,
        };
        let (plugin, _) = self.choose_datapath(&volume, true)?;
        let answer = self.runner().call(&plugin.dir, &Request::data("Data.stat", dbg, operation)).await?;
        let status = decoded("Data.stat", MirrorStatus::decode(&answer))?;
        if status.complete || status.failed {
            lock(&self.stat_cache).remove(&key);
        }
        Ok(status)
    }

    /// `DATA.get_nbd_server`: attaches once more, with the raw domain, and takes the last NBD server.
    ///
    /// # Errors
    /// As the plugin says, or if it names no NBD server that xapi can parse.
    pub async fn data_get_nbd_server(&self, dbg: &str, sr: &Sr, vdi: &Vdi, vm: &Vm) -> Result<Uri> {
        let attached = self.attach(dbg, sr, vdi, &vm.0).await?;
        nbd_server(&attached).ok_or_else(|| Error::Internal("no nbd server found".to_owned()))
    }

    /// `DATA.import_activate`: only if the datapath's own features say so.
    ///
    /// # Errors
    /// As the plugin says, or [`Error::Unimplemented`].
    pub async fn data_import_activate(&self, dbg: &str, sr: &Sr, vdi: &Vdi, vm: &Vm) -> Result<String> {
        let attached = self.attached(sr)?;
        let volume = self.volume_of_datapath(dbg, &attached, vdi).await?;
        let (plugin, uri) = self.choose_datapath(&volume, true)?;
        if !plugin.has("VDI_MIRROR_IN") {
            return Err(Error::Unimplemented("VDI_MIRROR_IN".to_owned()));
        }
        let request = Request::datapath("Datapath.import_activate", dbg, &uri, &vm.0);
        let answer = self.runner().call(&plugin.dir, &request).await?;
        decoded("Datapath.import_activate", answer.string("path"))
    }
}

/// The NBD server of an attach answer, if xapi can parse it.
#[must_use]
pub fn nbd_server(attached: &Attached) -> Option<Uri> {
    attached.nbd().and_then(|uri| Uri::parse(uri).ok())
}
