//! The source side of an NBD proxy: one connection from the plugin, one PUT to the destination, raw bytes after it.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::{Host, lock};
use crate::smapiv2::{Dp, Sr, Vdi, Vm};

/// What a PUT asks the destination for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Service {
    /// A connection to the volume's NBD server.
    Proxy,
    /// That the volume's import takes the connection over.
    Import,
}

impl Service {
    /// What its path begins with.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Proxy => "/services/SM/nbdproxy/import/",
            Self::Import => "/services/SM/nbd/",
        }
    }

    fn user_agent(self) -> &'static str {
        match self {
            Self::Proxy => "export_nbd_proxy",
            Self::Import => "smapiv2",
        }
    }
}

/// The destination of a proxy, as the path of the PUT spells it.
#[derive(Debug, Clone)]
pub struct ImportPath {
    /// The domain that the destination volume is attached for.
    pub vm: Vm,
    /// The destination SR.
    pub sr: Sr,
    /// The destination volume.
    pub vdi: Vdi,
    /// The destination datapath.
    pub dp: Dp,
}

impl Host {
    /// Where the plugin finds the proxy of a domain.
    #[must_use]
    pub fn export_socket(&self, vm: &Vm) -> PathBuf {
        self.root().join("var/run/nbdproxy/export").join(&vm.0)
    }

    /// Binds the socket of a proxy as ocaml/xapi/fecomms.ml does: an old one is unlinked, five may queue.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn bind_export(&self, vm: &Vm) -> Result<UnixListener> {
        let path = self.export_socket(vm);
        bind(&path).with_context(|| format!("cannot listen at {}", path.display()))
    }

    /// Begins a proxy whose socket is to appear later: nothing can be reached under its name until then.
    ///
    /// In xapi the old socket stays until the new one is bound, so that a plugin that is very quick may reach the
    /// proxy of an earlier attempt; no plugin could do anything about that.
    pub(crate) fn claim_export(&self, vm: &Vm) -> u64 {
        let mut claims = lock(&self.export_claims);
        let claim = claims.entry(vm.clone()).or_default();
        *claim += 1;
        let _ = std::fs::remove_file(self.export_socket(vm));
        *claim
    }

    /// Binds a claimed proxy, unless another attempt has claimed it since.
    pub(crate) fn bind_claimed(&self, vm: &Vm, claim: u64) -> Result<Option<UnixListener>> {
        let claims = lock(&self.export_claims);
        if claims.get(vm) == Some(&claim) { self.bind_export(vm).map(Some) } else { Ok(None) }
    }

    /// Opens a connection at whose other end the import of a volume is, for a tapdisk of this host.
    ///
    /// # Errors
    /// The destination refuses.
    pub async fn connect_import(&self, destination: &Self, path: &ImportPath) -> Result<UnixStream> {
        put(destination, Service::Import, path).await
    }

    /// Serves one connection of a bound proxy: accepts it, asks the destination, pumps.
    pub fn run_export(
        self: &Arc<Self>,
        listener: UnixListener,
        source: Vdi,
        destination: &Arc<Self>,
        path: ImportPath,
    ) {
        let (host, destination) = (Arc::clone(self), Arc::clone(destination));
        self.spawn(async move {
            if let Err(error) = serve(&host, &listener, &source, &destination, &path).await {
                tracing::debug!(vm = %path.vm.0, error = format!("{error:#}"), "export proxy failed");
            }
            // Only now: who connects meanwhile waits in the queue, as at the real one.
            drop(listener);
        });
    }
}

async fn serve(
    host: &Arc<Host>,
    listener: &UnixListener,
    source: &Vdi,
    destination: &Arc<Host>,
    path: &ImportPath,
) -> Result<()> {
    let (near, _) = listener.accept().await.context("accept")?;
    let far = match put(destination, Service::Proxy, path).await {
        Ok(far) => far,
        Err(error) => {
            // ocaml/xapi/storage_smapiv3_migrate.ml closes the listener and not this connection when the
            // request fails: the plugin is left with a peer that never says anything.
            lock(&host.forgotten).push(near);
            return Err(error);
        }
    };
    host.wires().pump(&path.vm.0, &source.0, &path.vdi.0, near, far).await;
    Ok(())
}

/// Sends the PUT and leaves the connection where the raw bytes begin.
async fn put(destination: &Host, service: Service, path: &ImportPath) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(destination.http_socket()).await.context("connect")?;
    let request = format!(
        "PUT {}{}/{}/{}/{}?session_id={} HTTP/1.0\r\nuser-agent: {}\r\n\r\n",
        service.prefix(),
        path.vm.0,
        path.sr.0,
        path.vdi.0,
        path.dp.0,
        destination.session,
        service.user_agent()
    );
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > 8192 {
            bail!("endless answer");
        }
        head.push(stream.read_u8().await.context("no answer")?);
    }
    let head = String::from_utf8_lossy(&head);
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    if status != "200" {
        bail!("the destination answered {status}");
    }
    Ok(stream)
}

/// Binds a unix socket that others may reach, with a queue of five.
pub(super) fn bind(path: &Path) -> Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, 5)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
    Ok(UnixListener::from_std(socket.into())?)
}
