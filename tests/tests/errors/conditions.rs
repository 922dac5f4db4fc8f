//! How each condition of the table is made.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fake_xapi::conformance::{Bench, DBG, MIB, refused, uri_of};
use fake_xapi::host::pass;
use fake_xapi::nbd::Tapdisk;
use fake_xapi::wire::{Failure, Request, Volume};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use uuid::Uuid;

use crate::mount::Mounted;

type Made = Pin<Box<dyn Future<Output = Result<Failure>> + Send>>;

/// A condition, by what its row says, and how it is made.
pub struct Condition {
    /// The third cell of the row.
    pub when: &'static str,
    /// Whether a file system is mounted for it.
    pub mounts: bool,
    /// Makes it and gives the refusal.
    pub make: fn(Arc<Bench>) -> Made,
}

macro_rules! conditions {
    ($($when:literal $($mounts:ident)? => $make:ident,)*) => {
        vec![$(Condition {
            when: $when,
            mounts: conditions!(@ $($mounts)?),
            make: |bench| Box::pin($make(bench)),
        },)*]
    };
    (@) => { false };
    (@ mounts) => { true };
}

/// All conditions.
pub fn all() -> Vec<Condition> {
    conditions! {
        "the volume is active on another host" => elsewhere,
        "no volume has the key" => unknown_key,
        "the SR is not attached on this host" => not_attached,
        "a volume is reverted to a snapshot of another disk" => foreign_snapshot,
        "an SR with a volume in use is detached" => detach_in_use,
        "the volume is in use in a way that forbids the call" => destroy_in_use,
        "an SR with volumes is destroyed" => destroy_full,
        "another SR is in the directory" => create_over,
        "the directory holds volumes of an SR whose record is gone" => create_over_volumes,
        "the file system or quota is full" mounts => full,
        "a record is damaged" => damaged,
        "a record was written by a newer version" => newer,
        "an image is not what the record says" => wrong_image,
        "a SMAPIv1 migration writes to a volume that is not active here" => not_active,
        "a guest is to use what a SMAPIv1 migration wrote and did not compose" => not_composed,
        "the volume's data was destroyed" => without_data,
        "the SR's directory or its `sr.json` is not there" => gone,
        "a size that no volume can have" => wrong_size,
        "a volume is made smaller" => smaller,
        "the device-config has no `uri`" => no_uri,
        "the device-config's `uri` is no directory's" => wrong_uri,
        "the device-config's `sr_uuid` is not that of the SR there" => wrong_uuid,
        "snapshot, clone, revert or compose would make a chain of more than 128 nodes" => long_chain,
        "the request cannot be understood" => bad_request,
        "a system call failed" => system_call,
        "something took longer than its setting" => too_long,
        "changed blocks of the volume are not tracked" => untracked,
        "changed blocks are asked for between volumes of two disks" => unrelated,
        "the mirror of the volume broke after it was complete" => broken_mirror,
        "a SMAPIv1 migration lost writes on the way to the volume" => broken_import,
        "qemu-img or the storage daemon refused" => qemu,
        "the file system is read-only" mounts => read_only,
    }
}

async fn call(b: &Bench, request: &Request) -> Result<Failure> {
    refused(b.call(request).await)
}

fn tree(b: &Bench, volume: &Volume) -> PathBuf {
    b.sr.path.join("volumes").join(&volume.key)
}

/// Changes a tree's record as no call would.
fn edit_tree(b: &Bench, volume: &Volume, change: impl FnOnce(&mut Value)) -> Result<()> {
    let path = tree(b, volume).join("tree.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    change(&mut record);
    Ok(std::fs::write(path, serde_json::to_vec(&record)?)?)
}

/// The only node file of a volume.
fn image(b: &Bench, volume: &Volume) -> Result<PathBuf> {
    let files = std::fs::read_dir(tree(b, volume))?.flatten().map(|entry| entry.path());
    files.into_iter().find(|path| path.extension().is_some_and(|e| e == "qcow2")).context("there is no node file")
}

fn write_at(path: &PathBuf, offset: u64, bytes: &[u8]) -> Result<()> {
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    Ok(std::os::unix::fs::FileExt::write_all_at(&file, bytes, offset)?)
}

async fn elsewhere(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(MIB).await?;
    let claim = json!({"host": Uuid::new_v4(), "boot_id": Uuid::new_v4(), "mode": "rw"});
    edit_tree(&b, &volume, |record| record["volumes"][&volume.key]["active"] = json!([claim]))?;
    refused(b.snapshot(&volume.key).await)
}

async fn unknown_key(b: Arc<Bench>) -> Result<Failure> {
    refused(b.stat(&Uuid::new_v4().to_string()).await)
}

async fn not_attached(b: Arc<Bench>) -> Result<Failure> {
    call(&b, &Request::sr("SR.ls", DBG, &Uuid::new_v4().to_string())).await
}

async fn foreign_snapshot(b: Arc<Bench>) -> Result<Failure> {
    let (volume, other) = (b.create(MIB).await?, b.create(MIB).await?);
    let snapshot = b.snapshot(&other.key).await?;
    call(&b, &Request::volume_revert(DBG, &b.sr.sr, &snapshot.key, &volume.key)).await
}

async fn detach_in_use(b: Arc<Bench>) -> Result<Failure> {
    b.plug(&b.create(MIB).await?, "7").await?;
    call(&b, &Request::sr("SR.detach", DBG, &b.sr.sr)).await
}

async fn destroy_in_use(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(MIB).await?;
    b.plug(&volume, "7").await?;
    refused(b.destroy(&volume.key).await)
}

async fn destroy_full(b: Arc<Bench>) -> Result<Failure> {
    b.create(MIB).await?;
    call(&b, &Request::sr("SR.destroy", DBG, &b.sr.sr)).await
}

fn create_sr(config: &[(String, String)]) -> Request {
    Request::sr_create(DBG, &Uuid::new_v4().to_string(), config, "an SR", "")
}

async fn create_over(b: Arc<Bench>) -> Result<Failure> {
    call(&b, &create_sr(&b.sr.config)).await
}

async fn create_over_volumes(b: Arc<Bench>) -> Result<Failure> {
    b.create(MIB).await?;
    std::fs::remove_file(b.sr.path.join("sr.json"))?;
    call(&b, &create_sr(&b.sr.config)).await
}

async fn full(b: Arc<Bench>) -> Result<Failure> {
    let config = b.new_place("small")?;
    let path = b.directory().join("small");
    let _mounted = Mounted::tmpfs(&path, "1m")?;
    let created = b.call(&create_sr(&config)).await?.string_map("SR.create")?;
    let sr = b.attach_sr(&created).await?;
    let mut filler = std::fs::File::create(path.join("filler"))?;
    while std::io::Write::write(&mut filler, &[1; 4096]).is_ok() {}
    call(&b, &Request::volume_create(DBG, &sr, "a disk", "", MIB, false)).await
}

async fn damaged(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(MIB).await?;
    std::fs::write(tree(&b, &volume).join("tree.json"), "{")?;
    refused(b.stat(&volume.key).await)
}

async fn newer(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(MIB).await?;
    edit_tree(&b, &volume, |record| record["format"] = json!(1000))?;
    refused(b.stat(&volume.key).await)
}

async fn wrong_image(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(MIB).await?;
    // The virtual size in the header.
    write_at(&image(&b, &volume)?, 24, &(7u64 << 20).to_be_bytes())?;
    b.attach(&volume, "7").await?;
    refused(b.activate(&volume, "7").await)
}

async fn not_active(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(MIB).await?;
    b.attach(&volume, "MIR0a1b2c").await?;
    call(&b, &Request::datapath("Datapath.import_activate", DBG, uri_of(&volume)?, "MIR0a1b2c")).await
}

/// A leaf over its dummy to which a migration from SMAPIv1 writes, and the import's socket.
async fn importing(b: &Bench) -> Result<(Volume, String)> {
    let volume = b.create(MIB).await?;
    b.snapshot(&volume.key).await?;
    b.plug(&volume, "MIR0a1b2c").await?;
    let request = Request::datapath("Datapath.import_activate", DBG, uri_of(&volume)?, "MIR0a1b2c");
    let socket = b.call(&request).await?.string("Datapath.import_activate")?;
    Ok((volume, socket))
}

async fn not_composed(b: Arc<Bench>) -> Result<Failure> {
    let (volume, _) = importing(&b).await?;
    b.unplug(&volume, "MIR0a1b2c").await?;
    b.attach(&volume, "7").await?;
    refused(b.activate(&volume, "7").await)
}

async fn broken_import(b: Arc<Bench>) -> Result<Failure> {
    let (volume, socket) = importing(&b).await?;
    let (near, far) = UnixStream::pair()?;
    pass(Path::new(&socket), &far.into_std()?, "a datapath")?;
    let mut tapdisk = Tapdisk::new(near);
    tapdisk.negotiate().await?;
    drop(tapdisk);
    let noted = Path::new(&socket).with_file_name("import.broken");
    tokio::time::timeout(Duration::from_secs(20), async {
        while !noted.exists() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .context("the client's end was not noticed")?;
    let failure = refused(b.datapath("Datapath.deactivate", &volume, "MIR0a1b2c").await)?;
    b.datapath("Datapath.deactivate", &volume, "MIR0a1b2c").await.context("the second time")?;
    Ok(failure)
}

async fn gone(b: Arc<Bench>) -> Result<Failure> {
    std::fs::rename(&b.sr.path, b.directory().join("aside"))?;
    call(&b, &Request::sr("SR.ls", DBG, &b.sr.sr)).await
}

async fn wrong_size(b: Arc<Bench>) -> Result<Failure> {
    refused(b.create(i64::MAX).await)
}

async fn smaller(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(2 * MIB).await?;
    refused(b.resize(&volume.key, MIB).await)
}

async fn no_uri(b: Arc<Bench>) -> Result<Failure> {
    call(&b, &Request::sr_probe(DBG, &[])).await
}

async fn wrong_uri(b: Arc<Bench>) -> Result<Failure> {
    call(&b, &create_sr(&[("uri".to_owned(), "file:///dev/null".to_owned())])).await
}

async fn wrong_uuid(b: Arc<Bench>) -> Result<Failure> {
    let mut config = b.sr.config.clone();
    config.push(("sr_uuid".to_owned(), Uuid::new_v4().to_string()));
    refused(b.attach_sr(&config).await)
}

async fn long_chain(b: Arc<Bench>) -> Result<Failure> {
    let (child, parent) = (b.create(MIB).await?, b.create(MIB).await?);
    for _ in 1..128 {
        b.snapshot(&parent.key).await?;
    }
    // A snapshot makes it longer as well.
    let longer = refused(b.snapshot(&parent.key).await)?;
    anyhow::ensure!(longer.code == "SR_BACKEND_FAILURE_109", "{longer:?}");
    call(&b, &Request::volume_compose(DBG, &b.sr.sr, &child.key, &parent.key)).await
}

async fn bad_request(b: Arc<Bench>) -> Result<Failure> {
    call(&b, &Request::new("Volume.stat", DBG, vec![])).await
}

async fn system_call(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(MIB).await?;
    let lock = tree(&b, &volume).join("lock");
    std::fs::remove_file(&lock)?;
    std::fs::create_dir(&lock)?;
    refused(b.set(&volume.key, "k", "v").await)
}

async fn too_long(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(MIB).await?;
    std::fs::write(b.host.root().join("etc/xapi-storage-qcow2.json"), "{\"lock_seconds\": 1, \"gc\": false}")?;
    let held = std::fs::File::open(tree(&b, &volume).join("lock"))?;
    held.lock()?;
    refused(b.set(&volume.key, "k", "v").await)
}

async fn broken_mirror(b: Arc<Bench>) -> Result<Failure> {
    let (source, target) = (b.create(MIB).await?, b.create(MIB).await?);
    b.plug(&source, "5").await?;
    let nbd = b.plug(&target, "MIR0a1b2c").await?;
    let remote = format!("nbd+unix:///{}?socket={}", nbd.export(), nbd.socket().display());
    let status = b.data_wait(&b.mirror(&source, "5", &remote).await?).await?;
    ensure!(status.complete, "{status:?}");
    b.unplug(&target, "MIR0a1b2c").await?;
    refused(b.datapath("Datapath.deactivate", &source, "5").await)
}

async fn qemu(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(MIB).await?;
    // The width of reference counts, which QEMU alone reads.
    write_at(&image(&b, &volume)?, 96, &7u32.to_be_bytes())?;
    b.attach(&volume, "7").await?;
    refused(b.activate(&volume, "7").await)
}

async fn read_only(b: Arc<Bench>) -> Result<Failure> {
    let config = b.new_place("ro")?;
    let mounted = Mounted::tmpfs(&b.directory().join("ro"), "4m")?;
    let created = b.call(&create_sr(&config)).await?.string_map("SR.create")?;
    let sr = b.attach_sr(&created).await?;
    mounted.make_read_only()?;
    call(&b, &Request::volume_create(DBG, &sr, "a disk", "", MIB, false)).await
}

async fn without_data(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(MIB).await?;
    b.call(&Request::volume("Volume.enable_cbt", DBG, &b.sr.sr, &volume.key)).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    b.call(&Request::volume("Volume.data_destroy", DBG, &b.sr.sr, &snapshot.key)).await?;
    refused(b.clone_of(&snapshot.key).await)
}

async fn untracked(b: Arc<Bench>) -> Result<Failure> {
    let volume = b.create(MIB).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    refused(b.call(&Request::volume_list_changed_blocks(DBG, &b.sr.sr, &snapshot.key, &volume.key)).await)
}

async fn unrelated(b: Arc<Bench>) -> Result<Failure> {
    let (one, other) = (b.create(MIB).await?, b.create(MIB).await?);
    for volume in [&one, &other] {
        b.call(&Request::volume("Volume.enable_cbt", DBG, &b.sr.sr, &volume.key)).await?;
    }
    refused(b.call(&Request::volume_list_changed_blocks(DBG, &b.sr.sr, &one.key, &other.key)).await)
}
