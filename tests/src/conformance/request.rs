//! A request for each method that must be answered well, with everything made that it is about.

use anyhow::{Result, bail};
use uuid::Uuid;

use super::bench::{Bench, DBG, MIB, uri_of};
use crate::nbd::Uri;
use crate::wire::{Json, Operation, Request};

/// Every method that xapi-storage-script calls, spelled as it does.
pub const METHODS: &[&str] = &[
    "Plugin.query",
    "Plugin.diagnostics",
    "Plugin.ls",
    "SR.probe",
    "SR.create",
    "SR.attach",
    "SR.stat",
    "SR.ls",
    "SR.set_name",
    "SR.set_description",
    "SR.detach",
    "SR.destroy",
    "Volume.create",
    "Volume.stat",
    "Volume.set",
    "Volume.unset",
    "Volume.set_name",
    "Volume.set_description",
    "Volume.snapshot",
    "Volume.clone",
    "Volume.resize",
    "Volume.revert",
    "Volume.destroy",
    "Volume.enable_cbt",
    "Volume.disable_cbt",
    "Volume.data_destroy",
    "Volume.list_changed_blocks",
    "Datapath.open",
    "Datapath.attach",
    "Datapath.activate",
    "Datapath.activate_readonly",
    "Datapath.import_activate",
    "Datapath.deactivate",
    "Datapath.detach",
    "Datapath.close",
    "Data.mirror",
    "Data.stat",
    "Data.cancel",
    "Data.destroy",
    "Data.ls",
];

/// How Data.mirror is told of an NBD server.
pub fn remote_of(nbd: &Uri) -> String {
    format!("nbd+unix:///{}?socket={}", nbd.export(), nbd.socket().display())
}

/// Makes what a method is about, and a request for it.
pub async fn valid(b: &Bench, method: &'static str) -> Result<Request> {
    let sr = &b.sr.sr;
    let request = match method {
        "Plugin.query" => Request::query(DBG),
        "Plugin.diagnostics" => Request::diagnostics(DBG),
        "Plugin.ls" | "Data.ls" => Request::new(method, DBG, vec![]),
        "SR.probe" => Request::sr_probe(DBG, &b.sr.config),
        "SR.create" => {
            let path = b.directory().join(Uuid::new_v4().to_string());
            std::fs::create_dir(&path)?;
            let uuid = Uuid::new_v4().to_string();
            Request::sr_create(DBG, &uuid, &b.subject.config_in(&path), "another SR", "for a check")
        }
        "SR.attach" => Request::sr_attach(DBG, &b.sr.config),
        "SR.stat" | "SR.ls" => Request::sr(method, DBG, sr),
        "SR.detach" | "SR.destroy" => {
            let other = b.new_sr(&Uuid::new_v4().to_string()).await?;
            Request::sr(method, DBG, &other.sr)
        }
        "SR.set_name" => Request::sr_set_name(DBG, sr, "another name"),
        "SR.set_description" => Request::sr_set_description(DBG, sr, "another description"),
        "Volume.create" => Request::volume_create(DBG, sr, "a disk", "for a check", 4 * MIB, false),
        "Data.stat" | "Data.cancel" | "Data.destroy" => {
            Request::data(method, DBG, &Operation::Mirror(Uuid::new_v4().to_string()))
        }
        _ => about_a_volume(b, method).await?,
    };
    Ok(request)
}

async fn about_a_volume(b: &Bench, method: &'static str) -> Result<Request> {
    let sr = &b.sr.sr;
    let volume = b.create(4 * MIB).await?;
    let (key, uri) = (&volume.key, uri_of(&volume)?);
    Ok(match method {
        "Volume.stat" | "Volume.snapshot" | "Volume.clone" | "Volume.destroy" | "Volume.enable_cbt"
        | "Volume.disable_cbt" => Request::volume(method, DBG, sr, key),
        "Volume.data_destroy" => {
            b.call(&Request::volume("Volume.enable_cbt", DBG, sr, key)).await?;
            Request::volume(method, DBG, sr, &b.snapshot(key).await?.key)
        }
        "Volume.set" => Request::volume_set(DBG, sr, key, "vdi-type", "user"),
        "Volume.unset" => {
            b.set(key, "content_id", "x").await?;
            Request::volume_unset(DBG, sr, key, "content_id")
        }
        "Volume.set_name" => Request::volume_set_name(DBG, sr, key, "another name"),
        "Volume.set_description" => Request::volume_set_description(DBG, sr, key, "another description"),
        "Volume.resize" => Request::volume_resize(DBG, sr, key, 8 * MIB),
        "Volume.revert" => Request::volume_revert(DBG, sr, &b.snapshot(key).await?.key, key),
        "Volume.list_changed_blocks" => {
            b.call(&Request::volume("Volume.enable_cbt", DBG, sr, key)).await?;
            let (before, after) = (b.snapshot(key).await?.key, key);
            Request::volume_list_changed_blocks(DBG, sr, &before, after)
        }
        "Datapath.open" => Request::datapath_open(DBG, uri, true),
        "Datapath.close" => Request::datapath_close(DBG, uri),
        "Datapath.attach" | "Datapath.detach" => Request::datapath(method, DBG, uri, "7"),
        "Datapath.activate" | "Datapath.activate_readonly" => {
            b.attach(&volume, "7").await?;
            Request::datapath(method, DBG, uri, "7")
        }
        "Datapath.import_activate" => {
            b.start(&volume, "MIR0a1b2c").await?;
            Request::datapath(method, DBG, uri, "MIR0a1b2c")
        }
        "Datapath.deactivate" => {
            b.start(&volume, "7").await?;
            Request::datapath(method, DBG, uri, "7")
        }
        "Data.mirror" => {
            let target = b.create(4 * MIB).await?;
            let remote = remote_of(&b.plug(&target, "MIR0a1b2c").await?);
            b.attach(&volume, "u0_mirror").await?;
            Request::data_mirror(DBG, uri, "-1", &remote)
        }
        _ => bail!("there is no request for {method}"),
    })
}

/// The fields of a request, in the order they are sent.
pub fn fields(request: &Request) -> Result<Vec<(String, Json)>> {
    match Json::parse(request.encode().as_bytes())? {
        Json::Object(fields) => Ok(fields),
        other => bail!("a request is no object: {other:?}"),
    }
}
