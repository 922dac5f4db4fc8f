//! Sizes that no volume can have, in every form in which JSON can write them.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::bench::{DBG, MIB};
use super::invariant::unchanged;
use super::request::valid;
use super::{Bench, Group, Need, answer};
use crate::wire::Request;

/// As they stand in the request.
const IMPOSSIBLE: &[&str] = &[
    "-1",
    "-9223372036854775808",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
    "1e400",
    "1048576.0",
    "1e9",
    "\"1048576\"",
    "null",
    "[]",
];

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("Volume.create refuses sizes that no volume can have", &[], |b| impossible(b, "Volume.create", "size"));
    group.add("Volume.resize refuses sizes that no volume can have", &[Need::Method("Volume.resize")], |b| {
        impossible(b, "Volume.resize", "new_size")
    });
    group.add("Volume.create of no bytes is refused or makes an empty or small volume", &[], nothing);
    group.add("Volume.resize to no bytes is refused", &[Need::Method("Volume.resize")], resize_to_nothing);
    group.add("a size that is too large is refused by the code for sizes", &[Need::OwnLayout], code);
    group.add("volumes of many terabytes can be made, snapshotted and destroyed", &[Need::OwnLayout], large);
}

async fn impossible(b: Arc<Bench>, method: &'static str, field: &'static str) -> Result<()> {
    let good = valid(&b, method).await?.encode();
    let before = b.everything().await?;
    let start = good.find(&format!("\"{field}\":")).context("the field is there")? + field.len() + 3;
    let length = good[start..].bytes().take_while(u8::is_ascii_digit).count();
    ensure!(length > 0, "{good} has no number as {field}");
    for size in IMPOSSIBLE {
        let text = format!("{}{size}{}", &good[..start], &good[start + length..]);
        let judged = b.raw(method, text.as_bytes()).await?.judge().with_context(|| format!("{field} {size}"))?;
        ensure!(judged.is_err(), "{field} {size} was answered with {judged:?}");
    }
    unchanged(&before, &b.everything().await?)
}

async fn nothing(b: Arc<Bench>) -> Result<()> {
    let request = Request::volume_create(DBG, &b.sr.sr, "n", "d", 0, false);
    let printed = b.raw("Volume.create", request.encode().as_bytes()).await?;
    if let Ok(json) = printed.judge()? {
        answer::decode("Volume.create", &json)?;
    }
    b.sr_is_sound().await
}

async fn resize_to_nothing(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    super::bench::refused(b.resize(&volume.key, 0).await)?;
    ensure!(b.stat(&volume.key).await? == volume, "the volume changed");
    Ok(())
}

async fn code(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    super::bench::refused_with(b.create(i64::MAX).await, "SR_BACKEND_FAILURE_79")?;
    super::bench::refused_with(b.create(-1).await, "SR_BACKEND_FAILURE_79")?;
    super::bench::refused_with(b.resize(&volume.key, i64::MAX).await, "SR_BACKEND_FAILURE_79").map(drop)
}

async fn large(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(16 << 40).await?;
    b.snapshot(&volume.key).await?;
    b.resize(&volume.key, 32 << 40).await?;
    b.clone_of(&volume.key).await?;
    let used: i64 = b.ls().await?.iter().map(|v| v.physical_utilisation).sum();
    ensure!(used < 512 * MIB, "empty volumes take {used} bytes");
    b.sr_is_sound().await
}
