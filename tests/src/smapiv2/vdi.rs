//! VDI calls that have no datapath, with the follow-up calls that the daemon makes.

use super::sr::decoded;
use super::{Result, Sr, Vdi, VdiInfo, now};
use crate::host::{AttachedSr, Host};
use crate::wire::{ChangedBlocks, Request, Volume};

impl Host {
    /// `VDI.create`: the type is stored after it.
    ///
    /// # Errors
    /// As the plugin says; a follow-up that fails leaves the new volume behind.
    pub async fn vdi_create(&self, dbg: &str, sr: &Sr, info: &VdiInfo) -> Result<VdiInfo> {
        let attached = self.attached(sr)?;
        let request = Request::volume_create(
            dbg,
            &attached.sr,
            &info.name_label,
            &info.name_description,
            info.virtual_size,
            info.sharable,
        );
        self.described(dbg, &attached, &request, &info.ty).await
    }

    /// `VDI.clone`: the type is stored after it.
    ///
    /// # Errors
    /// As the plugin says; a follow-up that fails leaves the new volume behind.
    pub async fn vdi_clone(&self, dbg: &str, sr: &Sr, info: &VdiInfo) -> Result<VdiInfo> {
        let attached = self.attached(sr)?;
        let request = Request::volume("Volume.clone", dbg, &attached.sr, &info.vdi.0);
        self.described(dbg, &attached, &request, &info.ty).await
    }

    /// A new volume and its type.
    async fn described(&self, dbg: &str, attached: &AttachedSr, request: &Request, ty: &str) -> Result<VdiInfo> {
        let answer = self.call(attached, request).await?;
        let mut volume = decoded(request.method, Volume::decode(&answer, "volume"))?;
        if !ty.is_empty() {
            self.set(dbg, attached, &volume.key, "vdi-type", ty).await?;
            volume.keys.retain(|(k, _)| k != "vdi-type");
            volume.keys.push(("vdi-type".to_owned(), ty.to_owned()));
        }
        Ok(VdiInfo::from(&volume))
    }

    /// `VDI.snapshot`: five keys are stored after it.
    ///
    /// # Errors
    /// As the plugin says; a follow-up that fails leaves the new volume behind.
    pub async fn vdi_snapshot(&self, dbg: &str, sr: &Sr, info: &VdiInfo) -> Result<VdiInfo> {
        let attached = self.attached(sr)?;
        let request = Request::volume("Volume.snapshot", dbg, &attached.sr, &info.vdi.0);
        let answer = self.call(&attached, &request).await?;
        let volume = decoded("Volume.snapshot", Volume::decode(&answer, "volume"))?;
        let now = now();
        for (key, value) in [
            ("snapshot_time", now.as_str()),
            ("is_a_snapshot", "true"),
            ("snapshot_of", &info.vdi.0),
            ("content_id", &info.content_id),
            ("vdi-type", &info.ty),
        ] {
            self.set(dbg, &attached, &volume.key, key, value).await?;
        }
        Ok(VdiInfo {
            snapshot_time: now,
            is_a_snapshot: true,
            snapshot_of: info.vdi.clone(),
            ..VdiInfo::from(&volume)
        })
    }

    /// `VDI.destroy`: a stat comes first; a clone made for one boot makes the same destroy happen twice.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_destroy(&self, dbg: &str, sr: &Sr, vdi: &Vdi) -> Result<()> {
        let attached = self.attached(sr)?;
        let volume = self.volume_stat(dbg, &attached, vdi).await?;
        let request = Request::volume("Volume.destroy", dbg, &attached.sr, &vdi.0);
        if volume.key_value("clone-on-boot").is_some() {
            self.unit(&attached, &request).await?;
        }
        self.unit(&attached, &request).await
    }

    /// `VDI.stat`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_stat(&self, dbg: &str, sr: &Sr, vdi: &Vdi) -> Result<VdiInfo> {
        let attached = self.attached(sr)?;
        Ok(VdiInfo::from(&self.volume_stat(dbg, &attached, vdi).await?))
    }

    /// `VDI.resize`; answers the size that a stat finds afterwards.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_resize(&self, dbg: &str, sr: &Sr, vdi: &Vdi, size: i64) -> Result<i64> {
        let attached = self.attached(sr)?;
        self.unit(&attached, &Request::volume_resize(dbg, &attached.sr, &vdi.0, size)).await?;
        Ok(self.volume_stat(dbg, &attached, vdi).await?.virtual_size)
    }

    /// `VDI.revert`: `snapshot_of` of the snapshot is what is reverted.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_revert(&self, dbg: &str, sr: &Sr, snapshot: &VdiInfo) -> Result<()> {
        let attached = self.attached(sr)?;
        let request = Request::volume_revert(dbg, &attached.sr, &snapshot.vdi.0, &snapshot.snapshot_of.0);
        self.unit(&attached, &request).await
    }

    /// `VDI.compose`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_compose(&self, dbg: &str, sr: &Sr, parent: &Vdi, child: &Vdi) -> Result<()> {
        let attached = self.attached(sr)?;
        self.unit(&attached, &Request::volume_compose(dbg, &attached.sr, &child.0, &parent.0)).await
    }

    /// `VDI.set_name_label`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_set_name_label(&self, dbg: &str, sr: &Sr, vdi: &Vdi, name: &str) -> Result<()> {
        let attached = self.attached(sr)?;
        self.unit(&attached, &Request::volume_set_name(dbg, &attached.sr, &vdi.0, name)).await
    }

    /// `VDI.set_name_description`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_set_name_description(&self, dbg: &str, sr: &Sr, vdi: &Vdi, description: &str) -> Result<()> {
        let attached = self.attached(sr)?;
        self.unit(&attached, &Request::volume_set_description(dbg, &attached.sr, &vdi.0, description)).await
    }

    /// `VDI.set_content_id`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_set_content_id(&self, dbg: &str, sr: &Sr, vdi: &Vdi, content_id: &str) -> Result<()> {
        let attached = self.attached(sr)?;
        self.set(dbg, &attached, &vdi.0, "content_id", content_id).await
    }

    /// `VDI.set_snapshot_metadata`
    ///
    /// # Errors
    /// As the plugin says; earlier keys stay set.
    pub async fn vdi_set_snapshot_metadata(
        &self,
        dbg: &str,
        sr: &Sr,
        vdi: &Vdi,
        snapshot_of: &Vdi,
        snapshot_time: &str,
        is_a_snapshot: bool,
    ) -> Result<()> {
        let attached = self.attached(sr)?;
        let flag = if is_a_snapshot { "true" } else { "false" };
        for (key, value) in
            [("snapshot_of", snapshot_of.0.as_str()), ("snapshot_time", snapshot_time), ("is_a_snapshot", flag)]
        {
            self.set(dbg, &attached, &vdi.0, key, value).await?;
        }
        Ok(())
    }

    /// `VDI.add_to_sm_config`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_add_to_sm_config(&self, dbg: &str, sr: &Sr, vdi: &Vdi, key: &str, value: &str) -> Result<()> {
        let attached = self.attached(sr)?;
        self.set(dbg, &attached, &vdi.0, &format!("_sm_config_{key}"), value).await
    }

    /// `VDI.remove_from_sm_config`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_remove_from_sm_config(&self, dbg: &str, sr: &Sr, vdi: &Vdi, key: &str) -> Result<()> {
        let attached = self.attached(sr)?;
        let key = format!("_sm_config_{key}");
        self.unit(&attached, &Request::volume_unset(dbg, &attached.sr, &vdi.0, &key)).await
    }

    /// `VDI.enable_cbt` and `VDI.disable_cbt`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_set_cbt(&self, dbg: &str, sr: &Sr, vdi: &Vdi, enabled: bool) -> Result<()> {
        let attached = self.attached(sr)?;
        let method = if enabled { "Volume.enable_cbt" } else { "Volume.disable_cbt" };
        self.unit(&attached, &Request::volume(method, dbg, &attached.sr, &vdi.0)).await
    }

    /// `VDI.data_destroy`: the volume's type changes with it.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_data_destroy(&self, dbg: &str, sr: &Sr, vdi: &Vdi) -> Result<()> {
        let attached = self.attached(sr)?;
        self.unit(&attached, &Request::volume("Volume.data_destroy", dbg, &attached.sr, &vdi.0)).await?;
        self.set(dbg, &attached, &vdi.0, "vdi-type", "cbt_metadata").await
    }

    /// `VDI.list_changed_blocks`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vdi_list_changed_blocks(&self, dbg: &str, sr: &Sr, from: &Vdi, to: &Vdi) -> Result<ChangedBlocks> {
        let attached = self.attached(sr)?;
        let request = Request::volume_list_changed_blocks(dbg, &attached.sr, &from.0, &to.0);
        let answer = self.call(&attached, &request).await?;
        decoded(request.method, ChangedBlocks::decode(&answer))
    }

    pub(super) async fn set(&self, dbg: &str, attached: &AttachedSr, key: &str, k: &str, v: &str) -> Result<()> {
        self.unit(attached, &Request::volume_set(dbg, &attached.sr, key, k, v)).await
    }

    pub(super) async fn volume_stat(&self, dbg: &str, attached: &AttachedSr, vdi: &Vdi) -> Result<Volume> {
        let request = Request::volume("Volume.stat", dbg, &attached.sr, &vdi.0);
        let answer = self.call(attached, &request).await?;
        decoded("Volume.stat", Volume::decode(&answer, "volume"))
    }

    /// The volume that a datapath call is about: the clone made for this boot, if there is one.
    pub(super) async fn volume_of_datapath(&self, dbg: &str, attached: &AttachedSr, vdi: &Vdi) -> Result<Volume> {
        let volume = self.volume_stat(dbg, attached, vdi).await?;
        match volume.key_value("clone-on-boot") {
            None => Ok(volume),
            Some(temporary) => self.volume_stat(dbg, attached, &Vdi(temporary.to_owned())).await,
        }
    }
}
