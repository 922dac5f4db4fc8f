//! Requests that no xapi sends: each is refused with a well-formed error, and nothing has changed after it.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::bench::{DBG, MIB, refused, uri_of};
use super::invariant::unchanged;
use super::request::{self, METHODS};
use super::{Bench, Group, Need, answer};
use crate::wire::{Attached, Failure, Json, Request};

/// Methods for which a name that nothing has is no reason to fail.
const SUCCEED_FOR_NOTHING: &[&str] = &[
    "SR.probe",
    "SR.detach",
    "SR.destroy",
    "Volume.destroy",
    "Datapath.open",
    "Datapath.deactivate",
    "Datapath.detach",
    "Datapath.close",
    "Data.stat",
    "Data.cancel",
    "Data.destroy",
];

/// Fields that name something; anything else is free text.
const NAMES: &[&str] = &["sr", "key", "key2", "snapshot", "uri", "uuid"];

pub(super) fn checks(group: &mut Group<'_>) {
    for method in METHODS.iter().copied() {
        let needs = [Need::Method(method)];
        group.add(format!("{method} refuses what is not one JSON object"), &needs, move |b| not_json(b, method));
        group.add(format!("{method} ignores fields that it does not know"), &needs, move |b| {
            unknown_fields(b, method)
        });
        if ["Plugin.query", "Plugin.diagnostics", "Plugin.ls", "Data.ls"].contains(&method) {
            continue;
        }
        group
            .add(format!("{method} refuses missing, null and mistyped fields"), &needs, move |b| mistyped(b, method));
        group.add(format!("{method} keeps strange names from doing harm"), &needs, move |b| strange(b, method));
    }
    group.add("domains with slashes, dots and colons stay names", &[], domains);
    group.add("a remote that is no NBD URI is refused by Data.mirror", &[Need::Method("Data.mirror")], remotes);
    group.add("a device-config without or with a wrong uri is refused", &[Need::OwnLayout], configurations);
    group.add("dbg may be any text", &[], dbg);
}

async fn not_json(b: Arc<Bench>, method: &'static str) -> Result<()> {
    let good = request::valid(&b, method).await?.encode();
    let before = b.everything().await?;
    let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
    let deep_field = format!("{{\"x\":{deep},{}", &good[1..]);
    let twice = format!("{good}{good}");
    let twice_line = format!("{good}\n{good}");
    let mut not_utf8 = good.clone().into_bytes();
    let inside = good.find("conformance").context("dbg is there")?;
    not_utf8[inside] = 0xff;
    let mut lone_surrogate = good.clone();
    lone_surrogate.replace_range(inside..=inside, "\\ud800");
    let mut raw_control = good.clone();
    raw_control.replace_range(inside..=inside, "\u{1}");
    let texts: [&[u8]; 16] = [
        b"",
        b" ",
        b"null",
        b"[]",
        b"\"x\"",
        b"1",
        b"{",
        b"}",
        b"{\"dbg\":}",
        b"\0",
        &good.as_bytes()[..good.len() - 1],
        deep.as_bytes(),
        twice.as_bytes(),
        twice_line.as_bytes(),
        &not_utf8,
        raw_control.as_bytes(),
    ];
    for text in texts {
        let start = String::from_utf8_lossy(&text[..text.len().min(80)]).into_owned();
        let judged = b.raw(method, text).await?.judge().with_context(|| format!("{start:?}"))?;
        ensure!(judged.is_err(), "{start:?} was answered with {judged:?}");
    }
    unchanged(&before, &b.everything().await?)?;
    // Deep nesting in a field that nobody reads, and half of a surrogate pair, may be refused or overlooked.
    for text in [deep_field, lone_surrogate] {
        let judged = b.raw(method, text.as_bytes()).await?.judge()?;
        if let Ok(json) = judged {
            answer::decode(method, &json)?;
            return Ok(());
        }
    }
    Ok(())
}

async fn unknown_fields(b: Arc<Bench>, method: &'static str) -> Result<()> {
    let mut fields = request::fields(&request::valid(&b, method).await?)?;
    fields.insert(0, ("zz_unknown".to_owned(), Json::Object(vec![("a".to_owned(), Json::Null)])));
    fields.push(("image_format".to_owned(), Json::from("qcow2")));
    let judged = b.raw(method, Json::Object(fields).encode().as_bytes()).await?.judge()?;
    let json = judged.context("with fields that a later xapi may send")?;
    answer::decode(method, &json)?;
    Ok(())
}

async fn mistyped(b: Arc<Bench>, method: &'static str) -> Result<()> {
    let good = request::fields(&request::valid(&b, method).await?)?;
    let before = b.everything().await?;
    for (at, (name, value)) in good.iter().enumerate() {
        if name == "dbg" {
            continue;
        }
        let mut less = good.clone();
        less.remove(at);
        // xapi leaves optional fields out, and these have a default.
        let optional = ["offset", "length", "persistent", "sharable"].contains(&name.as_str());
        if !optional {
            refuses(&b, method, &Json::Object(less).encode()).await.with_context(|| format!("without {name}"))?;
        }
        let others = [
            Json::Null,
            Json::Bool(true),
            Json::Int(7),
            Json::Float(1.5),
            Json::from("text"),
            Json::Array(vec![]),
            Json::Array(vec![Json::from("MirrorV1")]),
            Json::Array(vec![Json::from("NoSuchTag"), Json::from("x")]),
            Json::Object(vec![]),
            Json::Object(vec![("uri".to_owned(), Json::Int(1))]),
        ];
        for other in others.into_iter().filter(|other| kind(other) != kind(value)) {
            // Tags and values of the right JSON type, which are wrong otherwise.
            let mut changed = good.clone();
            changed[at].1 = other.clone();
            let text = Json::Object(changed).encode();
            refuses(&b, method, &text).await.with_context(|| format!("{name} is {}", other.encode()))?;
        }
    }
    unchanged(&before, &b.everything().await?)
}

fn kind(value: &Json) -> u8 {
    match value {
        Json::Null => 0,
        Json::Bool(_) => 1,
        Json::Int(_) => 2,
        Json::Float(_) => 3,
        Json::String(_) => 4,
        Json::Array(_) => 5,
        Json::Object(_) => 6,
    }
}

/// Sees that a request is refused in a well-formed way.
async fn refuses(b: &Bench, method: &str, text: &str) -> Result<Failure> {
    match b.raw(method, text.as_bytes()).await?.judge()? {
        Err(failure) => {
            let length: usize = failure.params.iter().map(String::len).sum();
            ensure!(length < 64 << 10, "the error repeats {length} bytes of the request");
            Ok(failure)
        }
        Ok(json) => anyhow::bail!("it was answered with {}", json.encode()),
    }
}

async fn strange(b: Arc<Bench>, method: &'static str) -> Result<()> {
    let good = request::fields(&request::valid(&b, method).await?)?;
    let before = b.everything().await?;
    let long = "x".repeat(1 << 20);
    for (at, (name, value)) in good.iter().enumerate() {
        let Json::String(real) = value else { continue };
        if !NAMES.contains(&name.as_str()) {
            continue;
        }
        let (above, dotted) = (format!("../{real}"), format!("{real}/.."));
        let (ended, upper) = (format!("{real}\0"), real.to_uppercase());
        let bytes = format!("{real}\n");
        let names: [&str; 16] = [
            "",
            ".",
            "..",
            "/",
            "../../../../../../etc/passwd",
            "/etc/passwd",
            "$(touch /tmp/x);`x`",
            "\" ' \\",
            "a\nb",
            "\u{0}",
            &above,
            &dotted,
            &ended,
            &bytes,
            &long,
            "nosuchscheme://host/path",
        ];
        for strange in names.into_iter().chain((upper != *real).then_some(upper.as_str())) {
            let mut changed = good.clone();
            changed[at].1 = Json::from(strange);
            let text = Json::Object(changed).encode();
            let shown: String = strange.chars().take(60).collect();
            let judged =
                b.raw(method, text.as_bytes()).await?.judge().with_context(|| format!("{name} {shown:?}"))?;
            match judged {
                Err(failure) => {
                    let length: usize = failure.params.iter().map(String::len).sum();
                    ensure!(length < 64 << 10, "the error repeats {length} bytes of the request");
                }
                Ok(json) => {
                    ensure!(
                        SUCCEED_FOR_NOTHING.contains(&method),
                        "{name} {shown:?} was answered with {}",
                        json.encode()
                    );
                    answer::decode(method, &json)?;
                }
            }
        }
    }
    unchanged(&before, &b.everything().await?)
}

async fn domains(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let answer = b.attach(&volume, "7").await?;
    b.unplug(&volume, "7").await?;
    let outside = b.everything().await?;
    let long = "d".repeat(1 << 20);
    for domain in ["../../../x", "a/b", "a:b", "..", "/", "-1", "u0_x", "$(x)", "", "a b", "a\nb", "a\0b", "☃", &long]
    {
        let request = |method| Request::datapath(method, DBG, uri_of(&volume).unwrap_or_default(), domain);
        let shown: String = domain.chars().take(40).collect();
        match b.call(&request("Datapath.attach")).await {
            Err(error) => {
                refused::<()>(Err(error)).with_context(|| format!("attach for {shown:?}"))?;
            }
            Ok(json) => {
                ensure!(Attached::decode(&json)? == answer, "the export depends on the domain {shown:?}");
                for method in ["Datapath.activate", "Datapath.deactivate", "Datapath.detach"] {
                    b.call(&request(method)).await.with_context(|| format!("{method} for {shown:?}"))?;
                }
            }
        }
        unchanged(&outside, &b.everything().await?).with_context(|| format!("domain {shown:?}"))?;
    }
    Ok(())
}

async fn remotes(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.attach(&volume, "u0_mirror").await?;
    let before = b.everything().await?;
    for remote in [
        "",
        "x",
        "http://host/path",
        "file:///etc/passwd",
        "nbd+unix:///x",
        "nbd+unix:///x?socket=",
        "nbd+unix:///x?socket=relative",
        "nbd+unix:///x?socket=/a%zz",
        "nbd+unix:///?socket=/tmp/nothing\0",
        "json:{\"driver\":\"file\"}",
    ] {
        let refusal = refused(b.mirror(&volume, "-1", remote).await);
        refusal.with_context(|| format!("remote {remote:?}"))?;
    }
    unchanged(&before, &b.everything().await?)
}

async fn configurations(b: Arc<Bench>) -> Result<()> {
    let before = b.everything().await?;
    let missing = b.directory().join("missing").display().to_string();
    let uuid = uuid::Uuid::new_v4().to_string();
    let with = |uri: &str| vec![("uri".to_owned(), uri.to_owned())];
    for (config, code) in [
        (vec![], Some("SR_BACKEND_FAILURE_90")),
        (vec![("url".to_owned(), "file:///tmp".to_owned())], Some("SR_BACKEND_FAILURE_90")),
        (with(""), None),
        (with("file://"), None),
        (with("file://relative/path"), None),
        (with("/tmp"), None),
        (with("http://host/path"), None),
        (with(&format!("file://{missing}")), None),
        (with("file:///etc/passwd"), None),
        (with("file:///dev/null"), None),
        (with("file:///tmp/%00x"), None),
        (with(&format!("file:///{}", "x".repeat(1 << 20))), None),
    ] {
        let shown: String = format!("{config:?}").chars().take(80).collect();
        for request in [Request::sr_create(DBG, &uuid, &config, "n", "d"), Request::sr_attach(DBG, &config)] {
            let failure = refused(b.call(&request).await).with_context(|| format!("{} {shown}", request.method))?;
            if let Some(code) = code {
                ensure!(failure.code == code, "{} {shown}: {failure}", request.method);
            }
        }
        if let Err(error) = b.call(&Request::sr_probe(DBG, &config)).await {
            refused::<()>(Err(error)).with_context(|| format!("SR.probe {shown}"))?;
        }
    }
    unchanged(&before, &b.everything().await?)
}

async fn dbg(b: Arc<Bench>) -> Result<()> {
    for dbg in ["", "\0", "\n\n", "ü☃", "{\"a\":1}", &"x".repeat(1 << 20)] {
        b.call(&Request::sr("SR.stat", dbg, &b.sr.sr)).await?;
        b.call(&Request::query(dbg)).await?;
    }
    Ok(())
}
