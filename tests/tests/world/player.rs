//! The guest of a world, moved along with the VM, and what a test wants done at moments of a migration.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fake_xapi::db::ActiveDisk;
use fake_xapi::guest::{Account, Guest, Ledger, Settings};
use fake_xapi::nbd::Uri;
use fake_xapi::plan::Extent;
use fake_xapi::sxm::{Event, Observer};

/// How long the guest may take to get a few records written.
const PATIENCE: Duration = Duration::from_secs(20);

type Hook = Box<dyn Fn(&Event) + Send + Sync>;

/// The guest, and the hook.
pub struct Player {
    guest: tokio::sync::Mutex<Guest>,
    uri: Mutex<Option<Uri>>,
    hook: Mutex<Option<Hook>>,
}

impl Player {
    /// A guest of the last quarter of a disk, which writes a few hundred records a second.
    pub fn new(size: u64) -> Result<Self> {
        let length = size / 4 / 4096 * 4096;
        let region = Extent { offset: size / 4096 * 4096 - length, length };
        let settings =
            Settings { writes_per_second: Some(300), depth: 4, flush_every: 20, ..Settings::new(region, 7) };
        Ok(Self {
            guest: tokio::sync::Mutex::new(Guest::new(settings)?),
            uri: Mutex::default(),
            hook: Mutex::default(),
        })
    }

    /// Has something done at every event from now on.
    pub fn at(&self, hook: impl Fn(&Event) + Send + Sync + 'static) {
        *self.hook.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(hook));
    }

    /// Has nothing done any more.
    pub fn at_nothing(&self) {
        *self.hook.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub async fn start(&self, disks: &[ActiveDisk]) -> Result<()> {
        *self.uri.lock().unwrap_or_else(PoisonError::into_inner) = Some(disks[0].uri.clone());
        self.guest.lock().await.start(&disks[0].uri).await
    }

    /// Goes on at the same disk.
    pub async fn go_on(&self) -> Result<()> {
        let uri = self.uri();
        self.guest.lock().await.start(&uri).await
    }

    pub async fn suspend_guest(&self) {
        self.guest.lock().await.suspend().await;
    }

    pub async fn crash(&self) {
        self.guest.lock().await.crash().await;
    }

    /// Where the disk is.
    pub fn uri(&self) -> Uri {
        self.uri.lock().unwrap_or_else(PoisonError::into_inner).clone().expect("the guest was started")
    }

    pub async fn ledger(&self) -> Ledger {
        self.guest.lock().await.ledger()
    }

    pub async fn account(&self) -> Account {
        self.guest.lock().await.account()
    }

    /// Waits until the guest has got so many more records written.
    pub async fn writes(&self, records: u64) -> Result<()> {
        let guest = self.guest.lock().await;
        let wanted = guest.acknowledged() + records;
        let deadline = Instant::now() + PATIENCE;
        while guest.acknowledged() < wanted {
            ensure!(guest.is_writing(), "the guest has stopped: {:?}", guest.account().errors);
            ensure!(Instant::now() < deadline, "the guest gets nothing written");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
}

impl Observer for Player {
    fn event(&self, event: &Event) {
        if let Some(hook) = &*self.hook.lock().unwrap_or_else(PoisonError::into_inner) {
            hook(event);
        }
    }

    fn suspend(&self) -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>> {
        Box::pin(async {
            self.suspend_guest().await;
            Ok(())
        })
    }

    fn resume(&self, disks: Vec<ActiveDisk>) -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>> {
        Box::pin(async move { self.start(&disks).await })
    }
}
