//! The shape of a document, compiled from the JSON Schema that its types generate: the schema that editors use and the one that
//! `validate` walks are the same.

use serde_json::Value as Json;

/// What may stand at a place.
#[derive(Debug, Clone)]
pub(super) enum Shape {
    Section(Section),
    List(Box<Entry>),
    Scalar(Scalar),
}

/// A mapping: its known keys, and what may stand under keys that are the operator's own.
#[derive(Debug, Clone)]
pub(super) struct Section {
    pub(super) fields: Vec<Field>,
    pub(super) others: Option<Box<Entry>>,
}

/// A known key.
#[derive(Debug, Clone)]
pub(super) struct Field {
    pub(super) name: String,
    pub(super) required: bool,
    pub(super) entry: Entry,
}

/// A place, and whether null may stand there.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) shape: Shape,
    pub(super) nullable: bool,
}

/// A single value.
#[derive(Debug, Clone)]
pub(super) enum Scalar {
    /// Taken from the source, whatever YAML would make of it.
    Source,
    /// As `Source`, but numbers and booleans keep their type.
    Tag,
    /// YAML text.
    Text,
    Flag,
    Integer {
        least: i64,
        most: i64,
    },
    /// Range as text, for people.
    Duration(Option<(String, String)>),
    /// Range as text, for people.
    Size(Option<(String, String)>),
    Word(Vec<String>),
}

impl Section {
    pub(super) fn field(&self, name: &str) -> Option<&Field> {
        self.fields.iter().find(|field| field.name == name)
    }

    /// The path of the first key called `name`, here or anywhere below.
    pub(super) fn find(&self, name: &str) -> Option<String> {
        if self.field(name).is_some() {
            return Some(name.to_owned());
        }
        self.fields.iter().find_map(|field| {
            let (section, list) = match &field.entry.shape {
                Shape::Section(section) => (section, ""),
                Shape::List(entry) => match &entry.shape {
                    Shape::Section(section) => (section, "[]"),
                    _ => return None,
                },
                Shape::Scalar(_) => return None,
            };
            Some(format!("{}{list}.{}", field.name, section.find(name)?))
        })
    }
}

/// Compiles a whole schema. Shapes nest as the types do; none of them is recursive.
pub(super) fn compile(schema: &Json) -> Entry {
    entry(schema, schema)
}

fn entry(schema: &Json, root: &Json) -> Entry {
    if let Some(reference) = schema["$ref"].as_str() {
        let target = reference.trim_start_matches('#');
        return entry(root.pointer(target).unwrap_or(&Json::Null), root);
    }
    if let Some(choices) = schema["anyOf"].as_array() {
        let inner = choices.iter().find(|choice| choice["type"] != "null").unwrap_or(&Json::Null);
        return Entry { nullable: true, ..entry(inner, root) };
    }
    Entry { nullable: types(schema).contains(&"null"), shape: shape(schema, root) }
}

fn types(schema: &Json) -> Vec<&str> {
    match &schema["type"] {
        Json::String(one) => vec![one.as_str()],
        Json::Array(several) => several.iter().filter_map(Json::as_str).collect(),
        _ => Vec::new(),
    }
}

fn shape(schema: &Json, root: &Json) -> Shape {
    let types = types(schema);
    if types.contains(&"object") {
        return Shape::Section(section(schema, root));
    }
    if types.contains(&"array") {
        return Shape::List(Box::new(entry(&schema["items"], root)));
    }
    let range = || {
        let ends = schema["x-range"].as_array()?;
        Some((ends.first()?.as_str()?.to_owned(), ends.get(1)?.as_str()?.to_owned()))
    };
    Shape::Scalar(match schema["format"].as_str() {
        Some("pgherd-duration") => Scalar::Duration(range()),
        Some("pgherd-size") => Scalar::Size(range()),
        Some("pgherd-text") => Scalar::Source,
        Some("pgherd-tag") => Scalar::Tag,
        _ if types.contains(&"boolean") => Scalar::Flag,
        _ if types.contains(&"integer") => {
            Scalar::Integer { least: schema["minimum"].as_i64().unwrap_or(i64::MIN), most: schema["maximum"].as_i64().unwrap_or(i64::MAX) }
        }
        _ => words(schema).map_or(Scalar::Text, Scalar::Word),
    })
}

/// The words of an enumeration: `enum`, or `oneOf` with a `const` each when they are documented one by one.
fn words(schema: &Json) -> Option<Vec<String>> {
    if let Some(word) = schema["const"].as_str() {
        return Some(vec![word.to_owned()]);
    }
    let plain = schema["enum"].as_array().into_iter().flatten();
    let one_of = schema["oneOf"].as_array().into_iter().flatten();
    let words = plain
        .filter_map(|word| word.as_str().map(|word| vec![word.to_owned()]))
        .chain(one_of.filter_map(words))
        .flatten()
        .collect::<Vec<_>>();
    (!words.is_empty()).then_some(words)
}

fn section(schema: &Json, root: &Json) -> Section {
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
    let fields = schema["properties"].as_object().into_iter().flatten().map(|(name, property)| Field {
        name: name.clone(),
        required: required.contains(&name.as_str()),
        entry: entry(property, root),
    });
    let others = match &schema["additionalProperties"] {
        other @ Json::Object(_) => Some(Box::new(entry(other, root))),
        _ => None,
    };
    Section { fields: fields.collect(), others }
}
