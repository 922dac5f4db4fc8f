//! What Plugin, SR and Volume scripts answer.

use super::json::{Json, Malformed};

/// The answer of `Plugin.Query`; every field is required.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugin {
    /// The SR type or the URI scheme.
    pub plugin: String,
    /// A name for people.
    pub name: String,
    /// A description for people.
    pub description: String,
    /// Who makes it.
    pub vendor: String,
    /// Whose it is.
    pub copyright: String,
    /// The plugin's version.
    pub version: String,
    /// The version of the protocol that it speaks.
    pub required_api_version: String,
    /// Declared features.
    pub features: Vec<String>,
    /// The device-config keys with their descriptions.
    pub configuration: Vec<(String, String)>,
    /// Cluster stacks, one of which has to run.
    pub required_cluster_stack: Vec<String>,
}

impl Plugin {
    /// Decodes the answer.
    pub fn decode(value: &Json) -> Result<Self, Malformed> {
        let f = value.fields("query")?;
        Ok(Self {
            plugin: f.required("plugin", Json::string)?,
            name: f.required("name", Json::string)?,
            description: f.required("description", Json::string)?,
            vendor: f.required("vendor", Json::string)?,
            copyright: f.required("copyright", Json::string)?,
            version: f.required("version", Json::string)?,
            required_api_version: f.required("required_api_version", Json::string)?,
            features: f.required("features", Json::strings)?,
            configuration: f.required("configuration", Json::string_map)?,
            required_cluster_stack: f.required("required_cluster_stack", Json::strings)?,
        })
    }
}

/// How an SR is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Usable; the only state in which it is scanned.
    Healthy(String),
    /// Coming back.
    Recovering(String),
    /// Not reachable now.
    Unreachable(String),
    /// Gone.
    Unavailable(String),
}

impl Health {
    fn decode(value: &Json, at: &str) -> Result<Self, Malformed> {
        let (tag, payload) = value.variant(at)?;
        let text = payload.string(at)?;
        match tag {
            "Healthy" => Ok(Self::Healthy(text)),
            "Recovering" => Ok(Self::Recovering(text)),
            "Unreachable" => Ok(Self::Unreachable(text)),
            "Unavailable" => Ok(Self::Unavailable(text)),
            _ => Err(Malformed::new(at, "a health", value)),
        }
    }
}

/// The answer of `SR.stat`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SrStat {
    /// The SR, as `SR.attach` named it.
    pub sr: String,
    /// The SR's name.
    pub name: String,
    /// The SR's uuid; may be absent.
    pub uuid: Option<String>,
    /// The SR's description.
    pub description: String,
    /// Bytes free.
    pub free_space: i64,
    /// Bytes in all.
    pub total_space: i64,
    /// URIs of metrics.
    pub datasources: Vec<String>,
    /// Whether several hosts share it by a cluster stack.
    pub clustered: bool,
    /// How it is.
    pub health: Health,
}

impl SrStat {
    /// Decodes the answer.
    pub fn decode(value: &Json, at: &str) -> Result<Self, Malformed> {
        let f = value.fields(at)?;
        Ok(Self {
            sr: f.required("sr", Json::string)?,
            name: f.required("name", Json::string)?,
            uuid: f.optional("uuid", Json::string)?,
            description: f.required("description", Json::string)?,
            free_space: f.required("free_space", Json::int)?,
            total_space: f.required("total_space", Json::int)?,
            datasources: f.required("datasources", Json::strings)?,
            clustered: f.required("clustered", Json::bool)?,
            health: f.required("health", Health::decode)?,
        })
    }
}

/// A volume, as stat, ls, create, snapshot and clone describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The key by which the plugin knows it.
    pub key: String,
    /// Its uuid, if the plugin has one for it.
    pub uuid: Option<String>,
    /// Its name.
    pub name: String,
    /// Its description.
    pub description: String,
    /// Whether it may be written to.
    pub read_write: bool,
    /// Whether several VMs may use it at once.
    pub sharable: bool,
    /// Bytes that a guest sees.
    pub virtual_size: i64,
    /// Bytes that it takes.
    pub physical_utilisation: i64,
    /// Where datapaths find it.
    pub uri: Vec<String>,
    /// What was stored with `Volume.set`.
    pub keys: Vec<(String, String)>,
    /// `Data` or one of the CBT kinds.
    pub volume_type: Option<String>,
    /// Whether changed blocks are tracked.
    pub cbt_enabled: Option<bool>,
}

impl Volume {
    /// Decodes the answer.
    pub fn decode(value: &Json, at: &str) -> Result<Self, Malformed> {
        let f = value.fields(at)?;
        let volume = Self {
            key: f.required("key", Json::string)?,
            uuid: f.optional("uuid", Json::string)?,
            name: f.required("name", Json::string)?,
            description: f.required("description", Json::string)?,
            read_write: f.required("read_write", Json::bool)?,
            sharable: f.required("sharable", Json::bool)?,
            virtual_size: f.required("virtual_size", Json::int)?,
            physical_utilisation: f.required("physical_utilisation", Json::int)?,
            uri: f.required("uri", Json::strings)?,
            keys: f.required("keys", Json::string_map)?,
            volume_type: f.optional("volume_type", Json::string)?,
            cbt_enabled: f.optional("cbt_enabled", Json::bool)?,
        };
        volume.is_a_snapshot(at)?;
        Ok(volume)
    }

    /// Decodes the answer of `SR.ls`; one bad volume makes the whole scan fail.
    pub fn decode_list(value: &Json) -> Result<Vec<Self>, Malformed> {
        value.array("volumes")?.iter().enumerate().map(|(i, v)| Self::decode(v, &format!("volumes[{i}]"))).collect()
    }

    /// The value of a key.
    #[must_use]
    pub fn key_value(&self, name: &str) -> Option<&str> {
        self.keys.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// Reads the reserved key `is_a_snapshot`, which is `true`, `false` or absent.
    fn is_a_snapshot(&self, at: &str) -> Result<bool, Malformed> {
        match self.key_value("is_a_snapshot") {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(other) => {
                Err(Malformed::new(format!("{at}.keys.is_a_snapshot"), "true or false", &Json::from(other)))
            }
        }
    }

    /// Whether its keys say that it is a snapshot.
    #[must_use]
    pub fn snapshot(&self) -> bool {
        self.key_value("is_a_snapshot") == Some("true")
    }
}

/// One SR that `SR.probe` found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeResult {
    /// The device-config that reaches it.
    pub configuration: Vec<(String, String)>,
    /// Whether that device-config is all that it takes.
    pub complete: bool,
    /// The SR, if it exists already.
    pub sr: Option<SrStat>,
    /// What else is worth saying.
    pub extra_info: Vec<(String, String)>,
}

impl ProbeResult {
    /// Decodes the answer of `SR.probe`, with the daemon's rules on what goes together.
    pub fn decode_list(value: &Json) -> Result<Vec<Self>, Malformed> {
        value.array("probe")?.iter().enumerate().map(|(i, v)| Self::decode(v, &format!("probe[{i}]"))).collect()
    }

    fn decode(value: &Json, at: &str) -> Result<Self, Malformed> {
        let f = value.fields(at)?;
        let result = Self {
            configuration: f.required("configuration", Json::string_map)?,
            complete: f.required("complete", Json::bool)?,
            sr: f.optional("sr", SrStat::decode)?,
            extra_info: f.required("extra_info", Json::string_map)?,
        };
        let named = result.configuration.iter().any(|(k, _)| k == "sr_uuid");
        if result.sr.is_some() && !named {
            return Err(Malformed::new(at, "configuration.sr_uuid beside an sr", value));
        }
        if named && !result.complete {
            return Err(Malformed::new(at, "complete=true beside configuration.sr_uuid", value));
        }
        Ok(result)
    }
}

/// The answer of `Volume.list_changed_blocks`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedBlocks {
    /// Bytes that one bit stands for.
    pub granularity: i64,
    /// The bitmap in base64.
    pub bitmap: String,
}

impl ChangedBlocks {
    /// Decodes the answer.
    pub fn decode(value: &Json) -> Result<Self, Malformed> {
        let f = value.fields("changed blocks")?;
        Ok(Self { granularity: f.required("granularity", Json::int)?, bitmap: f.required("bitmap", Json::string)? })
    }

    /// The bits of the bitmap, the highest of each byte first; `None` if it is no base64.
    #[must_use]
    pub fn bits(&self) -> Option<Vec<bool>> {
        const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let text = self.bitmap.trim_end_matches('=');
        if !self.bitmap.len().is_multiple_of(4) || self.bitmap.len() - text.len() > 2 {
            return None;
        }
        let mut bits = Vec::with_capacity(text.len() * 6);
        for digit in text.bytes() {
            let value = DIGITS.iter().position(|known| *known == digit)?;
            bits.extend((0..6).rev().map(|bit| value >> bit & 1 == 1));
        }
        bits.truncate(bits.len() / 8 * 8);
        Some(bits)
    }
}

/// What `Volume.compare` answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    /// Bytes of a block.
    pub blocksize: i64,
    /// Ranges of blocks: where each begins, and how many it has.
    pub ranges: Vec<(i64, i64)>,
}

impl Blocks {
    /// Decodes the answer.
    pub fn decode(value: &Json) -> Result<Self, Malformed> {
        let f = value.fields("list of blocks")?;
        let range = |pair: &Json, at: &str| match pair.array(at)? {
            [first, count] => Ok((first.int(at)?, count.int(at)?)),
            _ => Err(Malformed::new(at, "a pair of numbers", pair)),
        };
        let ranges = |v: &Json, at: &str| v.array(at)?.iter().map(|pair| range(pair, at)).collect();
        Ok(Self { blocksize: f.required("blocksize", Json::int)?, ranges: f.required("ranges", ranges)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: &str = r#"{"key":"k","name":"n","description":"d","read_write":true,"sharable":false,
        "virtual_size":1,"physical_utilisation":1,"uri":["qsd://s/k"],"keys":{}}"#;

    fn volume(text: &str) -> Result<Volume, Malformed> {
        Volume::decode(&Json::parse(text.as_bytes()).unwrap(), "volume")
    }

    fn with(field: &str, value: &str) -> String {
        let parsed: serde_json::Value = serde_json::from_str(VOLUME).unwrap();
        let mut parsed = parsed.as_object().unwrap().clone();
        parsed.insert(field.into(), serde_json::from_str(value).unwrap());
        serde_json::Value::Object(parsed).to_string()
    }

    #[test]
    fn a_volume_may_leave_out_three_fields_only() {
        assert!(volume(VOLUME).is_ok());
        let parsed: serde_json::Value = serde_json::from_str(VOLUME).unwrap();
        for field in parsed.as_object().unwrap().keys() {
            let mut less = parsed.as_object().unwrap().clone();
            less.remove(field);
            assert!(volume(&serde_json::Value::Object(less).to_string()).is_err(), "{field} was left out");
        }
    }

    #[test]
    fn a_volume_with_null_or_another_type_anywhere_is_refused() {
        for field in [
            "key",
            "uuid",
            "name",
            "description",
            "read_write",
            "sharable",
            "virtual_size",
            "physical_utilisation",
            "uri",
            "keys",
            "volume_type",
            "cbt_enabled",
        ] {
            assert!(volume(&with(field, "null")).is_err(), "{field}: null was accepted");
            assert!(volume(&with(field, "[[]]")).is_err(), "{field}: [[]] was accepted");
        }
        for (field, bad) in [
            ("read_write", "1"),
            ("read_write", "\"true\""),
            ("virtual_size", "1.0"),
            ("virtual_size", "1e9"),
            ("virtual_size", "\"1\""),
            ("keys", "{\"a\":1}"),
            ("keys", "[]"),
            ("uri", "\"qsd://a\""),
        ] {
            assert!(volume(&with(field, bad)).is_err(), "{field}: {bad} was accepted");
        }
    }

    #[test]
    fn a_snapshot_flag_is_exactly_true_or_false_or_the_whole_scan_fails() {
        assert!(volume(&with("keys", r#"{"is_a_snapshot":"true"}"#)).unwrap().snapshot());
        for bad in ["True", "", "1", "yes"] {
            let one = with("keys", &format!("{{\"is_a_snapshot\":\"{bad}\"}}"));
            let list = Json::parse(format!("[{VOLUME},{one}]").as_bytes()).unwrap();
            assert!(Volume::decode_list(&list).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn health_is_a_tag_with_a_text() {
        let at = |text: &str| Health::decode(&Json::parse(text.as_bytes()).unwrap(), "h");
        assert_eq!(at(r#"["Healthy",""]"#), Ok(Health::Healthy(String::new())));
        for bad in [r#""Healthy""#, r#"["Healthy"]"#, r#"["Fine",""]"#, r#"["Healthy",null]"#, "null"] {
            assert!(at(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_probe_result_names_its_sr_or_has_none() {
        let stat = r#"{"sr":"s","name":"","description":"","free_space":1,"total_space":1,"datasources":[],
            "clustered":false,"health":["Healthy",""]}"#;
        let probe = |text: String| ProbeResult::decode_list(&Json::parse(text.as_bytes()).unwrap());
        assert!(probe("[]".into()).is_ok());
        assert!(probe(r#"[{"configuration":{},"complete":true,"extra_info":{}}]"#.into()).is_ok());
        assert!(
            probe(format!(
                r#"[{{"configuration":{{"sr_uuid":"u"}},"complete":true,"sr":{stat},"extra_info":{{}}}}]"#
            ))
            .is_ok()
        );
        assert!(
            probe(format!(r#"[{{"configuration":{{}},"complete":true,"sr":{stat},"extra_info":{{}}}}]"#)).is_err()
        );
        assert!(probe(r#"[{"configuration":{"sr_uuid":"u"},"complete":false,"extra_info":{}}]"#.into()).is_err());
        assert!(probe(r#"[{"configuration":{},"complete":true,"sr":null,"extra_info":{}}]"#.into()).is_err());
    }

    #[test]
    fn a_query_lacking_any_of_ten_fields_is_refused() {
        let full = r#"{"plugin":"p","name":"n","description":"d","vendor":"v","copyright":"c","version":"1",
            "required_api_version":"5.0","features":[],"configuration":{},"required_cluster_stack":[]}"#;
        let parsed: serde_json::Value = serde_json::from_str(full).unwrap();
        assert!(Plugin::decode(&Json::parse(full.as_bytes()).unwrap()).is_ok());
        assert_eq!(parsed.as_object().unwrap().len(), 10);
        for field in parsed.as_object().unwrap().keys() {
            let mut less = parsed.as_object().unwrap().clone();
            less.remove(field);
            let text = serde_json::Value::Object(less).to_string();
            assert!(Plugin::decode(&Json::parse(text.as_bytes()).unwrap()).is_err(), "{field} was left out");
        }
    }
}
