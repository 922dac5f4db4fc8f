//! Every Volume method by its effects, seen through other methods.

use std::sync::Arc;

use anyhow::{Result, ensure};
use uuid::Uuid;

use super::bench::{DBG, MIB, refused, refused_with, uri_of};
use super::{Bench, Group, Need};
use crate::wire::{Request, Volume};

const SNAPSHOT: Need = Need::Method("Volume.snapshot");
const CLONE: Need = Need::Method("Volume.clone");
const RESIZE: Need = Need::Method("Volume.resize");
const SET: Need = Need::Method("Volume.set");

/// What xapi stores beside the kinds of keys that anything may be stored under.
const KEYS: &[(&str, &str)] = &[
    ("vdi-type", "user"),
    ("content_id", "6f1d"),
    ("snapshot_time", "20260101T00:00:00Z"),
    ("snapshot_of", "00000000-0000-0000-0000-000000000001"),
    ("is_a_snapshot", "false"),
    ("_sm_config_base_mirror", "a/b"),
    ("", "an empty name"),
    ("an empty value", ""),
    ("ünïcode ☃", "\" ' \\ / \n \t \u{1} \u{7f} $(x) %s"),
];

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("Volume.create answers a volume as asked, and Volume.stat and SR.ls tell the same", &[], create);
    group.add("a volume's key is its uuid, since xapi uses either as the location", &[], key_is_uuid);
    group.add("Volume.create makes at least as many bytes as asked, whatever the alignment", &[], odd_sizes);
    group.add("Volume.create stores any name and description exactly", &[], names);
    group.add("Volume.create remembers that a volume is sharable, or refuses one", &[], sharable);
    group.add("Volume.set and Volume.unset are seen in the keys of stat and ls", &[SET], set);
    group.add("Volume.set replaces a value, and Volume.unset of an absent key succeeds", &[SET], set_again);
    group.add("Volume.set of a value of a mebibyte keeps it exactly", &[SET], set_large);
    group.add("Volume.set_name and Volume.set_description are seen in stat and ls", &[], rename);
    group.add("Volume.snapshot answers a new volume and leaves the first as it was", &[SNAPSHOT], snapshot);
    group.add("Volume.snapshot of a snapshot and of a blank volume succeed", &[SNAPSHOT], snapshot_more);
    group.add("Volume.set, unset and rename work on a snapshot", &[SNAPSHOT, SET], set_on_snapshot);
    group.add("Volume.clone of a snapshot does not become a snapshot", &[SNAPSHOT, CLONE, SET], clone_keys);
    group.add("Volume.clone of a leaf answers a new volume and leaves the first as it was", &[CLONE], clone_leaf);
    group.add("Volume.resize is seen by stat and ls, and not by snapshots made before", &[RESIZE, SNAPSHOT], resize);
    group.add("Volume.resize to the same size succeeds, and to a smaller one is refused", &[RESIZE], shrink);
    group.add(
        "a snapshot and a clone have the size that the volume was resized to",
        &[RESIZE, SNAPSHOT, CLONE],
        sizes,
    );
    group.add("Volume.destroy takes a volume from SR.ls, and stat then fails", &[], destroy);
    group.add("Volume.destroy of an unknown key succeeds", &[], destroy_unknown);
    group.add("every other Volume call on an unknown key says Volume_does_not_exist", &[], unknown);
    group.add("snapshots, clones and the volume itself can be destroyed in any order", &[SNAPSHOT, CLONE], any_order);
    group.add("Volume.destroy of a volume in use by a guest is refused, and it goes on working", &[], destroy_in_use);
    group.add("a volume's uri and key do not change while it lives", &[SNAPSHOT, RESIZE], uri_is_stable);
}

async fn same_everywhere(b: &Bench, volume: &Volume) -> Result<()> {
    let stat = b.stat(&volume.key).await?;
    ensure!(stat == *volume, "{}", differences(volume, &stat, "stat tells"));
    let listed: Vec<Volume> = b.ls().await?.into_iter().filter(|v| v.key == volume.key).collect();
    ensure!(listed.len() == 1, "SR.ls has {} volumes of this key", listed.len());
    ensure!(listed == [stat], "{}", differences(volume, &listed[0], "ls has"));
    Ok(())
}

/// What is not the same, a line each.
fn differences(volume: &Volume, other: &Volume, who: &str) -> String {
    macro_rules! fields {
        ($($field:ident)*) => {
            [$((stringify!($field), format!("{:?}", volume.$field), format!("{:?}", other.$field))),*]
        };
    }
    let fields = fields! {
        key uuid name description read_write sharable virtual_size physical_utilisation uri keys volume_type cbt_enabled
    };
    let different = fields.into_iter().filter(|(_, one, other)| one != other);
    let told = different.map(|(field, one, other)| format!("{field}: answered {one}, but {who} {other}"));
    told.collect::<Vec<_>>().join("\n")
}

async fn create(b: Arc<Bench>) -> Result<()> {
    // As it was answered, whatever xapi will go by.
    let request = Request::volume_create(DBG, &b.sr.sr, "a disk", "for a check", 5 * MIB, false);
    let volume = b.volume_answer(&request).await?;
    ensure!((volume.name.as_str(), volume.description.as_str()) == ("a disk", "for a check"), "{volume:?}");
    ensure!(volume.read_write && !volume.sharable && volume.keys.is_empty(), "{volume:?}");
    ensure!(volume.virtual_size == 5 * MIB && volume.physical_utilisation >= 0, "{volume:?}");
    ensure!(volume.physical_utilisation < 5 * MIB || !b.subject.own_layout, "{volume:?} is not thin");
    same_everywhere(&b, &volume).await
}

async fn key_is_uuid(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    ensure!(volume.uuid.as_deref() == Some(&volume.key), "{volume:?}");
    ensure!(Uuid::parse_str(&volume.key).is_ok(), "{volume:?}");
    Ok(())
}

async fn odd_sizes(b: Arc<Bench>) -> Result<()> {
    for size in [1, 511, 513, 4096, MIB + 1, 3 * MIB - 512, 2 << 40] {
        let volume = b.create(size).await?;
        ensure!(volume.virtual_size >= size && volume.virtual_size < size + 4 * MIB, "{size} became {volume:?}");
        same_everywhere(&b, &volume).await?;
    }
    Ok(())
}

async fn names(b: Arc<Bench>) -> Result<()> {
    let long = "x".repeat(1 << 20);
    for name in ["", "\" ' ` $(x) ; \\", "a\nb\tc\r", "a\u{0}b", "ünïcode ☃ 𝄞", "../../etc/passwd", "%s%n{}", &long]
    {
        let request = Request::volume_create(DBG, &b.sr.sr, name, name, MIB, false);
        let volume = b.made(&request).await?;
        ensure!(volume.name == name && volume.description == name, "a name of {} bytes is changed", name.len());
        same_everywhere(&b, &volume).await?;
        b.destroy(&volume.key).await?;
    }
    Ok(())
}

async fn sharable(b: Arc<Bench>) -> Result<()> {
    let request = Request::volume_create(DBG, &b.sr.sr, "shared", "", MIB, true);
    let made = b.made(&request).await;
    if made.is_err() {
        return refused(made).map(drop);
    }
    let volume = made?;
    ensure!(volume.sharable, "{volume:?}");
    same_everywhere(&b, &volume).await
}

async fn set(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    for (k, v) in KEYS {
        b.set(&volume.key, k, v).await?;
        let stat = b.stat(&volume.key).await?;
        ensure!(stat.key_value(k) == Some(v), "{k:?} is {:?}", stat.key_value(k));
        same_everywhere(&b, &stat).await?;
    }
    ensure!(b.stat(&volume.key).await?.keys.len() == KEYS.len(), "keys were lost or added");
    for (n, (k, _)) in KEYS.iter().enumerate() {
        b.unset(&volume.key, k).await?;
        let stat = b.stat(&volume.key).await?;
        ensure!(stat.key_value(k).is_none() && stat.keys.len() == KEYS.len() - n - 1, "{:?}", stat.keys);
    }
    Ok(())
}

async fn set_again(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.unset(&volume.key, "_sm_config_base_mirror").await?;
    for v in ["one", "two", "two", ""] {
        b.set(&volume.key, "k", v).await?;
        ensure!(b.stat(&volume.key).await?.keys == [("k".to_owned(), v.to_owned())], "k is not {v:?}");
    }
    for _ in 0..2 {
        b.unset(&volume.key, "k").await?;
    }
    same_everywhere(&b, &volume).await
}

async fn set_large(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let value = "☃".repeat((1 << 20) / 3);
    b.set(&volume.key, "large", &value).await?;
    ensure!(b.stat(&volume.key).await?.key_value("large") == Some(&value), "the value is changed");
    Ok(())
}

async fn rename(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    for text in ["other", "", "a\nb \" ☃"] {
        b.call(&Request::volume_set_name(DBG, &b.sr.sr, &volume.key, text)).await?;
        let description = format!("{text}{text}");
        b.call(&Request::volume_set_description(DBG, &b.sr.sr, &volume.key, &description)).await?;
        let expected = Volume { name: text.to_owned(), description, ..b.stat(&volume.key).await? };
        same_everywhere(&b, &expected).await?;
    }
    Ok(())
}

async fn snapshot(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(3 * MIB).await?;
    b.set(&volume.key, "vdi-type", "user").await?;
    let before = b.stat(&volume.key).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    same_everywhere(&b, &snapshot).await?;
    ensure!(snapshot.key != volume.key && uri_of(&snapshot)? != uri_of(&volume)?, "{snapshot:?} is not new");
    ensure!(snapshot.virtual_size == volume.virtual_size, "{snapshot:?}");
    let after = b.stat(&volume.key).await?;
    let comparable = |v: &Volume| Volume { physical_utilisation: 0, ..v.clone() };
    ensure!(comparable(&before) == comparable(&after), "{before:?} became {after:?}");
    ensure!(b.ls().await?.len() == 2, "SR.ls has not two volumes");
    Ok(())
}

async fn snapshot_more(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let first = b.snapshot(&volume.key).await?;
    let second = b.snapshot(&first.key).await?;
    let third = b.snapshot(&volume.key).await?;
    ensure!(b.ls().await?.len() == 4, "SR.ls has not four volumes");
    for snapshot in [first, second, third] {
        same_everywhere(&b, &b.stat(&snapshot.key).await?).await?;
    }
    b.sr_is_sound().await
}

async fn set_on_snapshot(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    for (k, v) in [("is_a_snapshot", "true"), ("snapshot_of", volume.key.as_str()), ("content_id", "x")] {
        b.set(&snapshot.key, k, v).await?;
    }
    b.call(&Request::volume_set_name(DBG, &b.sr.sr, &snapshot.key, "s")).await?;
    let stat = b.stat(&snapshot.key).await?;
    ensure!(stat.snapshot() && stat.name == "s" && stat.key_value("snapshot_of") == Some(&volume.key), "{stat:?}");
    b.unset(&snapshot.key, "snapshot_of").await?;
    ensure!(b.stat(&snapshot.key).await?.key_value("snapshot_of").is_none(), "snapshot_of is still set");
    ensure!(b.stat(&volume.key).await?.keys.is_empty(), "the keys of the volume changed with its snapshot's");
    Ok(())
}

async fn clone_keys(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    for (k, v) in
        [("is_a_snapshot", "true"), ("snapshot_of", volume.key.as_str()), ("snapshot_time", "20260101T00:00:00Z")]
    {
        b.set(&snapshot.key, k, v).await?;
    }
    let clone = b.clone_of(&snapshot.key).await?;
    same_everywhere(&b, &clone).await?;
    ensure!(
        !clone.snapshot() && clone.key_value("snapshot_of").is_none(),
        "the clone says that it is a snapshot: {clone:?}"
    );
    ensure!(b.stat(&snapshot.key).await?.snapshot(), "the snapshot is none any more");
    // A snapshot of what was cloned does not inherit it either.
    let of_clone = b.snapshot(&clone.key).await?;
    ensure!(of_clone.key_value("snapshot_of").is_none(), "{of_clone:?}");
    Ok(())
}

async fn clone_leaf(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let clone = b.clone_of(&volume.key).await?;
    same_everywhere(&b, &clone).await?;
    ensure!(clone.key != volume.key && clone.virtual_size == volume.virtual_size && clone.read_write, "{clone:?}");
    let after = b.stat(&volume.key).await?;
    ensure!(after.name == volume.name && after.uri == volume.uri && after.read_write, "{after:?}");
    b.sr_is_sound().await
}

async fn resize(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(2 * MIB).await?;
    let before = b.snapshot(&volume.key).await?;
    for size in [3 * MIB, 3 * MIB + 512, 40 * MIB] {
        b.resize(&volume.key, size).await?;
        let stat = b.stat(&volume.key).await?;
        ensure!(stat.virtual_size >= size && stat.virtual_size < size + 4 * MIB, "{size} became {stat:?}");
        same_everywhere(&b, &stat).await?;
    }
    ensure!(b.stat(&before.key).await?.virtual_size == 2 * MIB, "the snapshot was resized as well");
    b.sr_is_sound().await
}

async fn shrink(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    b.resize(&volume.key, 4 * MIB).await?;
    refused(b.resize(&volume.key, 2 * MIB).await)?;
    same_everywhere(&b, &volume).await
}

async fn sizes(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(2 * MIB).await?;
    b.resize(&volume.key, 6 * MIB).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    let clone = b.clone_of(&snapshot.key).await?;
    b.resize(&clone.key, 9 * MIB).await?;
    let sizes = [b.stat(&volume.key).await?, b.stat(&snapshot.key).await?, b.stat(&clone.key).await?];
    let sizes = sizes.map(|v| v.virtual_size / MIB);
    ensure!(sizes == [6, 6, 9], "the sizes are {sizes:?} MiB");
    Ok(())
}

async fn destroy(b: Arc<Bench>) -> Result<()> {
    let (one, other) = (b.create(MIB).await?, b.create(MIB).await?);
    b.destroy(&one.key).await?;
    ensure!(b.ls().await? == [other], "SR.ls has not just the other");
    refused_with(b.stat(&one.key).await, "Volume_does_not_exist").map(drop)
}

async fn destroy_unknown(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.destroy(&Uuid::new_v4().to_string()).await?;
    ensure!(b.ls().await? == [volume], "something else was destroyed");
    Ok(())
}

async fn unknown(b: Arc<Bench>) -> Result<()> {
    let (sr, key) = (&b.sr.sr, &Uuid::new_v4().to_string());
    let requests = [
        Request::volume("Volume.stat", DBG, sr, key),
        Request::volume("Volume.snapshot", DBG, sr, key),
        Request::volume("Volume.clone", DBG, sr, key),
        Request::volume_resize(DBG, sr, key, MIB),
        Request::volume_set(DBG, sr, key, "k", "v"),
        Request::volume_unset(DBG, sr, key, "k"),
        Request::volume_set_name(DBG, sr, key, "n"),
        Request::volume_set_description(DBG, sr, key, "n"),
    ];
    for request in requests {
        if b.script(request.method).is_ok() {
            let failure = refused_with(b.call(&request).await, "Volume_does_not_exist")?;
            ensure!(failure.params == [key.as_str()], "{}: {failure}", request.method);
        }
    }
    ensure!(b.ls().await?.is_empty(), "a volume came into being");
    Ok(())
}

async fn any_order(b: Arc<Bench>) -> Result<()> {
    // Each order is a choice of which of the volumes that are left goes next.
    for order in [[0, 0, 0, 0, 0], [4, 3, 2, 1, 0], [1, 0, 2, 1, 0], [3, 0, 1, 1, 0], [2, 2, 0, 1, 0]] {
        let leaf = b.create(MIB).await?;
        let first = b.snapshot(&leaf.key).await?;
        let second = b.snapshot(&leaf.key).await?;
        let of_first = b.clone_of(&first.key).await?;
        let of_leaf = b.clone_of(&leaf.key).await?;
        let mut left = vec![leaf.key, first.key, second.key, of_first.key, of_leaf.key];
        for next in order {
            b.destroy(&left.remove(next)).await?;
            let mut listed: Vec<String> = b.ls().await?.into_iter().map(|v| v.key).collect();
            let mut expected = left.clone();
            listed.sort();
            expected.sort();
            ensure!(listed == expected, "order {order:?}: SR.ls has {listed:?}, not {expected:?}");
            b.sr_is_sound().await?;
        }
    }
    Ok(())
}

async fn destroy_in_use(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let uri = b.plug(&volume, "7").await?;
    let client = crate::nbd::Client::connect(&uri).await?;
    refused_with(b.destroy(&volume.key).await, "SR_BACKEND_FAILURE_24")?;
    client.write(0, bytes::Bytes::from_static(&[1; 512])).await?;
    client.flush().await?;
    client.disconnect().await;
    refused_with(b.destroy(&volume.key).await, "SR_BACKEND_FAILURE_24")?;
    b.unplug(&volume, "7").await?;
    b.expect_content(&volume, &[(0, 512, 1)]).await?;
    b.destroy(&volume.key).await
}

async fn uri_is_stable(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    b.resize(&volume.key, 2 * MIB).await?;
    b.call(&Request::volume_set_name(DBG, &b.sr.sr, &volume.key, "n")).await?;
    b.write(&volume, 0, 512, 1).await?;
    b.destroy(&snapshot.key).await?;
    let after = b.stat(&volume.key).await?;
    ensure!((&after.uri, &after.key, &after.uuid) == (&volume.uri, &volume.key, &volume.uuid), "{after:?}");
    ensure!(volume.uri.len() == 1, "several uris: {volume:?}");
    Ok(())
}
