//! Migrations that nothing disturbs.

use fake_xapi::sxm::Quiet;
use fake_xapi::sxm::v1::Disk;

use crate::world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_arrives_with_every_byte_that_its_guest_wrote() {
    let mut world = World::empty().await.unwrap();
    let path = world.disk.path().to_owned();
    world.disk = Disk::create(&path, 4 << 20).unwrap();
    (world.writes, world.rests) = (60, false);
    world.go_on().await;
    let import = world.import();
    let migrated = world.migrate(&import, &Quiet).await.unwrap();
    world.arrived(&import, migrated).await.unwrap();
    world.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_nobody_writes_to_arrives() {
    let world = World::empty().await.unwrap();
    let import = world.import();
    let migrated = world.migrate(&import, &Quiet).await.unwrap();
    world.arrived(&import, migrated).await.unwrap();
    world.close().await.unwrap();
}
