//! The HTTP server of a host: the destination side of the NBD proxies, and of mirrors from SMAPIv1.

use std::convert::Infallible;
use std::future::poll_fn;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::descriptor::pass;
use super::export::{ImportPath, Service, bind};
use super::{Host, lock};
use crate::smapiv2::{Dp, Sr, Vdi, Vm};

/// Starts the server; it ends with the host.
pub(super) fn serve(host: &Arc<Host>) -> Result<()> {
    let path = host.http_socket();
    let listener = bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
    let weak = Arc::downgrade(host);
    host.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Some(host) = weak.upgrade() else { return };
            let weak = Weak::clone(&weak);
            host.spawn(async move {
                if let Err(error) = connection(weak, stream).await {
                    tracing::debug!(error = format!("{error:#}"), "import proxy failed");
                }
            });
        }
    });
    Ok(())
}

async fn connection(host: Weak<Host>, stream: UnixStream) -> Result<()> {
    let taken: Arc<Mutex<Option<(Service, ImportPath)>>> = Arc::default();
    let service = {
        let (host, taken) = (Weak::clone(&host), Arc::clone(&taken));
        service_fn(move |request: Request<Incoming>| {
            let (host, taken) = (Weak::clone(&host), Arc::clone(&taken));
            // Boxed, because the connection has to be polled by reference.
            Box::pin(async move {
                match route(&host, &request) {
                    Ok(path) => {
                        *lock(&taken) = Some(path);
                        // The connection is no longer HTTP's: its answer is not written here.
                        std::future::pending::<Result<Response<Empty<Bytes>>, Infallible>>().await
                    }
                    Err(status) => {
                        let mut response = Response::new(Empty::new());
                        *response.status_mut() = status;
                        Ok(response)
                    }
                }
            })
        })
    };
    let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let finished = poll_fn(|cx| {
        let served = connection.poll_without_shutdown(cx);
        if lock(&taken).is_some() {
            return std::task::Poll::Ready(Ok(()));
        }
        served
    });
    finished.await?;
    let Some((service, path)) = lock(&taken).take() else { return Ok(()) };
    let parts = connection.into_parts();
    match service {
        Service::Proxy => import(&host, parts.io.into_inner(), &parts.read_buf, &path).await,
        Service::Import => import_activate(&host, parts.io.into_inner(), &parts.read_buf, &path).await,
    }
}

/// Which service a request asks for, or the status to refuse it with.
fn route(host: &Weak<Host>, request: &Request<Incoming>) -> Result<(Service, ImportPath), StatusCode> {
    let host = host.upgrade().ok_or(StatusCode::SERVICE_UNAVAILABLE)?;
    let services = [Service::Proxy, Service::Import];
    let mut asked = services.into_iter().filter_map(|s| Some((s, request.uri().path().strip_prefix(s.prefix())?)));
    let (service, rest) = asked.next().ok_or(StatusCode::NOT_FOUND)?;
    if request.method() != Method::PUT {
        return Err(StatusCode::METHOD_NOT_ALLOWED);
    }
    if request.uri().query() != Some(&format!("session_id={}", host.session)) {
        return Err(StatusCode::UNAUTHORIZED);
    }
    let parts: Vec<&str> = rest.split('/').collect();
    let [vm, sr, vdi, dp] = parts.as_slice() else { return Err(StatusCode::NOT_FOUND) };
    let path = ImportPath {
        vm: Vm((*vm).to_owned()),
        sr: Sr((*sr).to_owned()),
        vdi: Vdi((*vdi).to_owned()),
        dp: Dp((*dp).to_owned()),
    };
    Ok((service, path))
}

/// `import_nbd_proxy` of ocaml/xapi/storage_migrate.ml.
async fn import(host: &Weak<Host>, mut stream: UnixStream, early: &[u8], path: &ImportPath) -> Result<()> {
    let Some(host) = host.upgrade() else { bail!("the host is closing") };
    let socket = match host.data_get_nbd_server("nbd", &path.sr, &path.vdi, &path.vm).await {
        Ok(uri) => uri.socket().to_owned(),
        Err(error) => {
            stream.write_all(b"HTTP/1.1 500 Internal Error\r\nConnection: close\r\n\r\n").await?;
            return Err(error.into());
        }
    };
    drop(host);
    stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-encoding: nbd\r\n\r\n").await?;
    let mut server = UnixStream::connect(&socket).await.with_context(|| socket.display().to_string())?;
    server.write_all(early).await?;
    // An end of the file in one direction is passed on; the other goes on until it ends too.
    let _ = tokio::io::copy_bidirectional(&mut stream, &mut server).await;
    Ok(())
}

/// `nbd_handler` of ocaml/xapi/storage_migrate.ml: the plugin gets the connection itself, once the header is answered.
async fn import_activate(host: &Weak<Host>, mut stream: UnixStream, early: &[u8], path: &ImportPath) -> Result<()> {
    let Some(host) = host.upgrade() else { bail!("the host is closing") };
    let socket = match host.data_import_activate("nbd", &path.sr, &path.vdi, &path.vm).await {
        Ok(socket) => socket,
        Err(error) => {
            stream.write_all(b"HTTP/1.1 500 Internal Error\r\nConnection: close\r\n\r\n").await?;
            return Err(error.into());
        }
    };
    ensure!(early.is_empty(), "the client speaks before it was greeted");
    stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-encoding: nbd\r\n\r\n").await?;
    pass(Path::new(&socket), &stream, &path.dp.0)
}
