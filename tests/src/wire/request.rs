//! The requests, each with its parameters in the order in which the interface declares them.

use super::datapath::Operation;
use super::json::Json;

/// One call of a script.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The method, spelled as the daemon does; scripts are found whatever their case.
    pub method: &'static str,
    fields: Vec<(&'static str, Json)>,
}

impl Request {
    /// Builds a request of any shape; `fields` are in declared order, without `dbg`.
    pub fn new(method: &'static str, dbg: &str, fields: Vec<(&'static str, Json)>) -> Self {
        let mut all = vec![("dbg", Json::from(dbg))];
        all.extend(fields);
        Self { method, fields: all }
    }

    /// The request as the daemon writes it: one compact object, last declared parameter first.
    #[must_use]
    pub fn encode(&self) -> String {
        let fields = self.fields.iter().rev().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
        Json::Object(fields).encode()
    }

    /// The same request with a trace context behind its `dbg`.
    #[must_use]
    pub fn traced(&self, traceparent: &str) -> Self {
        let mut traced = self.clone();
        for (name, value) in &mut traced.fields {
            if let ("dbg", Json::String(dbg)) = (*name, value) {
                dbg.push_str(&format!("\n{{\"traceparent\":\"{traceparent}\"}}"));
            }
        }
        traced
    }

    /// The value of a string parameter, for logs and for choosing where to inject a fault.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        self.fields.iter().find_map(|(k, v)| match v {
            Json::String(s) if *k == name => Some(s.as_str()),
            _ => None,
        })
    }

    /// `Plugin.Query`
    pub fn query(dbg: &str) -> Self {
        Self::new("Plugin.query", dbg, vec![])
    }

    /// `Plugin.diagnostics`
    pub fn diagnostics(dbg: &str) -> Self {
        Self::new("Plugin.diagnostics", dbg, vec![])
    }

    /// `SR.probe`
    pub fn sr_probe(dbg: &str, configuration: &[(String, String)]) -> Self {
        Self::new("SR.probe", dbg, vec![("configuration", map(configuration))])
    }

    /// `SR.create`
    pub fn sr_create(
        dbg: &str,
        uuid: &str,
        configuration: &[(String, String)],
        name: &str,
        description: &str,
    ) -> Self {
        Self::new(
            "SR.create",
            dbg,
            vec![
                ("uuid", uuid.into()),
                ("configuration", map(configuration)),
                ("name", name.into()),
                ("description", description.into()),
            ],
        )
    }

    /// `SR.attach`
    pub fn sr_attach(dbg: &str, configuration: &[(String, String)]) -> Self {
        Self::new("SR.attach", dbg, vec![("configuration", map(configuration))])
    }

    /// `SR.stat`, `SR.ls`, `SR.detach` or `SR.destroy`
    pub fn sr(method: &'static str, dbg: &str, sr: &str) -> Self {
        Self::new(method, dbg, vec![("sr", sr.into())])
    }

    /// `SR.set_name`
    pub fn sr_set_name(dbg: &str, sr: &str, name: &str) -> Self {
        Self::new("SR.set_name", dbg, vec![("sr", sr.into()), ("new_name", name.into())])
    }

    /// `SR.set_description`
    pub fn sr_set_description(dbg: &str, sr: &str, description: &str) -> Self {
        Self::new("SR.set_description", dbg, vec![("sr", sr.into()), ("new_description", description.into())])
    }

    /// `Volume.create`
    pub fn volume_create(dbg: &str, sr: &str, name: &str, description: &str, size: i64, sharable: bool) -> Self {
        Self::new(
            "Volume.create",
            dbg,
            vec![
                ("sr", sr.into()),
                ("name", name.into()),
                ("description", description.into()),
                ("size", Json::Int(size)),
                ("sharable", Json::Bool(sharable)),
            ],
        )
    }

    /// `Volume.stat`, `snapshot`, `clone`, `destroy`, `enable_cbt`, `disable_cbt` or `data_destroy`
    pub fn volume(method: &'static str, dbg: &str, sr: &str, key: &str) -> Self {
        Self::new(method, dbg, vec![("sr", sr.into()), ("key", key.into())])
    }

    /// `Volume.set`
    pub fn volume_set(dbg: &str, sr: &str, key: &str, k: &str, v: &str) -> Self {
        Self::new("Volume.set", dbg, vec![("sr", sr.into()), ("key", key.into()), ("k", k.into()), ("v", v.into())])
    }

    /// `Volume.unset`
    pub fn volume_unset(dbg: &str, sr: &str, key: &str, k: &str) -> Self {
        Self::new("Volume.unset", dbg, vec![("sr", sr.into()), ("key", key.into()), ("k", k.into())])
    }

    /// `Volume.set_name`
    pub fn volume_set_name(dbg: &str, sr: &str, key: &str, name: &str) -> Self {
        Self::new("Volume.set_name", dbg, vec![("sr", sr.into()), ("key", key.into()), ("new_name", name.into())])
    }

    /// `Volume.set_description`
    pub fn volume_set_description(dbg: &str, sr: &str, key: &str, description: &str) -> Self {
        let fields = vec![("sr", sr.into()), ("key", key.into()), ("new_description", description.into())];
        Self::new("Volume.set_description", dbg, fields)
    }

    /// `Volume.resize`
    pub fn volume_resize(dbg: &str, sr: &str, key: &str, size: i64) -> Self {
        Self::new("Volume.resize", dbg, vec![("sr", sr.into()), ("key", key.into()), ("new_size", Json::Int(size))])
    }

    /// `Volume.revert`
    pub fn volume_revert(dbg: &str, sr: &str, snapshot: &str, key: &str) -> Self {
        Self::new("Volume.revert", dbg, vec![("sr", sr.into()), ("snapshot", snapshot.into()), ("key", key.into())])
    }

    /// `Volume.compose`
    pub fn volume_compose(dbg: &str, sr: &str, child: &str, parent: &str) -> Self {
        Self::new("Volume.compose", dbg, vec![("sr", sr.into()), ("key", child.into()), ("key2", parent.into())])
    }

    /// `Volume.copy` into an SR.
    pub fn volume_copy(dbg: &str, sr: &str, key: &str, to: &str) -> Self {
        Self::new("Volume.copy", dbg, vec![("sr", sr.into()), ("key", key.into()), ("dest_sr", to.into())])
    }

    /// `Volume.compare` of a volume with another one.
    pub fn volume_compare(dbg: &str, sr: &str, key: &str, other: &str) -> Self {
        Self::new("Volume.compare", dbg, vec![("sr", sr.into()), ("key", key.into()), ("key2", other.into())])
    }

    /// `Volume.list_changed_blocks` over the whole volume, which is how xapi asks.
    pub fn volume_list_changed_blocks(dbg: &str, sr: &str, from: &str, to: &str) -> Self {
        Self::volume_list_changed_blocks_in(dbg, sr, (from, to), (0, -1))
    }

    /// `Volume.list_changed_blocks` between two volumes in an extent, its offset and its length.
    pub fn volume_list_changed_blocks_in(dbg: &str, sr: &str, volumes: (&str, &str), extent: (i64, i64)) -> Self {
        Self::new(
            "Volume.list_changed_blocks",
            dbg,
            vec![
                ("sr", sr.into()),
                ("key", volumes.0.into()),
                ("key2", volumes.1.into()),
                ("offset", Json::Int(extent.0)),
                ("length", Json::Int(extent.1)),
            ],
        )
    }

    /// `Datapath.open`
    pub fn datapath_open(dbg: &str, uri: &str, persistent: bool) -> Self {
        Self::new("Datapath.open", dbg, vec![("uri", uri.into()), ("persistent", Json::Bool(persistent))])
    }

    /// `Datapath.close`
    pub fn datapath_close(dbg: &str, uri: &str) -> Self {
        Self::new("Datapath.close", dbg, vec![("uri", uri.into())])
    }

    /// `Datapath.attach`, `activate`, `activate_readonly`, `import_activate`, `deactivate` or `detach`
    pub fn datapath(method: &'static str, dbg: &str, uri: &str, domain: &str) -> Self {
        Self::new(method, dbg, vec![("uri", uri.into()), ("domain", domain.into())])
    }

    /// `Data.mirror`
    pub fn data_mirror(dbg: &str, uri: &str, domain: &str, remote: &str) -> Self {
        Self::new("Data.mirror", dbg, vec![("uri", uri.into()), ("domain", domain.into()), ("remote", remote.into())])
    }

    /// `Data.copy` of pairs of a first block and a number of blocks.
    pub fn data_copy(dbg: &str, uri: &str, domain: &str, remote: &str, block: i64, blocks: &[(i64, i64)]) -> Self {
        let pairs = blocks.iter().map(|(first, count)| Json::Array(vec![Json::Int(*first), Json::Int(*count)]));
        // Last declared first, as in every object that the daemon writes.
        let list = Json::Object(vec![
            ("ranges".to_owned(), Json::Array(pairs.collect())),
            ("blocksize".to_owned(), Json::Int(block)),
        ]);
        Self::new(
            "Data.copy",
            dbg,
            vec![("uri", uri.into()), ("domain", domain.into()), ("remote", remote.into()), ("blocklist", list)],
        )
    }

    /// `Data.stat`, `Data.cancel` or `Data.destroy`
    pub fn data(method: &'static str, dbg: &str, operation: &Operation) -> Self {
        Self::new(method, dbg, vec![("operation", operation.to_json())])
    }
}

fn map(entries: &[(String, String)]) -> Json {
    Json::Object(entries.iter().map(|(k, v)| (k.clone(), v.into())).collect())
}
