//! Holds a marked YAML tree against the shape of a document: unknown, duplicate and missing keys, wrong types, values out of range.
//! All of them at once, each with its place.
//!
//! What does not fit is reported and left out of the result, so that the rules behind this can still look at the rest.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json};

use super::problems::{Mark, Report, nearest};
use super::scalars::{parse_duration, parse_size};
use super::shape::{Entry, Scalar, Section, Shape};
use super::tree::{Node, Value};

/// Fits the whole tree. The result holds what fits: scalars as their source text, except integers and booleans.
pub(super) fn fit(root: &Node, entry: &Entry, report: &mut Report) -> Option<Json> {
    let Shape::Section(section) = &entry.shape else { return None };
    report.marks.insert("", root.mark);
    let mut walk = Walk { report, root: section };
    walk.entry(root, entry, "")
}

struct Walk<'a> {
    report: &'a mut Report,
    root: &'a Section,
}

/// `a.b`, also under the root, whose path is empty.
pub(super) fn join(path: &str, key: &str) -> String {
    let key = key.escape_debug();
    if path.is_empty() { key.to_string() } else { format!("{path}.{key}") }
}

impl Walk<'_> {
    fn entry(&mut self, node: &Node, entry: &Entry, path: &str) -> Option<Json> {
        if node.is_null() && entry.nullable {
            return Some(Json::Null);
        }
        match (&node.value, &entry.shape) {
            (Value::Refused, _) => None,
            (Value::Map(pairs), Shape::Section(section)) => Some(self.section(node.mark, pairs, section, path)),
            (Value::List(items), Shape::List(entry)) => {
                let fitted = items.iter().enumerate().map(|(index, item)| {
                    let path = format!("{path}[{index}]");
                    self.report.marks.insert(&path, item.mark);
                    self.entry(item, entry, &path).unwrap_or_else(|| filler(&entry.shape))
                });
                Some(Json::Array(fitted.collect()))
            }
            (Value::Scalar { text, plain }, Shape::Scalar(scalar)) => self.scalar(node, text, *plain, scalar, path),
            (_, shape) => {
                self.wrong(node, path, expected(shape), None);
                None
            }
        }
    }

    fn wrong(&mut self, node: &Node, path: &str, expected: String, hint: Option<String>) {
        // What stands where the name of a secret's file should be may be the secret.
        if path.ends_with("password_file") {
            return self.report.at(node.mark, path, "expected the absolute path of a file".to_owned(), None);
        }
        self.report.at(node.mark, path, format!("expected {expected}, found {}", node.describe()), hint);
    }

    fn section(&mut self, mark: Mark, pairs: &[(Node, Node)], section: &Section, path: &str) -> Json {
        let mut fitted = Map::new();
        let mut seen: BTreeMap<&str, Mark> = BTreeMap::new();
        for (key, node) in pairs {
            let Value::Scalar { text: name, .. } = &key.value else {
                self.report.at(key.mark, path, format!("expected a key, found {}", key.describe()), None);
                continue;
            };
            let path = join(path, name);
            if let Some(first) = seen.get(name.as_str()) {
                self.report.at(key.mark, &path, format!("this key is already on line {}", first.line), None);
                continue;
            }
            seen.insert(name, key.mark);
            let field = section.field(name);
            let Some(entry) = field.map(|field| &field.entry).or(section.others.as_deref()) else {
                self.unknown(key, name, section, &path);
                continue;
            };
            let collection = matches!(node.value, Value::Map(_) | Value::List(_)) || node.is_null();
            self.report.marks.insert(&path, if collection { key.mark } else { node.mark });
            match self.entry(node, entry, &path) {
                // Null under a known key is as if it were left out; under the operator's own key it is a value.
                Some(Json::Null) if field.is_some() => {}
                Some(value) => drop(fitted.insert(name.clone(), value)),
                None => {}
            }
        }
        for field in section.fields.iter().filter(|field| field.required && !seen.contains_key(field.name.as_str())) {
            let place = if path.is_empty() { mark } else { self.report.marks.find(path) };
            let message = format!("this key is missing; expected {}", expected(&field.entry.shape));
            self.report.at(place, &join(path, &field.name), message, None);
        }
        Json::Object(fitted)
    }

    fn unknown(&mut self, key: &Node, name: &str, section: &Section, path: &str) {
        let known = || section.fields.iter().map(|field| field.name.as_str());
        let list: Vec<&str> = known().collect();
        let near = nearest(name, known()).map(str::to_owned).or_else(|| self.root.find(name));
        let hint = match near {
            None if name == "password" && section.field("password_file").is_some() => {
                Some("a secret is a file: `password_file`".to_owned())
            }
            near => near.map(|near| format!("did you mean `{near}`?")),
        };
        self.report.at(key.mark, path, format!("there is no such key here; expected one of {}", list.join(", ")), hint);
    }

    fn scalar(&mut self, node: &Node, text: &str, plain: bool, scalar: &Scalar, path: &str) -> Option<Json> {
        let source = || Some(Json::String(text.to_owned()));
        let fits = match scalar {
            Scalar::Source if !node.is_null() => source(),
            Scalar::Tag if !node.is_null() => Some(if plain { core_value(text) } else { Json::String(text.to_owned()) }),
            Scalar::Text if !plain || core_value(text).is_string() && !node.is_null() => source(),
            Scalar::Flag if plain => core_value(text).as_bool().map(Json::Bool),
            Scalar::Integer { least, most } if plain => {
                integer(text).filter(|number| (least..=most).contains(&number)).map(|number| Json::Number(number.into()))
            }
            Scalar::Duration(range) if !node.is_null() => return self.measured(node, text, path, scalar, range.as_ref(), parse_duration),
            Scalar::Size(range) if !node.is_null() => return self.measured(node, text, path, scalar, range.as_ref(), parse_size),
            Scalar::Word(words) => words.iter().any(|word| word == text).then(source).flatten(),
            _ => None,
        };
        if fits.is_none() {
            self.wrong(node, path, expected_scalar(scalar), hint(scalar, text, plain));
        }
        fits
    }

    /// A value with a unit: must parse, and lie within the range its key has.
    fn measured<T: PartialOrd>(
        &mut self,
        node: &Node,
        text: &str,
        path: &str,
        scalar: &Scalar,
        range: Option<&(String, String)>,
        parse: fn(&str) -> Result<T, super::scalars::Complaint>,
    ) -> Option<Json> {
        let value = match parse(text) {
            Ok(value) => value,
            Err(complaint) => {
                self.report.at(node.mark, path, complaint.message, complaint.hint);
                return None;
            }
        };
        if let Some((least, most)) = range
            && let (Ok(low), Ok(high)) = (parse(least), parse(most))
            && !(low..=high).contains(&value)
        {
            self.wrong(node, path, expected_scalar(scalar), None);
            return None;
        }
        Some(Json::String(text.to_owned()))
    }
}

/// A whole number as people write one: no leading zeros, which other YAML readers take for octal.
fn integer(text: &str) -> Option<i64> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let canonical = digits == "0" || (!digits.starts_with('0') && !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()));
    canonical.then(|| text.parse().ok()).flatten()
}

/// What YAML 1.2's core schema makes of a plain scalar: only `true`, `false` and numbers are not text.
fn core_value(text: &str) -> Json {
    match text {
        "true" | "True" | "TRUE" => return Json::Bool(true),
        "false" | "False" | "FALSE" => return Json::Bool(false),
        _ => {}
    }
    if let Ok(number) = text.parse::<i64>() {
        return Json::Number(number.into());
    }
    let numeric = text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c)) && text.contains(|c: char| c.is_ascii_digit());
    let number = numeric.then(|| text.parse::<f64>().ok()).flatten().and_then(serde_json::Number::from_f64);
    number.map_or_else(|| Json::String(text.to_owned()), Json::Number)
}

/// Stands for a list item that does not fit, so that the items behind it keep their numbers.
fn filler(shape: &Shape) -> Json {
    match shape {
        Shape::Section(_) => Json::Object(Map::new()),
        Shape::List(_) => Json::Array(Vec::new()),
        Shape::Scalar(_) => Json::String(String::new()),
    }
}

fn expected(shape: &Shape) -> String {
    match shape {
        Shape::Section(section) if section.fields.is_empty() => "a mapping of names to values".to_owned(),
        Shape::Section(section) => {
            let names: Vec<&str> = section.fields.iter().map(|field| field.name.as_str()).collect();
            format!("a mapping with keys such as {}", names.join(", "))
        }
        Shape::List(_) => "a list".to_owned(),
        Shape::Scalar(scalar) => expected_scalar(scalar),
    }
}

fn expected_scalar(scalar: &Scalar) -> String {
    match scalar {
        Scalar::Source | Scalar::Tag => "a value".to_owned(),
        Scalar::Text => "text".to_owned(),
        Scalar::Flag => "true or false".to_owned(),
        Scalar::Integer { least: i64::MIN, .. } | Scalar::Integer { most: i64::MAX, .. } => "a whole number".to_owned(),
        Scalar::Integer { least, most } => format!("a whole number from {least} to {most}"),
        Scalar::Duration(Some((least, most))) => format!("a duration from {least} to {most}"),
        Scalar::Duration(None) => "a duration such as 500ms, 30s or 5min".to_owned(),
        Scalar::Size(Some((least, most))) => format!("a size from {least} to {most}"),
        Scalar::Size(None) => "a size such as 16kB, 1MB or 1GB".to_owned(),
        Scalar::Word(words) if words.len() == 1 => format!("`{}`", words[0]),
        Scalar::Word(words) => format!("one of {}", words.join(", ")),
    }
}

fn hint(scalar: &Scalar, text: &str, plain: bool) -> Option<String> {
    match scalar {
        Scalar::Word(words) => nearest(text, words.iter().map(String::as_str)).map(|word| format!("did you mean `{word}`?")),
        Scalar::Text if plain && !text.is_empty() => Some(format!("put it in quotes to make it text: \"{text}\"")),
        Scalar::Flag | Scalar::Integer { .. } if !plain => Some("without quotes".to_owned()),
        Scalar::Flag => match text.to_lowercase().as_str() {
            "on" | "yes" | "y" => Some("did you mean `true`?".to_owned()),
            "off" | "no" | "n" => Some("did you mean `false`?".to_owned()),
            _ => None,
        },
        _ => None,
    }
}
