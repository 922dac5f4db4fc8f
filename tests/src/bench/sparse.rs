//! A large volume of which little is written, into a new one: it should cost what was written.

use anyhow::Result;

use super::mirror::{mirror_seconds, proxy};
use super::{Bar, Figure, Measured, Settings, Unit, call};
use crate::scenario::Stage;
use crate::wire::Volume;

/// The volume that the large one's time is held against.
const SMALL: u64 = 1 << 30;
/// The domain of a halted VM's disk: its mirror opens it by itself.
const NOBODY: &str = "-1";
const WRITER: &str = "MIR0be9c4";

pub(super) async fn measure(settings: &Settings, stage: &Stage, measured: &mut Measured) -> Result<()> {
    let (host, sr, scale) = (&stage.source, &stage.source_sr, &settings.scale);
    let mut volumes = Vec::new();
    for size in [scale.sparse, SMALL] {
        let volume = call::create(host, sr, size).await?;
        call::write_alone(host, &volume, spread(scale.sparse_data, size), 1).await?;
        volumes.push((volume, size));
    }
    let (mut times, mut bytes) = (vec![Vec::new(); 2], vec![Vec::new(); 2]);
    for _ in 0..scale.mirrors {
        for (index, (volume, size)) in volumes.iter().enumerate() {
            let (took, sent) = mirror(stage, volume, *size).await?;
            times[index].push(took);
            bytes[index].push(sent as f64);
        }
    }
    for (volume, _) in &volumes {
        call::destroy(host, sr, volume).await?;
    }
    let (large, data) = (crate::draw::size(scale.sparse), crate::draw::size(scale.sparse_data));
    let [time_large, time_small] = <[_; 2]>::try_from(times).unwrap_or_default();
    let [bytes_large, bytes_small] = <[_; 2]>::try_from(bytes).unwrap_or_default();
    let small = format!("{} for the one of 1 GiB", crate::draw::size(super::Samples(bytes_small).median() as u64));
    measured.add(
        Figure::new("sparse-wire", format!("{data} in {large}, on the wire"), Unit::Bytes, bytes_large)
            .against(data.clone(), vec![scale.sparse_data as f64])
            .bar(Bar::Times(1.1))
            .note(small),
    );
    measured.add(
        Figure::new("sparse-time", format!("{data} in {large}, into a new volume"), Unit::Seconds, time_large)
            .against(format!("{data} in 1 GiB"), time_small)
            .bar(Bar::Times(3.0)),
    );
    Ok(())
}

/// Pieces of a mebibyte, or of all there is, evenly over a disk.
fn spread(data: u64, size: u64) -> Vec<(u64, u64)> {
    const PIECE: u64 = 1 << 20;
    let count = (data / PIECE).max(1);
    (0..count).map(|index| (size / count * index, PIECE.min(data))).collect()
}

/// One mirror through the proxies into a new volume: its seconds, and the bytes that went to the destination.
async fn mirror(stage: &Stage, source: &Volume, size: u64) -> Result<(f64, u64)> {
    let (host, other, sr) = (&stage.source, &stage.destination, &stage.destination_sr);
    let target = call::create(other, sr, size).await?;
    let uri = call::plug(other, &target, WRITER).await?;
    let to = proxy(stage, sr, source, &target, &uri)?;
    let before = host.wires().all().len();
    let took = mirror_seconds(host, source, NOBODY, &to).await;
    let sent = host.wires().all()[before..].iter().map(|wire| wire.to_destination()).sum();
    call::unplug(other, &target, WRITER).await?;
    call::destroy(other, sr, &target).await?;
    Ok((took?, sent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_spread_over_the_whole_disk_and_have_all_the_data() {
        let pieces = spread(64 << 20, 1 << 40);
        assert_eq!(pieces.iter().map(|(_, length)| length).sum::<u64>(), 64 << 20);
        assert!(pieces.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        assert!(pieces.last().unwrap().0 > (1 << 40) / 64 * 62);
        assert_eq!(spread(1 << 19, 1 << 30), [(0, 1 << 19)]);
    }
}
