//! Attach, activate, deactivate, detach, and the records by which xapi's mux remembers them.

use std::path::PathBuf;

use super::sr::decoded;
use super::{Dp, Error, Result, Sr, Vdi, Vm};
use crate::host::{DatapathPlugin, Host, lock};
use crate::wire::{Attached, Json, Request, Volume};

/// What the mux remembers of a datapath.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DpInfo {
    /// The SR.
    pub sr: Sr,
    /// The volume.
    pub vdi: Vdi,
    /// Whom it is for.
    pub vm: Vm,
    /// Whether it was attached for writing; the plugin is not told.
    pub read_write: bool,
}

/// The domain string that a datapath call carries: only dom0's is made unique.
fn domain_of(dp: &Dp, vm: &Vm) -> String {
    if vm.0 == "0" { format!("u0-{dp}").replace(['/', '-'], "_") } else { vm.0.clone() }
}

impl Host {
    /// `VDI.attach3`, with the mux' record of it, which is written first.
    ///
    /// # Errors
    /// As the plugin says; the record stays.
    pub async fn vdi_attach3(
        &self,
        dbg: &str,
        dp: &Dp,
        sr: &Sr,
        vdi: &Vdi,
        vm: &Vm,
        read_write: bool,
    ) -> Result<Attached> {
        let info = DpInfo { sr: sr.clone(), vdi: vdi.clone(), vm: vm.clone(), read_write };
        lock(&self.dps).insert(dp.clone(), info);
        self.attach(dbg, sr, vdi, &domain_of(dp, vm)).await
    }

    /// `VDI.attach2`: for dom0, and something that a VBD can be made of has to be among the answers.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_attach2(&self, dbg: &str, dp: &Dp, sr: &Sr, vdi: &Vdi, read_write: bool) -> Result<Attached> {
        let attached = self.vdi_attach3(dbg, dp, sr, vdi, &Vm::from("0"), read_write).await?;
        if !attached.has_xen_disk() && attached.path().is_none() {
            return Err(Error::Internal("no File, BlockDevice or XenDisk in the answer of attach".to_owned()));
        }
        Ok(attached)
    }

    pub(super) async fn attach(&self, dbg: &str, sr: &Sr, vdi: &Vdi, domain: &str) -> Result<Attached> {
        let answer = self.datapath("Datapath.attach", dbg, sr, vdi, domain).await?;
        decoded("Datapath.attach", Attached::decode(&answer))
    }

    /// `VDI.activate3` of the mux: what was attached read-only is activated so, if the plugin says that it can.
    ///
    /// # Errors
    /// As the plugin says, or if the datapath was never attached.
    pub async fn vdi_activate3(&self, dbg: &str, dp: &Dp, sr: &Sr, vdi: &Vdi, vm: &Vm) -> Result<()> {
        let known = lock(&self.dps).get(dp).cloned();
        let info = known.ok_or_else(|| Error::Internal("DP not found".to_owned()))?;
        if !info.read_write && self.sr_has(sr, "VDI_ACTIVATE_READONLY") {
            return self.vdi_activate_readonly(dbg, dp, sr, vdi, vm).await;
        }
        let answer = self.datapath("Datapath.activate", dbg, sr, vdi, &domain_of(dp, vm)).await?;
        decoded("Datapath.activate", answer.unit("answer"))
    }

    /// `VDI.activate_readonly`, for which no feature is asked.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_activate_readonly(&self, dbg: &str, dp: &Dp, sr: &Sr, vdi: &Vdi, vm: &Vm) -> Result<()> {
        let answer = self.datapath("Datapath.activate_readonly", dbg, sr, vdi, &domain_of(dp, vm)).await?;
        decoded("Datapath.activate_readonly", answer.unit("answer"))
    }

    /// `VDI.deactivate` of the mux, without the hook that ends a mirror; nothing if the datapath is unknown.
    ///
    /// Volume and domain are those that the record names. Answers whether the script was called.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_deactivate(&self, dbg: &str, dp: &Dp) -> Result<bool> {
        let known = lock(&self.dps).get(dp).cloned();
        let Some(info) = known else { return Ok(false) };
        self.deactivate(dbg, &info.sr, &info.vdi, &domain_of(dp, &info.vm)).await?;
        Ok(true)
    }

    /// `VDI.detach` of the mux, which then forgets the datapath.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_detach(&self, dbg: &str, dp: &Dp, sr: &Sr, vdi: &Vdi, vm: &Vm) -> Result<()> {
        self.detach(dbg, sr, vdi, &domain_of(dp, vm)).await?;
        lock(&self.dps).remove(dp);
        Ok(())
    }

    /// `DP.destroy2`: one stat, deactivate, detach.
    ///
    /// # Errors
    /// As the plugin says; the record stays then.
    pub async fn dp_destroy2(&self, dbg: &str, dp: &Dp, sr: &Sr, vdi: &Vdi, vm: &Vm) -> Result<()> {
        let (volume, plugin) = self.datapath_of(dbg, sr, vdi).await?;
        let domain = domain_of(dp, vm);
        for method in ["Datapath.deactivate", "Datapath.detach"] {
            let request = Request::datapath(method, dbg, &volume, &domain);
            let answer = self.runner().call(&plugin, &request).await?;
            decoded(method, answer.unit("answer"))?;
        }
        lock(&self.dps).remove(dp);
        Ok(())
    }

    /// `DP.destroy`: nothing if the datapath is unknown on this host.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn dp_destroy(&self, dbg: &str, dp: &Dp) -> Result<()> {
        let known = lock(&self.dps).get(dp).cloned();
        match known {
            Some(DpInfo { sr, vdi, vm, .. }) => self.dp_destroy2(dbg, dp, &sr, &vdi, &vm).await,
            None => Ok(()),
        }
    }

    /// The datapaths that the mux of this host remembers.
    #[must_use]
    pub fn dp_list(&self) -> Vec<(Dp, DpInfo)> {
        lock(&self.dps).iter().map(|(dp, info)| (dp.clone(), info.clone())).collect()
    }

    /// `VDI.epoch_begin`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_epoch_begin(&self, dbg: &str, sr: &Sr, vdi: &Vdi, persistent: bool) -> Result<()> {
        let attached = self.attached(sr)?;
        let volume = self.volume_stat(dbg, &attached, vdi).await?;
        let (plugin, uri) = self.choose_datapath(&volume, persistent)?;
        if plugin.has("NONPERSISTENT") {
            let answer = self.runner().call(&plugin.dir, &Request::datapath_open(dbg, &uri, persistent)).await?;
            return decoded("Datapath.open", answer.unit("answer"));
        }
        if persistent {
            return Ok(());
        }
        if let Some(temporary) = volume.key_value("clone-on-boot") {
            self.unit(&attached, &Request::volume("Volume.destroy", dbg, &attached.sr, temporary)).await?;
        }
        let answer = self.call(&attached, &Request::volume("Volume.clone", dbg, &attached.sr, &vdi.0)).await?;
        let clone = decoded("Volume.clone", Volume::decode(&answer, "volume"))?;
        self.set(dbg, &attached, &vdi.0, "clone-on-boot", &clone.key).await
    }

    /// `VDI.epoch_end`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_epoch_end(&self, dbg: &str, sr: &Sr, vdi: &Vdi) -> Result<()> {
        let attached = self.attached(sr)?;
        let volume = self.volume_stat(dbg, &attached, vdi).await?;
        let (plugin, uri) = self.choose_datapath(&volume, true)?;
        if plugin.has("NONPERSISTENT") {
            let answer = self.runner().call(&plugin.dir, &Request::datapath_close(dbg, &uri)).await?;
            return decoded("Datapath.close", answer.unit("answer"));
        }
        let Some(temporary) = volume.key_value("clone-on-boot") else { return Ok(()) };
        self.unit(&attached, &Request::volume("Volume.destroy", dbg, &attached.sr, temporary)).await?;
        self.unit(&attached, &Request::volume_unset(dbg, &attached.sr, &vdi.0, "clone-on-boot")).await
    }

    async fn deactivate(&self, dbg: &str, sr: &Sr, vdi: &Vdi, domain: &str) -> Result<()> {
        let answer = self.datapath("Datapath.deactivate", dbg, sr, vdi, domain).await?;
        decoded("Datapath.deactivate", answer.unit("answer"))
    }

    async fn detach(&self, dbg: &str, sr: &Sr, vdi: &Vdi, domain: &str) -> Result<()> {
        let answer = self.datapath("Datapath.detach", dbg, sr, vdi, domain).await?;
        decoded("Datapath.detach", answer.unit("answer"))
    }

    /// One datapath call after the stat that finds its URI.
    async fn datapath(&self, method: &'static str, dbg: &str, sr: &Sr, vdi: &Vdi, domain: &str) -> Result<Json> {
        let (uri, dir) = self.datapath_of(dbg, sr, vdi).await?;
        Ok(self.runner().call(&dir, &Request::datapath(method, dbg, &uri, domain)).await?)
    }

    /// The URI of a volume and the directory of its datapath plugin.
    pub(super) async fn datapath_of(&self, dbg: &str, sr: &Sr, vdi: &Vdi) -> Result<(String, PathBuf)> {
        let attached = self.attached(sr)?;
        let volume = self.volume_of_datapath(dbg, &attached, vdi).await?;
        let (plugin, uri) = self.choose_datapath(&volume, true)?;
        Ok((uri, plugin.dir.clone()))
    }

    /// The first URI whose scheme has a plugin; without persistence, one that can do without is preferred.
    pub(super) fn choose_datapath(&self, volume: &Volume, persistent: bool) -> Result<(&DatapathPlugin, String)> {
        let possible: Vec<(&DatapathPlugin, &String)> = volume
            .uri
            .iter()
            .filter_map(|uri| Some((self.datapath_plugins.get(uri.split_once(':')?.0)?, uri)))
            .collect();
        let preferred = possible.iter().find(|(plugin, _)| !persistent && plugin.has("NONPERSISTENT"));
        match preferred.or(possible.first()) {
            Some((plugin, uri)) => Ok((plugin, (*uri).clone())),
            None => Err(Error::NoPlugin(format!("MISSING_URI: no datapath for {:?}", volume.uri))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dom0_gets_a_domain_of_its_own() {
        let of = |dp: &str, vm: &str| domain_of(&Dp::from(dp), &Vm::from(vm));
        assert_eq!(of("mirror_vbd/5/xvda", "0"), "u0_mirror_vbd_5_xvda");
        assert_eq!(of("0a-1b", "0"), "u0_0a_1b");
        assert_eq!(of("x/y", "7"), "7");
        assert_eq!(of("x/y", "-1"), "-1");
        assert_eq!(of("x/y", "MIR01-2ab"), "MIR01-2ab");
    }
}
