//! Runs the flows over a plugin of plain files, and holds the order of their calls against xapi's.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::Mutex;

use bytes::Bytes;

use super::*;
use crate::db::{ActiveDisk, Xapi};
use crate::host::{PluginSource, WireFault, WireHarm, WireMoment};
use crate::nbd::Client;
use crate::processes::Process;
use crate::script::{CallLog, Fault};

const METHODS: [(&str, &str, &str); 2] = [
    (
        "volume",
        "org.xen.xapi.storage.plain",
        "Plugin.Query SR.attach SR.stat SR.ls Volume.create Volume.stat Volume.snapshot Volume.clone Volume.destroy \
         Volume.resize Volume.set Volume.unset Volume.set_name Volume.set_description",
    ),
    (
        "datapath",
        "qsd",
        "Plugin.Query Datapath.attach Datapath.activate Datapath.activate_readonly Datapath.deactivate \
         Datapath.detach Data.mirror Data.stat",
    ),
];

struct World {
    dir: tempfile::TempDir,
    xapi: Xapi,
    a: Arc<Host>,
    b: Arc<Host>,
    vm: VmRef,
    log: CallLog,
}

const SIZE: u64 = 1 << 20;

impl Drop for World {
    /// A test that failed leaves no daemon behind.
    fn drop(&mut self) {
        for sr in ["s1", "s2"] {
            for volume in std::fs::read_dir(self.dir.path().join(sr)).into_iter().flatten().flatten() {
                let pid =
                    std::fs::read_to_string(volume.path().join("pid")).ok().and_then(|pid| pid.trim().parse().ok());
                if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
                }
            }
        }
    }
}

async fn world(same_host: bool) -> World {
    let dir = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp").unwrap();
    let script: PathBuf = dir.path().join("script");
    std::fs::write(&script, include_str!("../../golden/plain-plugin.sh")).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    for (kind, name, methods) in METHODS {
        let target = dir.path().join("plugins").join(kind).join(name);
        std::fs::create_dir_all(&target).unwrap();
        for method in methods.split_whitespace() {
            symlink(&script, target.join(method)).unwrap();
        }
    }
    let log = CallLog::default();
    let plugins = PluginSource::Existing(dir.path().join("plugins"));
    let a = Host::start("a", &dir.path().join("a"), &plugins, &log).await.unwrap();
    let b = match same_host {
        true => Arc::clone(&a),
        false => Host::start("b", &dir.path().join("b"), &plugins, &log).await.unwrap(),
    };
    for (host, sr) in [(&a, "s1"), (&b, "s2")] {
        let path = dir.path().join(sr);
        std::fs::create_dir(&path).unwrap();
        let config = [("uri".to_owned(), format!("file://{}", path.display()))];
        host.sr_attach("t", "plain", &Sr::from(sr), &config).await.unwrap();
    }
    let xapi = Xapi::default();
    let vm = xapi.vm_create("vm", &a, &Sr::from("s1"), &[SIZE]).await.unwrap();
    World { dir, xapi, a, b, vm, log }
}

async fn write(disk: &ActiveDisk, offset: u64, byte: u8) {
    let client = Client::connect(&disk.uri).await.unwrap();
    client.write(offset, Bytes::from(vec![byte; 65536])).await.unwrap();
    client.flush().await.unwrap();
    client.disconnect().await;
}

async fn read(disk: &ActiveDisk, offset: u64) -> u8 {
    let client = Client::connect(&disk.uri).await.unwrap();
    let found = client.read(offset, 1).await.unwrap()[0];
    client.disconnect().await;
    found
}

impl World {
    /// One, two, back to one, three: snapshots `one` with children `two` and `three`, and the leaf on `three`.
    async fn branched(&self, grow: bool) -> Vec<ActiveDisk> {
        let disks = self.xapi.vm_start(self.vm).await.unwrap();
        write(&disks[0], 0, 1).await;
        let one = self.xapi.vm_snapshot(self.vm, "one").await.unwrap();
        write(&disks[0], 65536, 2).await;
        self.xapi.vm_snapshot(self.vm, "two").await.unwrap();
        self.xapi.vm_revert(one).await.unwrap();
        if grow {
            self.xapi.vdi_resize(self.vm, 0, 2 * SIZE).await.unwrap();
        }
        let disks = self.xapi.vm_start(self.vm).await.unwrap();
        write(&disks[0], 131_072, 3).await;
        self.xapi.vm_snapshot(self.vm, "three").await.unwrap();
        write(&disks[0], 0, 4).await;
        disks
    }

    fn migration(&self, flow: Flow) -> Migration {
        Migration { poll: Duration::from_millis(20), ..Migration::new(self.vm, &self.b, &Sr::from("s2"), flow) }
    }

    fn volumes(&self, sr: &str) -> usize {
        std::fs::read_dir(self.dir.path().join(sr)).unwrap().count()
    }

    fn bytes(&self, sr: &str, vdi: &Vdi) -> Vec<u8> {
        std::fs::read(self.dir.path().join(sr).join(&vdi.0).join("disk")).unwrap()
    }

    fn key(&self, vdi: &Vdi, key: &str) -> String {
        std::fs::read_to_string(self.dir.path().join("s2").join(&vdi.0).join("keys").join(key)).unwrap_or_default()
    }

    fn daemons(&self) -> usize {
        let image = format!("filename={}/", self.dir.path().display());
        Process::all().filter(|process| process.is_told(&image)).count()
    }
}

/// Remembers what the VM was resumed with.
#[derive(Default)]
struct Resumed(Mutex<Vec<ActiveDisk>>);

impl Observer for Resumed {
    fn resume(&self, disks: Vec<ActiveDisk>) -> super::observe::Answer<'_> {
        *self.0.lock().unwrap() = disks;
        Box::pin(std::future::ready(Ok(())))
    }
}

async fn a_tree_arrives(flow: Flow, same_host: bool, grow: bool) -> (World, Migrated) {
    let world = world(same_host).await;
    world.branched(grow).await;
    let before: Vec<(Vdi, Vec<u8>)> = {
        let sr = Sr::from("s1");
        let all: Vec<Vdi> = world.xapi.db().vdis_of(&sr).map(|v| v.info.vdi.clone()).collect();
        all.into_iter().map(|vdi| (vdi.clone(), world.bytes("s1", &vdi))).collect()
    };
    assert_eq!(before.len(), 4);
    let resumed = Resumed::default();
    let migrated = match migrate(&world.xapi, &world.migration(flow), &resumed).await {
        Ok(migrated) => migrated,
        Err(failed) => panic!("{failed:?}"),
    };
    assert_eq!(migrated.not_destroyed, []);
    assert!(migrated.stale.is_empty());
    assert_eq!(world.volumes("s1"), 0, "the source is not empty");
    assert_eq!(world.volumes("s2"), 4);
    assert_eq!(migrated.moved.len(), 4);
    for moved in &migrated.moved {
        let (_, bytes) = before.iter().find(|(vdi, _)| *vdi == moved.source).unwrap();
        assert!(*bytes == world.bytes("s2", &moved.destination), "{moved:?} differs");
    }
    let leaf = migrated.moved.iter().find(|m| m.snapshot.is_none()).unwrap();
    let named = |name: &str| migrated.moved.iter().find(|m| m.snapshot.as_deref() == Some(name)).unwrap();
    assert_eq!(leaf.parent.as_ref(), Some(&named("three").source));
    assert_eq!(named("three").parent.as_ref(), Some(&named("one").source));
    assert_eq!(named("two").parent.as_ref(), Some(&named("one").source));
    assert_eq!(named("one").parent, None);
    for name in ["one", "two", "three"] {
        assert_eq!(world.key(&named(name).destination, "snapshot_of"), leaf.destination.0);
        assert_eq!(world.key(&named(name).destination, "is_a_snapshot"), "true");
    }
    let disks = resumed.0.lock().unwrap().clone();
    assert_eq!(disks[0].vdi, leaf.destination);
    assert_eq!(read(&disks[0], 0).await, 4);
    assert_eq!(world.daemons(), 1, "more runs than the VM's own disk");
    assert_eq!(world.a.mirrors(), (vec![], vec![]));
    world.xapi.vm_shutdown(world.vm).await.unwrap();
    assert_eq!(world.daemons(), 0);
    let record = world.xapi.vm(world.vm).unwrap();
    assert_eq!(record.vbds[0].vdi, leaf.destination);
    (world, migrated)
}

#[tokio::test]
async fn a_tree_arrives_by_every_flow() {
    for flow in [Flow::Leaf, Flow::Tree, Flow::Base] {
        let (_, migrated) = a_tree_arrives(flow, false, false).await;
        assert!(migrated.downtime.is_some());
        assert_eq!(migrated.wires.len(), 4, "{flow:?}");
        assert!(migrated.wires.iter().all(|w| w.to_destination() > 0));
    }
}

#[tokio::test]
async fn a_tree_with_a_resized_disk_arrives_on_the_same_host() {
    for flow in [Flow::Leaf, Flow::Tree, Flow::Base] {
        a_tree_arrives(flow, true, true).await;
    }
}

#[tokio::test]
async fn a_halted_vm_arrives_and_leaves_a_stale_receiver() {
    let world = world(false).await;
    world.branched(false).await;
    world.xapi.vm_shutdown(world.vm).await.unwrap();
    let migrated = migrate(&world.xapi, &world.migration(Flow::Base), &Quiet).await.unwrap();
    assert_eq!(migrated.downtime, None);
    assert_eq!((world.volumes("s1"), world.volumes("s2")), (0, 4));
    assert_eq!(migrated.stale.len(), 1);
    assert_eq!(world.daemons(), 1);
    release(&world.a, &migrated.stale).await.unwrap();
    assert_eq!(world.daemons(), 0);
    assert_eq!(world.a.mirrors(), (vec![], vec![]));
}

/// The calls of a mirror of a lone leaf, without the polls.
const LONE_LEAF: &str = "\
    a SR.stat, a SR.ls, b Volume.create, b Volume.set, b Volume.stat, b Datapath.attach, b Volume.stat, \
    b Datapath.activate, a Volume.stat, a Datapath.attach, a Volume.stat, a Data.mirror, b Volume.stat, \
    b Datapath.attach, a Volume.stat, b SR.stat, b SR.ls, \
    a Volume.stat, a Datapath.deactivate, a Datapath.detach, \
    a Volume.stat, a Datapath.deactivate, b Volume.stat, b Datapath.deactivate, b Datapath.detach, b Volume.unset, \
    b Volume.stat, b Datapath.attach, b Volume.stat, b Datapath.activate, \
    a Volume.stat, a Datapath.deactivate, a Datapath.detach, a Volume.stat, a Volume.destroy";

#[tokio::test]
async fn the_calls_of_a_live_leaf_come_in_xapis_order() {
    for flow in [Flow::Leaf, Flow::Tree, Flow::Base] {
        let world = world(false).await;
        world.xapi.vm_start(world.vm).await.unwrap();
        let mark = world.log.len();
        migrate(&world.xapi, &world.migration(flow), &Quiet).await.unwrap();
        let calls: Vec<String> = world.log.order_since(mark).into_iter().filter(|c| c != "a Data.stat").collect();
        assert_eq!(calls.join(", "), LONE_LEAF, "{flow:?}");
        world.xapi.vm_shutdown(world.vm).await.unwrap();
    }
}

#[tokio::test]
async fn each_call_may_fail_once_and_the_migration_then_works() {
    for flow in [Flow::Leaf, Flow::Tree, Flow::Base] {
        let world = world(false).await;
        let disks = world.xapi.vm_start(world.vm).await.unwrap();
        write(&disks[0], 0, 1).await;
        world.xapi.vm_snapshot(world.vm, "one").await.unwrap();
        write(&disks[0], 0, 4).await;
        // The first call of every method on either side, which is enough to come through each clean-up.
        for (host, method) in [
            ("b", "Volume.create"),
            ("b", "Volume.set"),
            ("b", "Datapath.attach"),
            ("b", "Datapath.activate"),
            ("b", "Volume.snapshot"),
            ("a", "Datapath.attach"),
            ("a", "Data.mirror"),
            ("a", "Data.stat"),
            ("b", "SR.ls"),
        ] {
            let runner = if host == "a" { world.a.runner() } else { world.b.runner() };
            runner.faults().nth_of(host, method, 0, Fault::FailInstead);
            let failed = migrate(&world.xapi, &world.migration(flow), &Quiet).await;
            runner.faults().clear();
            let failed = failed.expect_err(method);
            assert!(!failed.restarted);
            let now = (world.volumes("s1"), world.volumes("s2"), world.daemons());
            assert_eq!(now, (2, 0, 1), "{flow:?}, {host} {method}: {failed:?}");
            assert_eq!(world.a.mirrors(), (vec![], vec![]));
            assert_eq!(read(&disks[0], 0).await, 4);
        }
        migrate(&world.xapi, &world.migration(flow), &Quiet).await.unwrap();
        world.xapi.vm_shutdown(world.vm).await.unwrap();
        assert_eq!(world.daemons(), 0);
    }
}

#[tokio::test]
async fn a_vm_that_was_suspended_in_vain_runs_again_at_the_source() {
    let world = world(false).await;
    world.branched(false).await;
    for (host, method) in [("a", "Datapath.deactivate"), ("b", "Datapath.attach"), ("b", "Datapath.activate")] {
        let runner = if host == "a" { world.a.runner() } else { world.b.runner() };
        // Only the guest's own datapaths have a number for a domain.
        runner.faults().nth(0, Fault::FailInstead, move |site| {
            let domain = site.request.text("domain").unwrap_or_default();
            site.host == host && site.request.method == method && domain.parse::<u32>().is_ok()
        });
        let resumed = Resumed::default();
        let failed = migrate(&world.xapi, &world.migration(Flow::Base), &resumed).await.unwrap_err();
        runner.faults().clear();
        assert!(failed.restarted, "{failed:?}");
        assert_eq!(failed.phase, "switch");
        let now = (world.volumes("s1"), world.volumes("s2"), world.daemons());
        assert_eq!(now, (4, 0, 1), "{host} {method}: {failed:?}");
        let disks = resumed.0.lock().unwrap().clone();
        assert_eq!(read(&disks[0], 0).await, 4);
    }
}

/// Asks to cancel as soon as a volume has arrived.
struct CancelAt(Cancel);

impl Observer for CancelAt {
    fn event(&self, event: &Event) {
        if matches!(event, Event::Complete { .. }) {
            self.0.ask();
        }
    }
}

#[tokio::test]
async fn a_cancelled_migration_leaves_the_destination_empty() {
    for flow in [Flow::Leaf, Flow::Tree, Flow::Base] {
        let world = world(false).await;
        world.branched(false).await;
        let migration = world.migration(flow);
        let failed = migrate(&world.xapi, &migration, &CancelAt(migration.cancel.clone())).await.unwrap_err();
        assert!(matches!(failed.error, Error::Cancelled), "{flow:?}: {failed:?}");
        assert_eq!((world.volumes("s1"), world.volumes("s2"), world.daemons()), (4, 0, 1), "{flow:?}: {failed:?}");
        world.xapi.vm_shutdown(world.vm).await.unwrap();
    }
}

#[tokio::test]
async fn a_toolstack_restart_cancels_what_is_under_way() {
    let world = world(false).await;
    world.xapi.vm_start(world.vm).await.unwrap();
    world.a.wires().order(|_| Some(WireFault { at: WireMoment::Handshake, how: WireHarm::Stall }));
    let migration = world.migration(Flow::Leaf);
    {
        let run = migrate(&world.xapi, &migration, &Quiet);
        tokio::pin!(run);
        let mirroring = async {
            // By then the destination has attached its volume for the proxy too.
            while world.a.wires().all().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            _ = &mut run => panic!("the migration ended"),
            () = mirroring => {}
        }
    }
    assert_eq!(world.a.mirrors().1.len(), 1);
    toolstack_restart(&world.a).await;
    assert_eq!((world.volumes("s1"), world.volumes("s2")), (1, 0));
    assert_eq!(world.a.mirrors(), (vec![], vec![]));
    world.xapi.vm_shutdown(world.vm).await.unwrap();
    assert_eq!(world.daemons(), 0);
}
