//! Every recorded request of the real daemon is accepted in its very form, and answered as the daemon takes it.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::request::{self, METHODS};
use super::{Bench, Group, Need, answer};
use crate::wire::Json;

pub(super) fn checks(group: &mut Group<'_>) {
    for (number, line) in include_str!("../../golden/accepted.jsonl").lines().enumerate() {
        let text = |name: &str| {
            let value: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
            value[name].as_str().unwrap_or_default().to_owned()
        };
        let (dir, name, stdin) = (text("dir"), text("method"), text("stdin"));
        let Some(method) = METHODS.iter().copied().find(|known| **known == *name) else { continue };
        let title = format!("line {}: {name} of the {dir} plugin is answered as the daemon expects", number + 1);
        group.add(title, &[Need::Method(method)], move |bench| replay(bench, method, dir.clone(), stdin.clone()));
    }
}

async fn replay(b: Arc<Bench>, method: &'static str, dir: String, recorded: String) -> Result<()> {
    let real = request::valid(&b, method).await?;
    let real_fields = request::fields(&real)?;
    let Json::Object(mut fields) = Json::parse(recorded.as_bytes())? else {
        bail!("a recorded request is no object")
    };
    for (name, value) in &mut fields {
        let concerns_this_sr =
            ["sr", "key", "key2", "snapshot", "uri", "uuid", "configuration", "remote", "operation"];
        if concerns_this_sr.contains(&name.as_str()) {
            let found = real_fields.iter().find(|(known, _)| known == name);
            *value = found.with_context(|| format!("the recorded {method} has a field {name}"))?.1.clone();
        }
    }
    let input = Json::Object(fields).encode();
    // What stands for one name in the record stands for another here, and nothing else differs.
    ensure!(!input.contains(": ") || recorded.contains(": "), "the recorded form is not kept: {input}");
    let script = if dir == "datapath" && method == "Plugin.query" {
        let plugin = b.host.datapath_plugins.values().next().context("there is no datapath plugin")?;
        crate::script::script_path(&plugin.dir, method)?
    } else {
        b.script(method)?
    };
    let printed = super::raw::run(&script, b.host.root(), input.as_bytes(), "", "").await?;
    let json = printed.judge()?.with_context(|| format!("{input} was refused"))?;
    answer::decode(method, &json).with_context(|| format!("the answer to {input}"))?;
    if let (Some(uri), true) = (real.text("uri"), method.starts_with("Datapath.")) {
        // The recorded domain differs from the one that the bench knows of.
        for method in ["Datapath.deactivate", "Datapath.detach"] {
            for domain in ["7", "0"] {
                b.call(&crate::wire::Request::datapath(method, super::bench::DBG, uri, domain)).await?;
            }
        }
    }
    Ok(())
}
