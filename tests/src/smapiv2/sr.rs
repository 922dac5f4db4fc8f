//! SR calls.

use std::time::Duration;

use super::{Error, Result, Sr, VdiInfo};
use crate::host::{AttachedSr, Host, VolumePlugin, lock};
use crate::wire::{Health, Json, ProbeResult, Request, SrStat, Volume};

/// The device-config of an SR.
pub type DeviceConfig = Vec<(String, String)>;

impl Host {
    /// `SR.create`; answers the device-config to attach the SR with.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn sr_create(
        &self,
        dbg: &str,
        kind: &str,
        sr: &Sr,
        config: &[(String, String)],
        name: &str,
        description: &str,
    ) -> Result<DeviceConfig> {
        let dir = &self.volume_plugin(kind)?.dir;
        let request = Request::sr_create(dbg, &sr.0, config, name, description);
        let answer = self.runner().call(dir, &request).await?;
        decoded("SR.create", answer.string_map("configuration"))
    }

    /// `SR.probe`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn sr_probe(&self, dbg: &str, kind: &str, config: &[(String, String)]) -> Result<Vec<ProbeResult>> {
        let dir = &self.volume_plugin(kind)?.dir;
        let answer = self.runner().call(dir, &Request::sr_probe(dbg, config)).await?;
        decoded("SR.probe", ProbeResult::decode_list(&answer))
    }

    /// `SR.attach` and the `SR.stat` that looks for datasources.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn sr_attach(&self, dbg: &str, kind: &str, sr: &Sr, config: &[(String, String)]) -> Result<()> {
        let dir = self.volume_plugin(kind)?.dir.clone();
        let answer = self.runner().call(&dir, &Request::sr_attach(dbg, config)).await?;
        let attached = decoded("SR.attach", answer.string("sr"))?;
        let answer = self.runner().call(&dir, &Request::sr("SR.stat", dbg, &attached)).await?;
        decoded("SR.stat", SrStat::decode(&answer, "stat"))?;
        lock(&self.srs).insert(sr.clone(), AttachedSr { sr: attached, dir, kind: kind.to_owned() });
        Ok(())
    }

    /// `SR.detach`; of an SR that is not attached it is nothing.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn sr_detach(&self, dbg: &str, sr: &Sr) -> Result<()> {
        let Ok(attached) = self.attached(sr) else { return Ok(()) };
        self.unit(&attached, &Request::sr("SR.detach", dbg, &attached.sr)).await?;
        lock(&self.srs).remove(sr);
        Ok(())
    }

    /// `SR.destroy`, which xapi does to an SR that it has attached for it; what is left of it is then forgotten.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn sr_destroy(&self, dbg: &str, sr: &Sr) -> Result<()> {
        let attached = self.attached(sr)?;
        self.unit(&attached, &Request::sr("SR.destroy", dbg, &attached.sr)).await?;
        lock(&self.srs).remove(sr);
        Ok(())
    }

    /// `SR.stat`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn sr_stat(&self, dbg: &str, sr: &Sr) -> Result<SrStat> {
        let attached = self.attached(sr)?;
        let answer = self.call(&attached, &Request::sr("SR.stat", dbg, &attached.sr)).await?;
        decoded("SR.stat", SrStat::decode(&answer, "stat"))
    }

    /// `SR.set_name_label`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn sr_set_name_label(&self, dbg: &str, sr: &Sr, name: &str) -> Result<()> {
        let attached = self.attached(sr)?;
        self.unit(&attached, &Request::sr_set_name(dbg, &attached.sr, name)).await
    }

    /// `SR.set_name_description`
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn sr_set_name_description(&self, dbg: &str, sr: &Sr, description: &str) -> Result<()> {
        let attached = self.attached(sr)?;
        self.unit(&attached, &Request::sr_set_description(dbg, &attached.sr, description)).await
    }

    /// `SR.ls` alone, as the plugin answers it.
    ///
    /// # Errors
    /// As the plugin says; one bad volume spoils the whole answer.
    pub async fn sr_ls(&self, dbg: &str, sr: &Sr) -> Result<Vec<Volume>> {
        let attached = self.attached(sr)?;
        let answer = self.call(&attached, &Request::sr("SR.ls", dbg, &attached.sr)).await?;
        decoded("SR.ls", Volume::decode_list(&answer))
    }

    /// `SR.scan2`: stat, and ls if the SR is healthy; an unreachable one is asked three times more.
    ///
    /// # Errors
    /// As the plugin says, or [`Error::SrUnhealthy`].
    pub async fn sr_scan(&self, dbg: &str, sr: &Sr) -> Result<Vec<VdiInfo>> {
        let mut retries = 3;
        loop {
            match self.sr_stat(dbg, sr).await?.health {
                Health::Healthy(_) => break,
                Health::Unreachable(_) if retries > 0 => {
                    retries -= 1;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                health => return Err(Error::SrUnhealthy(sr.0.clone(), health)),
            }
        }
        let volumes = self.sr_ls(dbg, sr).await?;
        let transient: Vec<String> =
            volumes.iter().filter_map(|v| v.key_value("clone-on-boot").map(str::to_owned)).collect();
        Ok(volumes.iter().filter(|v| !transient.contains(&v.key)).map(VdiInfo::from).collect())
    }

    /// The volume plugin of an SR type.
    ///
    /// # Errors
    /// [`Error::NoPlugin`]
    pub fn volume_plugin(&self, kind: &str) -> Result<&VolumePlugin> {
        self.volume_plugins.get(kind).ok_or_else(|| Error::NoPlugin(format!("SR type {kind}")))
    }

    /// Whether the plugin of an attached SR has a feature.
    #[must_use]
    pub fn sr_has(&self, sr: &Sr, feature: &str) -> bool {
        self.attached(sr).and_then(|a| Ok(self.volume_plugin(&a.kind)?.has(feature))).unwrap_or(false)
    }

    /// The SRs attached to this host.
    #[must_use]
    pub fn sr_list(&self) -> Vec<Sr> {
        lock(&self.srs).keys().cloned().collect()
    }

    pub(super) fn attached(&self, sr: &Sr) -> Result<AttachedSr> {
        lock(&self.srs).get(sr).cloned().ok_or_else(|| Error::SrNotAttached(sr.0.clone()))
    }

    pub(super) async fn call(&self, attached: &AttachedSr, request: &Request) -> Result<Json> {
        Ok(self.runner().call(&attached.dir, request).await?)
    }

    pub(super) async fn unit(&self, attached: &AttachedSr, request: &Request) -> Result<()> {
        let answer = self.call(attached, request).await?;
        decoded(request.method, answer.unit("answer"))
    }
}

/// Names the method whose answer is malformed.
pub(super) fn decoded<T>(method: &'static str, result: std::result::Result<T, crate::wire::Malformed>) -> Result<T> {
    result.map_err(|source| Error::Malformed { method, source })
}
