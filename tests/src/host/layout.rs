//! The files of a host: inventory, plugin directories full of links, directories for sockets.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use uuid::Uuid;

/// The name of the executable with the volume methods.
pub const VOLUME: &str = "xapi-storage-qcow2-volume";
/// The name of the executable with the datapath methods.
pub const DATAPATH: &str = "xapi-storage-qcow2-datapath";

/// Where xapi-storage-script looks for plugins.
pub(super) const PLUGINS: &str = "usr/libexec/xapi-storage-script";

/// What packaging/install.sh puts beside the scripts.
const OBSERVER: &str = include_str!("../../../packaging/observer.py");

/// Makes the directories and the inventory, once; answers the host's uuid.
pub(super) fn prepare(root: &Path) -> Result<Uuid> {
    for dir in ["etc", "run", "var/run/nbdproxy/export"] {
        std::fs::create_dir_all(root.join(dir))?;
    }
    let path = root.join("etc/xensource-inventory");
    if let Some(uuid) = inventory(root) {
        return Ok(uuid);
    }
    write_settings(root, "{}")?;
    // What tests/older.sh says, where the plugins look first.
    if let Some(programs) = std::env::var_os("TESTED_QEMU") {
        std::fs::create_dir_all(root.join("usr/libexec"))?;
        std::os::unix::fs::symlink(programs, root.join("usr/libexec/xapi-storage-qcow2"))?;
    }
    let uuid = Uuid::new_v4();
    std::fs::write(&path, format!("PRODUCT_BRAND='XCP-ng'\nINSTALLATION_UUID='{uuid}'\n"))?;
    Ok(uuid)
}

/// Gives the host of a suite settings, a JSON object: its plugins collect garbage by themselves only if that says so or the
/// environment has `FAKE_XAPI_GC=true`, for then it depends on chance which nodes there are at a time.
///
/// # Errors
/// If the file cannot be written.
pub fn write_settings(root: &Path, settings: &str) -> Result<()> {
    let mut settings: serde_json::Map<String, serde_json::Value> = serde_json::from_str(settings)?;
    let gc = std::env::var("FAKE_XAPI_GC").is_ok_and(|value| value == "true");
    settings.entry("gc").or_insert_with(|| gc.into());
    std::fs::write(root.join("etc/xapi-storage-qcow2.json"), serde_json::to_vec(&settings)?)?;
    Ok(())
}

/// The host uuid that the inventory below a root names.
#[must_use]
pub fn inventory(root: &Path) -> Option<Uuid> {
    let text = std::fs::read_to_string(root.join("etc/xensource-inventory")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("INSTALLATION_UUID="))?;
    line.trim_matches('\'').parse().ok()
}

/// Writes a fresh boot id, which then hides the real machine's.
pub(super) fn write_boot_id(root: &Path) -> Result<()> {
    let path = root.join("proc/sys/kernel/random/boot_id");
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(path, format!("{}\n", Uuid::new_v4()))?;
    Ok(())
}

/// Makes one link a method to the two executables, each directory complete before it appears under its name.
pub(super) async fn link_plugins(root: &Path, bin_dir: &Path) -> Result<PathBuf> {
    let plugins = root.join(PLUGINS);
    link_one(&plugins.join("volume"), "org.xen.xapi.storage.qcow2", &bin_dir.join(VOLUME)).await?;
    link_one(&plugins.join("datapath"), "qsd", &bin_dir.join(DATAPATH)).await?;
    Ok(plugins)
}

async fn link_one(parent: &Path, name: &str, binary: &Path) -> Result<()> {
    let target = parent.join(name);
    if target.exists() {
        return Ok(());
    }
    let binary = std::path::absolute(binary)?;
    let output = tokio::process::Command::new(&binary)
        .arg("--list-methods")
        .stdin(Stdio::null())
        .output()
        .await
        .with_context(|| format!("cannot run {}", binary.display()))?;
    if !output.status.success() {
        bail!("{} --list-methods: {}", binary.display(), output.status);
    }
    let methods = String::from_utf8(output.stdout).context("--list-methods")?;
    std::fs::create_dir_all(parent)?;
    // Beside the parent: anything under the parent itself would be taken for a plugin.
    let aside = parent.with_extension(format!("new-{name}"));
    std::fs::create_dir(&aside)?;
    let mut count = 0;
    for method in methods.lines().map(str::trim).filter(|m| !m.is_empty()) {
        if method.contains('/') {
            bail!("{} lists a method {method:?}", binary.display());
        }
        std::os::unix::fs::symlink(&binary, aside.join(method))?;
        count += 1;
    }
    std::fs::write(aside.join("observer.py"), OBSERVER)?;
    if count == 0 {
        bail!("{} lists no method", binary.display());
    }
    std::fs::rename(&aside, &target)?;
    Ok(())
}
