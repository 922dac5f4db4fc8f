//! What a daemon can be asked for over QMP, as `query-qmp-schema` tells it (QEMU's `docs/devel/qapi-code-gen`, "Client
//! JSON Protocol introspection").
//!
//! Commands have their own names there; all types have numbers instead of names and are found by those.

use std::collections::HashMap;

use serde::Deserialize;

/// A daemon's schema, as the command returns it.
#[derive(Deserialize)]
#[serde(from = "Vec<Entity>")]
pub(super) struct Schema(HashMap<String, Entity>);

/// A command or a type, as far as it is looked at.
#[derive(Deserialize)]
struct Entity {
    name: String,
    /// Of a command: the type of its arguments.
    #[serde(rename = "arg-type")]
    arguments: Option<String>,
    /// Of an object: its fields. Those of an alternate have no name.
    #[serde(default)]
    members: Vec<Member>,
    /// Of an object that has more fields depending on one of them: the values of that one.
    #[serde(default)]
    variants: Vec<Variant>,
}

#[derive(Deserialize)]
struct Member {
    name: Option<String>,
}

#[derive(Deserialize)]
struct Variant {
    case: String,
}

impl From<Vec<Entity>> for Schema {
    fn from(entities: Vec<Entity>) -> Self {
        Self(entities.into_iter().map(|entity| (entity.name.clone(), entity)).collect())
    }
}

impl Schema {
    /// Tells whether there is a command.
    pub fn has(&self, command: &str) -> bool {
        self.0.contains_key(command)
    }

    /// Tells whether a command takes an argument, whatever its others are.
    pub fn takes(&self, command: &str, argument: &str) -> bool {
        let members = self.arguments(command).map(|arguments| arguments.members.as_slice()).unwrap_or_default();
        members.iter().any(|member| member.name.as_deref() == Some(argument))
    }

    /// Tells whether a command knows a value of the argument on which its others depend.
    pub fn knows(&self, command: &str, value: &str) -> bool {
        let variants = self.arguments(command).map(|arguments| arguments.variants.as_slice()).unwrap_or_default();
        variants.iter().any(|variant| variant.case == value)
    }

    fn arguments(&self, command: &str) -> Option<&Entity> {
        self.0.get(self.0.get(command)?.arguments.as_ref()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_arguments_and_values_are_found() {
        let schema: Schema = serde_json::from_str(
            r#"[{"name": "blockdev-add", "meta-type": "command", "arg-type": "7", "ret-type": "0"},
                {"name": "quit", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
                {"name": "7", "meta-type": "object", "members": [{"name": "driver", "type": "8"}], "tag": "driver",
                 "variants": [{"case": "qcow2", "type": "9"}]},
                {"name": "0", "meta-type": "object", "members": []},
                {"name": "9", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "null"}]},
                {"name": "str", "meta-type": "builtin", "json-type": "string"}]"#,
        )
        .unwrap();
        assert!(schema.has("quit") && !schema.has("quits"));
        assert!(schema.takes("blockdev-add", "driver") && !schema.takes("blockdev-add", "node-name"));
        assert!(!schema.takes("quit", "driver") && !schema.takes("quits", "driver"));
        assert!(schema.knows("blockdev-add", "qcow2") && !schema.knows("blockdev-add", "raw"));
        assert!(!schema.knows("quit", "qcow2"));
    }

    #[test]
    fn what_is_no_schema_is_an_error() {
        for json in ["", "{}", "[1]", r#"[{"meta-type": "command"}]"#] {
            assert!(serde_json::from_str::<Schema>(json).is_err(), "{json}");
        }
    }
}
