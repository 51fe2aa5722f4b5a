//! The documents and schemas that pgherd ships are held against its types, and against each other.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use pgherd::spec::cluster::ReplicationMode;
use pgherd::spec::unbuilt::{conditions, refusals};
use pgherd::spec::{Document, cluster, load_any, schema};
use serde_json::Value as Json;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn shipped() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![root().join("specs")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { directories.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

fn cluster_spec(name: &str) -> cluster::ClusterSpec {
    let path = root().join("specs").join(name);
    cluster::load(name, &read(&path)).unwrap_or_else(|problems| panic!("{problems}")).spec
}

/// By another reader than the one under test, as YAML 1.2 has it: `off` is text.
fn as_json(text: &str) -> Json {
    serde_saphyr::from_str_with_options(text, serde_saphyr::options! { strict_booleans: true }).unwrap()
}

fn schema_of(document: &Json) -> Json {
    if document["kind"] == "Node" { schema::node() } else { schema::cluster() }
}

#[test]
fn every_shipped_document_loads_and_fits_the_schema() {
    let shipped = shipped();
    assert!(shipped.len() >= 9, "{shipped:?}");
    for path in shipped {
        let text = read(&path);
        if let Err(problems) = load_any(&path.display().to_string(), &text) {
            panic!("{problems}");
        }
        let document = as_json(&text);
        let validator = jsonschema::validator_for(&schema_of(&document)).unwrap();
        let errors: Vec<String> = validator.iter_errors(&document).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert!(errors.is_empty(), "{}: {errors:#?}", path.display());
    }
}

#[test]
fn the_schemas_refuse_what_the_types_refuse() {
    let cases = [
        (
            "cluster",
            "{ kind: Cluster, apiVersion: pgherd/v1, metadata: { name: a }, spec: { members: [ { name: a, address: h, prt: 1 } ] } }",
        ),
        ("cluster", "{ kind: Cluster, apiVersion: pgherd/v1, metadata: { name: a }, spec: { members: [] } }"),
        (
            "cluster",
            "{ kind: Cluster, apiVersion: pgherd/v1, metadata: { name: a }, spec: { members: [ { name: a, address: h } ], ha: { ttl: 5m } } }",
        ),
        (
            "cluster",
            "{ kind: Cluster, apiVersion: pgherd/v1, metadata: { name: a }, spec: { members: [ { name: a, address: h, port: 0 } ] } }",
        ),
        (
            "cluster",
            "{ kind: Cluster, apiVersion: pgherd/v1, metadata: { name: a }, spec: { members: [ { name: a, address: h, port: null } ] } }",
        ),
        ("node", "{ kind: Node, apiVersion: pgherd/v1, metadata: { name: a }, spec: { cluster: main } }"),
    ];
    for (kind, text) in cases {
        let document = as_json(text);
        let schema = if kind == "node" { schema::node() } else { schema::cluster() };
        assert!(!jsonschema::is_valid(&schema, &document), "{text}");
        assert!(load_any("test", text).is_err(), "{text}");
    }
}

#[test]
fn the_committed_schemas_are_what_the_types_generate() {
    for (name, schema) in [("cluster", schema::cluster()), ("node", schema::node())] {
        jsonschema::meta::validate(&schema).unwrap();
        let path = root().join(format!("schemas/{name}.schema.json"));
        let current = std::fs::read_to_string(&path).is_ok_and(|committed| committed == schema::print(&schema));
        assert!(current, "schemas/{name}.schema.json is out of date: pgherd schema {name} > schemas/{name}.schema.json");
    }
}

#[test]
fn the_reference_deployment_is_valid_and_not_applied_before_there_is_a_watchdog() {
    let spec = cluster_spec("reference.cluster.yaml");
    let refused: Vec<String> = refusals(&spec).into_iter().map(|refusal| refusal.path).collect();
    assert_eq!(refused, ["spec.watchdog.mode"]);
}

#[test]
fn the_demo_may_be_applied_and_waits_for_standbys_as_by_default() {
    let spec = cluster_spec("demo/cluster.yaml");
    assert_eq!(refusals(&spec), []);
    assert_eq!(spec.replication.mode, ReplicationMode::Quorum);
}

#[test]
fn each_node_document_is_of_a_member_of_the_cluster_beside_it() {
    let clusters = [cluster_spec("reference.cluster.yaml"), cluster_spec("demo/cluster.yaml")];
    let mut nodes = 0;
    for path in shipped() {
        if let Document::Node(node) = load_any("test", &read(&path)).unwrap() {
            let cluster = clusters.iter().find(|cluster| cluster.name == node.spec.cluster).unwrap();
            let member = cluster.member(&node.spec.name).unwrap();
            assert_eq!(node.spec.api.listen, Some(format!("{}:{}", member.address, member.api_port)), "{}", path.display());
            nodes += 1;
        }
    }
    assert_eq!(nodes, clusters.iter().map(|cluster| cluster.members.len()).sum::<usize>());
}

#[test]
fn a_document_with_every_default_typed_means_the_same_as_one_without() {
    let mut typed = cluster_spec("defaults.cluster.yaml");
    let text = "apiVersion: pgherd/v1\nkind: Cluster\nmetadata: { name: main }\nspec:\n  members:\n    - { name: alpha, address: 192.0.2.1 }\n    \
                - { name: bravo, address: 192.0.2.2 }\n    - { name: charlie, address: 192.0.2.3 }\n";
    let bare = cluster::load("bare", text).unwrap_or_else(|problems| panic!("{problems}")).spec;
    assert!(conditions(&bare).iter().any(|condition| condition.message.starts_with("spec.watchdog.mode is left out")));
    typed.typed = bare.typed.clone();
    assert_eq!(typed, bare);
}

/// Every `default` of the schema, by path.
fn schema_defaults(schema: &Json, root: &Json, path: &str, found: &mut Vec<(String, Json)>) {
    if let Some(reference) = schema["$ref"].as_str() {
        return schema_defaults(root.pointer(&reference[1..]).unwrap(), root, path, found);
    }
    for choice in schema["anyOf"].as_array().into_iter().flatten() {
        schema_defaults(choice, root, path, found);
    }
    if schema["items"].is_object() {
        schema_defaults(&schema["items"], root, &format!("{path}/0"), found);
    }
    for (key, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}/{key}");
        if property["deprecated"] == true {
            continue;
        }
        match property.get("default") {
            Some(default) => found.push((path, default.clone())),
            None => schema_defaults(property, root, &path, found),
        }
    }
}

#[test]
fn the_document_of_defaults_has_every_default_of_the_schema() {
    let document = as_json(&read(&root().join("specs/defaults.cluster.yaml")));
    let (schema, mut defaults) = (schema::cluster(), Vec::new());
    schema_defaults(&schema, &schema, "", &mut defaults);
    assert!(defaults.len() > 40, "{}", defaults.len());
    for (path, default) in defaults {
        // Slots, peers and custom methods have no entry by default.
        if let Some(value) = document.pointer(&path) {
            assert_eq!(*value, default, "{path}");
        } else {
            assert!(document.pointer(path.rsplit_once('/').unwrap().0).is_none(), "{path} is missing in specs/defaults.cluster.yaml");
        }
    }
}
