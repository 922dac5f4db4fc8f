//! The group of whole mirrors: through xapi's proxies, by the relay alone, onto ext4, of a volume with little in it.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;
use uuid::Uuid;

use super::call::{self, DBG, KIND, datapath};
use super::ext4::Ext4;
use super::qmp::{Qmp, mirror_job, nbd_node};
use super::relay::Relay;
use super::{Bar, Figure, Measured, Settings, Unit, by_turns, calls, sparse};
use crate::disk;
use crate::host::{Host, ImportPath};
use crate::nbd::Uri;
use crate::scenario::Stage;
use crate::smapiv2::{Dp, Sr, Vdi, Vm};
use crate::wire::{Request, Volume};

/// The domain for which the source is active: as a snapshot that travels.
const READER: &str = "CP0be9c4";
/// The domain for which a destination is active.
const WRITER: &str = "MIR0be9c4";

pub(super) async fn measure(settings: &Settings, measured: &mut Measured) -> Result<()> {
    let stage = settings.stage(false).await?;
    let result = async {
        whole(settings, &stage, measured).await.context("whole mirrors")?;
        sparse::measure(settings, &stage, measured).await.context("a large volume with little in it")
    }
    .await;
    stage.close().await;
    measured.chart("mirror", "Whole mirrors", ("s", 1.0), &["mirror", "relay", "ext4", "sparse-time"]);
    result
}

async fn whole(settings: &Settings, stage: &Stage, measured: &mut Measured) -> Result<()> {
    let bench = Bench::new(settings, stage).await?;
    let (size, runs) = (crate::draw::size(settings.scale.mirror), settings.scale.mirrors);
    let (mirrors, converts) =
        by_turns(runs, async || bench.mirror(true).await, async || bench.convert_through_relays().await).await?;
    let what = format!("a mirror of {size}, relay and proxies");
    let against = "qemu-img convert -n -W through as many relays";
    measured
        .add(Figure::new("mirror", what, Unit::Seconds, mirrors).against(against, converts).bar(Bar::Times(1.15)));

    let (relayed, direct) =
        by_turns(runs, async || bench.mirror(false).await, async || bench.mirror_by_hand().await).await?;
    let what = format!("a mirror of {size}, relay alone");
    let against = "blockdev-mirror of the same daemon straight to the socket";
    measured.add(Figure::new("relay", what, Unit::Seconds, relayed).against(against, direct).bar(Bar::Times(1.1)));

    let bar = Bar::Times(1.25);
    let what = format!("a mirror of {size} onto ext4");
    // Room for two copies and more.
    match Ext4::mount(&settings.place, settings.scale.mirror * 3 + (256 << 20)) {
        Err(error) => {
            let why = format!("no ext4 file system can be mounted: {error:#}");
            measured.add(Figure::skipped("ext4", what, Unit::Seconds, bar, why));
        }
        Ok(ext4) => {
            let taken = bench.onto(&ext4, runs).await;
            drop(ext4);
            let (mirrors, converts) = taken.context("onto ext4")?;
            let against = "qemu-img convert -n -W -t none to a file there";
            measured.add(Figure::new("ext4", what, Unit::Seconds, mirrors).against(against, converts).bar(bar));
        }
    }
    bench.end().await
}

/// A source that is full of data, active for reading, and where its copies go.
struct Bench<'a> {
    stage: &'a Stage,
    source: Volume,
    image: PathBuf,
    size: u64,
    qemu_img: PathBuf,
}

impl<'a> Bench<'a> {
    async fn new(settings: &Settings, stage: &'a Stage) -> Result<Self> {
        let (host, size) = (&stage.source, settings.scale.mirror);
        let source = call::create(host, &stage.source_sr, size).await?;
        call::write_alone(host, &source, [(0, size)], 1).await?;
        let image = disk::Sr::read(&stage.source_path)?.node_of(&source.key)?.image.clone();
        call::attach(host, &source, READER).await?;
        call::call(host, &datapath("Datapath.activate_readonly", &source, READER)?).await?;
        Ok(Self { stage, source, image, size, qemu_img: calls::tool("qemu-img")? })
    }

    async fn end(self) -> Result<()> {
        call::unplug(&self.stage.source, &self.source, READER).await?;
        call::destroy(&self.stage.source, &self.stage.source_sr, &self.source).await
    }

    /// A new volume at the destination, which goes after what is done with it.
    async fn with_target<T>(&self, sr: &Sr, done: impl AsyncFnOnce(&Volume, Uri) -> Result<T>) -> Result<T> {
        let host = &self.stage.destination;
        let target = call::create(host, sr, self.size).await?;
        let uri = call::plug(host, &target, WRITER).await?;
        let result = done(&target, uri).await;
        call::unplug(host, &target, WRITER).await?;
        call::destroy(host, sr, &target).await?;
        result
    }

    /// A mirror as xapi has it done; its seconds.
    async fn mirror(&self, proxied: bool) -> Result<f64> {
        self.mirror_to(&self.stage.destination_sr, proxied).await
    }

    async fn mirror_to(&self, sr: &Sr, proxied: bool) -> Result<f64> {
        self.with_target(sr, async |target, uri| {
            let to = if proxied { proxy(self.stage, sr, &self.source, target, &uri)? } else { uri };
            mirror_seconds(&self.stage.source, &self.source, READER, &to).await
        })
        .await
    }

    async fn convert_through_relays(&self) -> Result<f64> {
        let sr = &self.stage.destination_sr;
        self.with_target(sr, async |target, uri| {
            let proxy = proxy(self.stage, sr, &self.source, target, &uri)?;
            let socket = self.stage.source.root().join("relay.sock");
            let _relay = Relay::start(&socket, proxy.socket())?;
            self.convert(&[], &Uri::new(socket, uri.export()).to_string(), "raw").await
        })
        .await
    }

    async fn mirror_by_hand(&self) -> Result<f64> {
        self.with_target(&self.stage.destination_sr, async |_, uri| {
            let volumes = self.stage.source.runtime_dir().join("volumes");
            let mut qmp = Qmp::connect(&volumes.join(&self.source.key).join("mirror.sock")).await?;
            let exports = qmp.execute("query-block-exports", json!({})).await?;
            let node = exports[0]["node-name"].as_str().context("the source is not exported")?.to_owned();
            let began = Instant::now();
            qmp.execute("blockdev-add", nbd_node("bench-target", uri.socket(), uri.export())).await?;
            qmp.mirror(mirror_job("bench", &node, "bench-target")).await?;
            qmp.end_mirror("bench").await?;
            let took = began.elapsed().as_secs_f64();
            qmp.execute("blockdev-del", json!({"node-name": "bench-target"})).await?;
            Ok(took)
        })
        .await
    }

    /// Mirrors onto another file system, and conversions to files there.
    async fn onto(&self, ext4: &Ext4, runs: usize) -> Result<(Vec<f64>, Vec<f64>)> {
        let (host, path) = (&self.stage.destination, ext4.directory().join("sr"));
        std::fs::create_dir(&path)?;
        let sr = Sr(Uuid::new_v4().to_string());
        let config = [("uri".to_owned(), format!("file://{}", path.display()))];
        let config = host.sr_create(DBG, KIND, &sr, &config, "ext4", "").await?;
        host.sr_attach(DBG, KIND, &sr, &config).await?;
        let file = ext4.directory().join("copy.qcow2");
        let convert = async || {
            // As large and of the same kind as a volume; making it is not a part of a mirror either.
            let size = self.size.to_string();
            let create: [&OsStr; 6] =
                ["create".as_ref(), "-q".as_ref(), "-f".as_ref(), "qcow2".as_ref(), file.as_ref(), size.as_ref()];
            call::program(&self.stage.source, &self.qemu_img, &create).await?;
            let took = self.convert(&["-t", "none"], &file.to_string_lossy(), "qcow2").await?;
            std::fs::remove_file(&file)?;
            Ok(took)
        };
        let taken = by_turns(runs, async || self.mirror_to(&sr, false).await, convert).await;
        host.sr_detach(DBG, &sr).await?;
        taken
    }

    /// qemu-img convert of the source's image, opened as the daemon opens it; its seconds.
    async fn convert(&self, options: &[&str], target: &str, format: &str) -> Result<f64> {
        let file = json!({"driver": "file", "filename": self.image, "cache": {"direct": true}, "aio": "io_uring"});
        let from = format!("json:{}", json!({"driver": "qcow2", "file": file}));
        let mut arguments: Vec<&OsStr> = ["convert", "-U", "-n", "-W"].map(OsStr::new).to_vec();
        arguments.extend(options.iter().map(OsStr::new));
        arguments.extend(["-O", format, &from, target].map(OsStr::new));
        call::program(&self.stage.source, &self.qemu_img, &arguments).await
    }
}

/// Sets up xapi's proxies for one connection to a destination; the source's end of them.
pub(super) fn proxy(stage: &Stage, sr: &Sr, source: &Volume, target: &Volume, uri: &Uri) -> Result<Uri> {
    let (host, vm) = (&stage.source, Vm(WRITER.to_owned()));
    let vdi = Vdi(target.key.clone());
    let path = ImportPath { vm: vm.clone(), sr: sr.clone(), vdi, dp: Dp(Uuid::new_v4().to_string()) };
    let listener = host.bind_export(&vm)?;
    host.run_export(listener, Vdi(source.key.clone()), &stage.destination, path);
    Ok(Uri::new(host.export_socket(&vm), uri.export()))
}

/// Mirrors a volume that nobody writes to; the seconds from the call until it is complete.
pub(super) async fn mirror_seconds(host: &Arc<Host>, source: &Volume, domain: &str, to: &Uri) -> Result<f64> {
    let began = Instant::now();
    let operation = call::mirror(host, source, domain, to).await?;
    call::complete(host, &operation).await?;
    let took = began.elapsed().as_secs_f64();
    call::call(host, &Request::data("Data.destroy", DBG, &operation)).await?;
    Ok(took)
}
