//! Which volumes travel, in which order, and the tree of each disk's snapshots. Nothing here calls a script.

use std::cmp::Ordering;

use super::Flow;
use crate::db::{Db, VmRef};
use crate::smapiv2::{Dp, Sr, Vdi, VdiInfo, Vm};

/// One volume to migrate (`vdi_mirror` of ocaml/xapi/xapi_vm_migrate.ml).
#[derive(Debug, Clone)]
pub(super) struct Conf {
    pub vdi: Vdi,
    pub sr: Sr,
    pub info: VdiInfo,
    /// The disk that it is a snapshot of, or itself.
    pub disk: Vdi,
    /// The disk's place in the VM.
    pub index: usize,
    /// The snapshot's name; none for a live leaf.
    pub snapshot: Option<String>,
    /// The volume that it is based on, by the VM's history.
    pub parent: Option<Vdi>,
    /// The datapath that its VBD has or would have.
    pub dp: Dp,
    pub mirror_vm: Vm,
    pub copy_vm: Vm,
    /// The order of making, which breaks ties of times in whole seconds.
    pub age: VmRef,
}

impl Conf {
    /// A live leaf is mirrored, all else is copied.
    pub fn is_leaf(&self) -> bool {
        self.snapshot.is_none()
    }
}

/// A snapshot of one disk, and those that were made from it.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub conf: Conf,
    /// Whether the live leaf is below it.
    pub active: bool,
    pub children: Vec<Node>,
}

/// Every volume of a VM and its snapshots in the order in which a flow lets them travel.
pub(super) fn order(db: &Db, vm: VmRef, flow: Flow) -> Vec<Conf> {
    let mut all = leaves(db, vm);
    if flow != Flow::Tree {
        let snapshots: Vec<Conf> = db
            .snapshots_of(vm)
            .flat_map(|(snapshot, _)| all.iter().filter_map(move |leaf| conf_of(db, snapshot, leaf)))
            .collect();
        all.extend(snapshots);
    }
    // By size, so that what is small can serve as a base for what is large, and then by age.
    all.sort_by(by_size_and_age);
    if flow == Flow::Base {
        all = parents_first(all);
    }
    all
}

fn by_size_and_age(a: &Conf, b: &Conf) -> Ordering {
    let time = |c: &Conf| (c.info.snapshot_time.clone(), !c.is_leaf(), c.age);
    // A live leaf has no snapshot time; as in xapi the epoch stands there, and it comes first among equals.
    a.info.virtual_size.cmp(&b.info.virtual_size).then_with(|| time(a).cmp(&time(b)))
}

/// A volume never comes before the one that it is based on.
fn parents_first(sorted: Vec<Conf>) -> Vec<Conf> {
    let mut done: Vec<Conf> = Vec::new();
    for conf in &sorted {
        let mut line = vec![conf];
        while let Some(parent) = line.last().and_then(|c| c.parent.as_ref()) {
            let Some(parent) = sorted.iter().find(|c| c.vdi == *parent) else { break };
            line.push(parent);
        }
        for conf in line.into_iter().rev() {
            if !done.iter().any(|d| d.vdi == conf.vdi) {
                done.push(conf.clone());
            }
        }
    }
    done
}

/// The live disks of a VM.
pub(super) fn leaves(db: &Db, vm: VmRef) -> Vec<Conf> {
    let Some(record) = db.vm(vm) else { return Vec::new() };
    let conf = |(index, vbd): (usize, &crate::db::Vbd)| {
        let vdi = db.vdi(&vbd.vdi)?;
        let dp = match record.domid {
            Some(domid) => format!("vbd/{domid}/{}", vbd.device),
            None => format!("vbd/{}/{}", record.uuid, vbd.vdi),
        };
        let hash = format!("{}{}", digits(&record.uuid.to_string()), digits(&vbd.vdi.0));
        Some(Conf {
            vdi: vbd.vdi.clone(),
            sr: vdi.sr.clone(),
            info: vdi.info.clone(),
            disk: vbd.vdi.clone(),
            index,
            snapshot: None,
            parent: db.lineage_parent(vm, &vbd.vdi).map(|p| p.info.vdi.clone()),
            dp: Dp(dp),
            mirror_vm: Vm(format!("MIR{hash}")),
            copy_vm: Vm(format!("CP{hash}")),
            age: vm,
        })
    };
    record.vbds.iter().enumerate().filter_map(conf).collect()
}

fn conf_of(db: &Db, snapshot: VmRef, leaf: &Conf) -> Option<Conf> {
    let record = db.vm(snapshot)?;
    let vdi = db.snapshot_of_disk(snapshot, &leaf.vdi)?;
    let hash = format!("{}{}", digits(&record.uuid.to_string()), digits(&vdi.info.vdi.0));
    Some(Conf {
        vdi: vdi.info.vdi.clone(),
        sr: vdi.sr.clone(),
        info: vdi.info.clone(),
        disk: leaf.vdi.clone(),
        index: leaf.index,
        snapshot: Some(record.name.clone()),
        parent: db.lineage_parent(snapshot, &leaf.vdi).map(|p| p.info.vdi.clone()),
        dp: Dp(format!("vbd/{}/{}", record.uuid, vdi.info.vdi)),
        mirror_vm: Vm(format!("MIR{hash}")),
        copy_vm: Vm(format!("CP{hash}")),
        age: snapshot,
    })
}

/// Three hex digits of a reference; two references may well share them, as in xapi.
fn digits(reference: &str) -> String {
    let hash =
        reference.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    format!("{:03x}", (hash >> 24) & 0xfff)
}

/// The snapshots of one disk as a forest, projected from the VM's: snapshots that do not hold the disk are left out and
/// their children take their place.
pub(super) fn forest(db: &Db, vm: VmRef, leaf: &Conf) -> Vec<Node> {
    let mut active = Vec::new();
    let mut at = db.vm(vm).and_then(|r| r.parent);
    while let Some(snapshot) = at {
        active.push(snapshot);
        at = db.vm(snapshot).and_then(|r| r.parent);
    }
    let roots = db.snapshots_of(vm).filter(|(_, r)| r.parent.is_none()).map(|(k, _)| k);
    roots.flat_map(|root| subtree(db, root, leaf, &active)).collect()
}

fn subtree(db: &Db, snapshot: VmRef, leaf: &Conf, active: &[VmRef]) -> Vec<Node> {
    let children: Vec<Node> =
        db.children_of(snapshot).flat_map(|(child, _)| subtree(db, child, leaf, active)).collect();
    match conf_of(db, snapshot, leaf) {
        Some(conf) => vec![Node { conf, active: active.contains(&snapshot), children }],
        None => children,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::db::{Vbd, VmRecord};
    use crate::host::{Host, PluginSource};
    use crate::script::CallLog;

    /// A VM with one disk and these snapshots, each with its parent and size; the leaf is on the last one.
    async fn db(snapshots: &[(&str, Option<&str>, i64)]) -> (tempfile::TempDir, Db, VmRef) {
        let dir = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp").unwrap();
        let plugins = PluginSource::Existing(dir.path().join("none"));
        let host = Host::start("a", Path::new(&dir.path().join("a")), &plugins, &CallLog::default()).await.unwrap();
        let sr = Sr::from("sr");
        let mut db = Db::default();
        let add = |db: &mut Db, name: &str, snapshot_of: Option<VmRef>, parent: Option<VmRef>, size: i64| {
            let info = VdiInfo { vdi: Vdi::from(name), ..VdiInfo::blank(name, size) };
            db.add_vdi(&sr, info, snapshot_of.map(|_| Vdi::from("leaf")));
            db.add_vm(VmRecord {
                uuid: uuid::Uuid::new_v4(),
                name: name.to_owned(),
                snapshot_of,
                parent,
                vbds: vec![Vbd { device: "xvda".to_owned(), vdi: Vdi::from(name) }],
                host: Arc::clone(&host),
                domid: None,
            })
        };
        let vm = add(&mut db, "leaf", None, None, snapshots.last().unwrap().2);
        for (name, parent, size) in snapshots {
            let parent = parent.map(|parent| db.snapshot_named(vm, parent).unwrap());
            let snapshot = add(&mut db, name, Some(vm), parent, *size);
            db.vm_mut(vm).unwrap().parent = Some(snapshot);
        }
        (dir, db, vm)
    }

    fn names(confs: &[Conf]) -> Vec<&str> {
        confs.iter().map(|c| c.vdi.0.as_str()).collect()
    }

    const EXAMPLE: [(&str, Option<&str>, i64); 4] =
        [("1", None, 8), ("2", Some("1"), 8), ("3", Some("1"), 8), ("4", Some("3"), 8)];

    #[tokio::test]
    async fn a_volume_comes_after_what_it_is_based_on() {
        let (_dir, db, vm) = db(&EXAMPLE).await;
        assert_eq!(names(&order(&db, vm, Flow::Tree)), ["leaf"]);
        let base = order(&db, vm, Flow::Base);
        for conf in &base {
            let at = |vdi: &Vdi| base.iter().position(|c| c.vdi == *vdi).unwrap();
            assert!(conf.parent.as_ref().is_none_or(|parent| at(parent) < at(&conf.vdi)), "{:?}", names(&base));
        }
        assert_eq!(base.len(), 5);
    }

    #[tokio::test]
    async fn small_volumes_travel_first() {
        let (_dir, db, vm) = db(&[("1", None, 4), ("2", Some("1"), 16), ("3", Some("1"), 8)]).await;
        assert_eq!(names(&order(&db, vm, Flow::Leaf)), ["1", "leaf", "3", "2"]);
        assert_eq!(names(&order(&db, vm, Flow::Base)), ["1", "3", "leaf", "2"]);
    }

    #[tokio::test]
    async fn the_forest_has_the_active_path_marked_and_skips_snapshots_without_the_disk() {
        let (_dir, mut db, vm) = db(&EXAMPLE).await;
        let leaf = leaves(&db, vm).remove(0);
        let show = |db: &Db| {
            fn tree(node: &Node) -> String {
                let children: Vec<String> = node.children.iter().map(tree).collect();
                format!("{}{}({})", node.conf.vdi, if node.active { "*" } else { "" }, children.join(" "))
            }
            forest(db, vm, &leaf).iter().map(tree).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(show(&db), "1*(2() 3*(4*()))");
        let third = db.snapshot_named(vm, "3").unwrap();
        db.vm_mut(third).unwrap().vbds.clear();
        assert_eq!(show(&db), "1*(2() 4*())");
        let first = db.snapshot_named(vm, "1").unwrap();
        db.vm_mut(first).unwrap().vbds.clear();
        assert_eq!(show(&db), "2() 4*()");
        assert_eq!(leaves(&db, vm)[0].parent, Some(Vdi::from("4")));
    }

    #[tokio::test]
    async fn domains_are_two_letters_or_three_and_six_digits() {
        let (_dir, db, vm) = db(&EXAMPLE).await;
        let leaf = &leaves(&db, vm)[0];
        assert!(leaf.mirror_vm.0.starts_with("MIR") && leaf.mirror_vm.0.len() == 9);
        assert_eq!(leaf.copy_vm.0, format!("CP{}", &leaf.mirror_vm.0[3..]));
        assert_eq!(leaf.dp.0, format!("vbd/{}/leaf", db.vm(vm).unwrap().uuid));
    }
}
