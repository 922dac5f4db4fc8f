//! What scripts leave running, and in what circumstances they still work.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::bench::{Bench, DBG, MIB, leftovers, uri_of};
use super::request::{self, METHODS, remote_of};
use super::{Group, Need, answer, raw};
use crate::nbd::Client;
use crate::script::stray_descriptors;
use crate::wire::{Request, Volume};

const MIRROR: Need = Need::Method("Data.mirror");
const OWN: Need = Need::OwnLayout;

pub(super) fn checks(group: &mut Group<'_>) {
    group.add(
        "what scripts leave running holds no descriptor of theirs, nor a terminal",
        &[OWN, MIRROR],
        descriptors,
    );
    group.add("what scripts leave running is gone when the last datapath is", &[OWN, MIRROR], gone);
    group.add("with umask 0 nothing can be read or entered by others", &[OWN, MIRROR], umask);
    group.add("every script works with a closed stderr", &[], |b| everywhere(b, "", "2>&-"));
    group.add("every script works with 64 descriptors at most", &[], |b| everywhere(b, "ulimit -n 64;", ""));
    group.add("every script works in a strange locale", &[], |b| {
        everywhere(b, "export LC_ALL=tr_TR.UTF-8 LANG=zz LC_NUMERIC=de_DE.UTF-8;", "")
    });
    group.add("every script works without HOME and other variables", &[], |b| {
        // The PATH is what systemd gives a service; this project's looks nothing up by it.
        let prelude = if b.subject.own_layout {
            "unset PATH HOME USER SHELL PWD TMPDIR;"
        } else {
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin; unset HOME USER SHELL PWD TMPDIR;"
        };
        everywhere(b, prelude, "")
    });
    group.add("every script works with SIGCHLD ignored and with signals blocked by nobody", &[], |b| {
        everywhere(b, "trap '' CHLD HUP;", "")
    });
    group.add("every script refuses a closed stdin with a well-formed error", &[], closed_stdin);
    group.add(
        "a full runtime directory gives an error, and works again when there is space",
        &[OWN, Need::Root],
        full_run,
    );
}

/// A volume under a guest's client with a running mirror: everything that can be left running.
async fn all_running(b: &Bench) -> Result<(Client, Volume)> {
    let (volume, target) = (b.create(4 * MIB).await?, b.create(4 * MIB).await?);
    let client = Client::connect(&b.plug(&volume, "5").await?).await?;
    let remote = remote_of(&b.plug(&target, "MIR0a1b2c").await?);
    let operation = b.mirror(&volume, "5", &remote).await?;
    super::mirror::completed(&b.data_wait(&operation).await?)?;
    Ok((client, volume))
}

async fn descriptors(b: Arc<Bench>) -> Result<()> {
    let (client, _) = all_running(&b).await?;
    let running = b.host.leftovers().processes;
    ensure!(running.len() >= 2, "two volumes are active, and there are just {running:?}");
    for (pid, command) in &running {
        let stray = stray_descriptors(*pid);
        ensure!(stray.is_empty(), "{command} holds the caller's descriptors {stray:?}");
        for fd in 0..3 {
            let to = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
            let to = to.to_string_lossy().into_owned();
            ensure!(!to.starts_with("pipe:") && !to.starts_with("/dev/pts"), "{command} has {to} as descriptor {fd}");
        }
        let directory = std::fs::read_link(format!("/proc/{pid}/cwd"))?;
        ensure!(directory == Path::new("/"), "{command} stays in {}", directory.display());
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let parent = status.lines().find_map(|l| l.strip_prefix("PPid:")).map(str::trim).unwrap_or_default();
        ensure!(parent != std::process::id().to_string(), "{command} is a child of the caller");
    }
    client.disconnect().await;
    Ok(())
}

async fn gone(b: Arc<Bench>) -> Result<()> {
    let (client, volume) = all_running(&b).await?;
    client.disconnect().await;
    b.unplug(&volume, "5").await?;
    for target in b.ls().await? {
        b.unplug(&target, "MIR0a1b2c").await?;
    }
    let left = leftovers(&b.host).await;
    ensure!(left.processes.is_empty() && left.sockets.is_empty(), "{left:?}");
    Ok(())
}

fn open_to_others(dir: &Path, found: &mut Vec<String>) -> Result<()> {
    let mode = std::fs::symlink_metadata(dir)?.permissions().mode();
    if mode & 0o077 != 0 {
        found.push(format!("{} {:o}", dir.display(), mode & 0o7777));
    }
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_to_others(&entry.path(), found)?;
        } else if !entry.file_type()?.is_symlink() && entry.metadata()?.permissions().mode() & 0o077 != 0 {
            found.push(format!("{} {:o}", entry.path().display(), entry.metadata()?.permissions().mode() & 0o7777));
        }
    }
    Ok(())
}

/// Calls a method with a prelude and decodes its answer.
async fn in_circumstances(b: &Bench, request: &Request, prelude: &str, redirect: &str) -> Result<()> {
    let script = b.script(request.method)?;
    let printed = raw::run(&script, b.host.root(), request.encode().as_bytes(), prelude, redirect).await?;
    let json = printed.judge()?.with_context(|| request.method.to_owned())?;
    answer::decode(request.method, &json).with_context(|| request.method.to_owned())
}

async fn umask(b: Arc<Bench>) -> Result<()> {
    // The SR itself was attached before: its record may stand there already, in a directory that was made then.
    b.call(&Request::sr("SR.detach", DBG, &b.sr.sr)).await?;
    let _ = std::fs::remove_dir_all(b.host.runtime_dir());
    in_circumstances(&b, &Request::sr_attach(DBG, &b.sr.config), "umask 0;", "").await?;
    let (volume, target) = (b.create(4 * MIB).await?, b.create(4 * MIB).await?);
    for (volume, domain) in [(&volume, "5"), (&target, "MIR0a1b2c")] {
        for method in ["Datapath.attach", "Datapath.activate"] {
            in_circumstances(&b, &Request::datapath(method, DBG, uri_of(volume)?, domain), "umask 0;", "").await?;
        }
    }
    let remote = remote_of(&super::bench::nbd_of(&b.attach(&target, "MIR0a1b2c").await?)?);
    in_circumstances(&b, &Request::data_mirror(DBG, uri_of(&volume)?, "5", &remote), "umask 0;", "").await?;
    in_circumstances(&b, &Request::volume("Volume.snapshot", DBG, &b.sr.sr, &target.key), "umask 0;", "").await?;
    let create = Request::volume_create(DBG, &b.sr.sr, "n", "d", MIB, false);
    in_circumstances(&b, &create, "umask 0;", "").await?;
    let mut found = Vec::new();
    open_to_others(&b.host.runtime_dir(), &mut found)?;
    // Files of an SR are behind directories that only their owner may enter.
    for name in ["trees", "volumes"] {
        let mode = std::fs::metadata(b.sr.path.join(name))?.permissions().mode();
        if mode & 0o077 != 0 {
            found.push(format!("{name} of the SR {:o}", mode & 0o7777));
        }
    }
    ensure!(found.is_empty(), "open to others: {found:?}");
    b.unplug(&volume, "5").await?;
    b.unplug(&target, "MIR0a1b2c").await
}

async fn everywhere(b: Arc<Bench>, prelude: &'static str, redirect: &'static str) -> Result<()> {
    for method in METHODS.iter().copied() {
        if b.script(method).is_err() {
            continue;
        }
        let request = request::valid(&b, method).await?;
        in_circumstances(&b, &request, prelude, redirect).await?;
    }
    // What was started so serves as usual.
    let volume = b.create(MIB).await?;
    for method in ["Datapath.attach", "Datapath.activate"] {
        in_circumstances(&b, &Request::datapath(method, DBG, uri_of(&volume)?, "7"), prelude, redirect).await?;
    }
    b.write(&volume, 0, 4096, 1).await?;
    b.expect_content(&volume, &[(0, 4096, 1)]).await
}

async fn closed_stdin(b: Arc<Bench>) -> Result<()> {
    for method in METHODS.iter().copied() {
        let Ok(script) = b.script(method) else { continue };
        let printed = raw::run(&script, b.host.root(), b"", "", "<&-").await?;
        let judged = printed.judge().with_context(|| method.to_owned())?;
        ensure!(judged.is_err(), "{method} answered {judged:?} to nothing");
    }
    Ok(())
}

/// A small file system, unmounted with this value.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(at: &Path, size: &str) -> Result<Self> {
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size},mode=0700"), "conformance"])
            .arg(at)
            .output()?;
        ensure!(mount.status.success(), "mount: {}", String::from_utf8_lossy(&mount.stderr));
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

async fn full_run(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.write(&volume, 0, 4096, 1).await?;
    let run = b.host.runtime_dir();
    let mounted = Mounted::tmpfs(&run, "64k")?;
    let filler = run.join("filler");
    // The records of attached SRs are below the mount now, so the SR is attached once more.
    b.attach_sr(&b.sr.config).await?;
    let mut full = std::fs::File::create(&filler)?;
    while std::io::Write::write(&mut full, &[1; 4096]).is_ok() {}
    drop(full);
    let mut refusals = 0;
    for _ in 0..2 {
        for method in ["Datapath.attach", "Datapath.activate"] {
            if let Err(error) = b.call(&Request::datapath(method, DBG, uri_of(&volume)?, "7")).await {
                let failure = super::bench::refused::<()>(Err(error)).context(method)?;
                refusals += 1;
                ensure!(failure.code.contains("44") || !failure.params.is_empty(), "{failure} says nothing");
            }
        }
        for method in ["Datapath.deactivate", "Datapath.detach"] {
            if let Err(error) = b.call(&Request::datapath(method, DBG, uri_of(&volume)?, "7")).await {
                super::bench::refused::<()>(Err(error)).context(method)?;
            }
        }
    }
    ensure!(refusals > 0, "the directory was not full");
    ensure!(b.ls().await?.len() == 1, "SR.ls changed");
    std::fs::remove_file(&filler)?;
    b.expect_content(&volume, &[(0, 4096, 1)]).await?;
    let left = leftovers(&b.host).await;
    ensure!(left.is_empty(), "{left:?}");
    drop(mounted);
    b.attach_sr(&b.sr.config).await.map(drop)
}
