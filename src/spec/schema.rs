//! The JSON Schemas of the two documents, generated from the typed types. `schemas/` holds them as `pgherd schema` prints them.

use std::sync::LazyLock;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::Value as Json;

use super::shape::{Entry, compile};
use super::{cluster, node};

/// The JSON Schema (2020-12) of cluster documents.
pub fn cluster() -> Json {
    generate::<cluster::typed::Cluster>()
}

/// The JSON Schema (2020-12) of node documents.
pub fn node() -> Json {
    generate::<node::typed::Node>()
}

/// A schema as it is printed and committed.
pub fn print(schema: &Json) -> String {
    format!("{schema:#}\n")
}

pub(super) static CLUSTER_SHAPE: LazyLock<Entry> = LazyLock::new(|| compile(&cluster()));
pub(super) static NODE_SHAPE: LazyLock<Entry> = LazyLock::new(|| compile(&node()));

fn generate<T: JsonSchema>() -> Json {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>().to_value();
    tidy(&mut schema);
    schema
}

/// The typed types are optional all over. Null is allowed where it is the default, and for sections and lists (an empty one in YAML is
/// null); everywhere else it is taken out again. So are the widths of our integers: the ranges say more.
fn tidy(schema: &mut Json) {
    if let Some(properties) = schema.get_mut("properties").and_then(Json::as_object_mut) {
        for property in properties.values_mut() {
            let scalar_default = property.get("default").is_some_and(|default| !default.is_null() && !default.is_array());
            if scalar_default {
                take_null_out(property);
            }
            if let Some(map) = property.as_object_mut()
                && map.get("format").and_then(Json::as_str).is_some_and(|format| format.starts_with("uint"))
            {
                map.remove("format");
            }
        }
    }
    match schema {
        Json::Object(map) => map.values_mut().for_each(tidy),
        Json::Array(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

fn take_null_out(property: &mut Json) {
    if let Some(types) = property.get_mut("type").and_then(Json::as_array_mut) {
        types.retain(|name| name != "null");
        if let [only] = types.as_slice() {
            property["type"] = only.clone();
        }
    }
    let choices = property.get_mut("anyOf").and_then(Json::as_array_mut).map(std::mem::take);
    let inner = choices.into_iter().flatten().find(|choice| choice["type"] != "null");
    if let (Some(Json::Object(inner)), Some(map)) = (inner, property.as_object_mut()) {
        map.remove("anyOf");
        map.extend(inner);
    }
}
