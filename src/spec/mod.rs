//! What may be typed, and what it means.
//!
//! A document goes through three steps, and each adds its problems to one report instead of stopping at the first:
//!
//! ```text
//! text --tree--> marked YAML --walk--> typed (as written)  --meaning, rules--> spec (validated, defaults filled in)
//!                                 ^ shape, from the JSON Schema of the typed types
//! ```
//!
//! A spec holds the values in force: a default whose feature is not built is not in force (see [`unbuilt`]). What was typed stays
//! beside it. Nothing here opens a file: whether secrets are there and private is for the caller to look at, by
//! [`node::NodeSpec::secret_files`].

pub mod cluster;
pub mod node;
pub mod problems;
pub mod scalars;
pub mod schema;
pub mod unbuilt;

mod checks;
mod parameters;
mod rules;
mod shape;
mod tree;
mod walk;

pub use problems::{Mark, Marks, Problem, Problems, Severity};
pub use tree::DOCUMENT_MAX_BYTES;

use problems::{Report, nearest};
use serde::de::DeserializeOwned;
use shape::Entry;
use tree::{Node, Value};

/// A document that may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded<T> {
    /// What it means.
    pub spec: T,
    /// What somebody should look at.
    pub warnings: Vec<Problem>,
    /// Where each key was typed.
    pub marks: Marks,
    /// The document's name, as given to `load`.
    pub file: String,
}

impl<T> Loaded<T> {
    /// A problem that only the caller can see, at the place of `path`.
    pub fn problem(&self, severity: Severity, path: &str, message: String, hint: Option<String>) -> Problem {
        let Mark { line, column } = self.marks.find(path);
        Problem { severity, file: self.file.clone(), line, column, path: path.to_owned(), message, hint }
    }
}

/// A document of either kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// `kind: Cluster`.
    Cluster(Box<Loaded<cluster::ClusterSpec>>),
    /// `kind: Node`.
    Node(Box<Loaded<node::NodeSpec>>),
}

impl Document {
    /// What somebody should look at.
    pub fn warnings(&self) -> &[Problem] {
        match self {
            Document::Cluster(loaded) => &loaded.warnings,
            Document::Node(loaded) => &loaded.warnings,
        }
    }
}

/// Reads a document of the kind that it says it is.
///
/// # Errors
/// All problems of the document, when one of them is an error.
pub fn load_any(source_name: &str, text: &str) -> Result<Document, Problems> {
    const KINDS: [&str; 2] = ["Cluster", "Node"];
    let mut report = Report::new(source_name);
    let root = tree::parse(text, &mut report);
    let kind = root.as_ref().and_then(kind_of);
    match kind {
        Some(("Cluster", _)) => cluster::load(source_name, text).map(|loaded| Document::Cluster(Box::new(loaded))),
        Some(("Node", _)) => node::load(source_name, text).map(|loaded| Document::Node(Box::new(loaded))),
        Some((other, mark)) => {
            let hint = nearest(other, KINDS).map(|near| format!("did you mean `{near}`?"));
            report.at(mark, "kind", format!("expected one of Cluster, Node, found `{}`", other.escape_debug()), hint);
            Err(Problems(report.into_parts().1))
        }
        None => {
            match root {
                Some(Node { mark, value: Value::Map(_) }) => {
                    report.at(mark, "kind", "this key is missing; expected one of Cluster, Node".to_owned(), None);
                }
                Some(root) => {
                    let found = root.describe();
                    report.at(root.mark, "", format!("expected a mapping with apiVersion, kind, metadata and spec, found {found}"), None);
                }
                None => {}
            }
            Err(Problems(report.into_parts().1))
        }
    }
}

fn kind_of(root: &Node) -> Option<(&str, Mark)> {
    let Value::Map(pairs) = &root.value else { return None };
    pairs.iter().find_map(|(key, value)| match (&key.value, &value.value) {
        (Value::Scalar { text: key, .. }, Value::Scalar { text, .. }) if key == "kind" => Some((text.as_str(), value.mark)),
        _ => None,
    })
}

/// The way of both kinds of document: text -> typed -> spec, with one report.
fn load<T: DeserializeOwned, S>(
    source_name: &str,
    text: &str,
    kind: &str,
    entry: &Entry,
    meaning: fn(T, &mut Report) -> Option<S>,
) -> Result<Loaded<S>, Problems> {
    let mut report = Report::new(source_name);
    let spec = tree::parse(text, &mut report).and_then(|root| {
        if let Some((other @ ("Cluster" | "Node"), mark)) = kind_of(&root)
            && other != kind
        {
            report.at(mark, "kind", format!("expected a {kind} document, found a {other} document"), None);
            return None;
        }
        let value = walk::fit(&root, entry, &mut report)?;
        match T::deserialize(value) {
            Ok(typed) => meaning(typed, &mut report),
            // What fits the schema fits the types; a test holds them together.
            Err(error) => {
                report.error("", format!("the document cannot be taken: {error}"));
                None
            }
        }
    });
    let refused = report.has_errors();
    let (marks, problems) = report.into_parts();
    match spec {
        Some(spec) if !refused => Ok(Loaded { spec, warnings: problems, marks, file: source_name.to_owned() }),
        _ => Err(Problems(problems)),
    }
}

#[cfg(test)]
mod tests;
