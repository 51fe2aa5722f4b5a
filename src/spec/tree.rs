//! A YAML document as a tree in which every node knows its line and column.
//!
//! Scalars keep their source text: `on`, `0640` and `12:30` are not read as anything here. Anchors, aliases and tags are refused: a
//! document says what it means where it says it.

use granit_parser::{Event, Parser, ScalarStyle, Span};

use super::problems::{Mark, Report};

/// Most bytes of a document. The document is stored twice in one etcd transaction (spec and spec-history), as JSON text, and etcd
/// takes requests of at most 1.5 MB.
pub const DOCUMENT_MAX_BYTES: usize = 256 * 1024;
/// Deepest nesting of block or flow collections; documents need seven levels.
const NESTING_MAX_LEVELS: usize = 24;

/// A node and where it begins.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) mark: Mark,
    pub(super) value: Value,
}

/// What a node is.
#[derive(Debug, Clone)]
pub(super) enum Value {
    /// Source text, and whether it stood without quotes.
    Scalar { text: String, plain: bool },
    /// `- a` or `[a]`.
    List(Vec<Node>),
    /// Keys and values in source order, duplicates included.
    Map(Vec<(Node, Node)>),
    /// An alias, already reported.
    Refused,
}

impl Node {
    /// Whether this is YAML's null: nothing, `null` or `~` without quotes.
    pub(super) fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar { text, plain: true } if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// What the node is, for "expected …, found …".
    pub(super) fn describe(&self) -> String {
        /// Longest piece of a value shown in a message.
        const SHOWN_MAX_CHARS: usize = 60;
        match &self.value {
            _ if self.is_null() => "nothing".to_owned(),
            Value::Scalar { text, .. } if text.chars().count() > SHOWN_MAX_CHARS => {
                let start: String = text.chars().take(SHOWN_MAX_CHARS).collect();
                format!("`{}…`", start.escape_debug())
            }
            Value::Scalar { text, .. } => format!("`{}`", text.escape_debug()),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a mapping of keys".to_owned(),
            Value::Refused => "an alias".to_owned(),
        }
    }
}

/// Reads `text`, which must hold exactly one document. None when it cannot be read at all; the problem is in the report.
pub(super) fn parse(text: &str, report: &mut Report) -> Option<Node> {
    if text.len() > DOCUMENT_MAX_BYTES {
        let message = format!("the document is too long; expected at most {DOCUMENT_MAX_BYTES} bytes");
        report.at(Mark::default(), "", message, None);
        return None;
    }
    let mut options = granit_parser::options! {
        flow_nesting_limit: NESTING_MAX_LEVELS,
        block_nesting_limit: NESTING_MAX_LEVELS,
        disallow_directives: true,
        emit_unresolved_aliases: true,
    };
    options.set_emit_comments(false);
    let mut builder = Builder::default();
    for next in Parser::new_from_str_with_options(text, options) {
        match next {
            Ok((event, span)) => builder.take(event, span, report),
            Err(error) => {
                let marker = error.marker();
                let mark = Mark { line: marker.line(), column: marker.col() + 1 };
                report.at(mark, "", format!("this is not YAML: {}", error.info()), None);
                return None;
            }
        }
        if builder.second_document {
            return None;
        }
    }
    let root = builder.root.filter(|root| !root.is_null());
    if root.is_none() {
        report.at(Mark::default(), "", "the document is empty; expected apiVersion, kind, metadata and spec".to_owned(), None);
    }
    root
}

/// A collection that is not closed yet.
enum Open {
    List(Mark, Vec<Node>),
    Map(Mark, Vec<(Node, Node)>, Option<Node>),
}

#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    root: Option<Node>,
    second_document: bool,
}

impl Builder {
    fn take(&mut self, event: Event<'_>, span: Span, report: &mut Report) {
        let mark = Mark { line: span.start.line(), column: span.start.col() + 1 };
        if event.tag().is_some() {
            report.at(mark, "", "YAML tags are not used here; every value is taken as it is written".to_owned(), None);
        }
        match event {
            Event::DocumentStart(..) if self.root.is_some() => {
                report.at(mark, "", "a second document begins here; expected one document per file".to_owned(), None);
                self.second_document = true;
            }
            Event::Scalar(text, style, ..) => {
                let plain = style == ScalarStyle::Plain;
                self.add(Node { mark, value: Value::Scalar { text: text.into_owned(), plain } });
            }
            Event::SequenceStart(..) => self.open.push(Open::List(mark, Vec::new())),
            Event::MappingStart(..) => self.open.push(Open::Map(mark, Vec::new(), None)),
            Event::SequenceEnd | Event::MappingEnd => self.close(),
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                report.at(mark, "", "aliases are not used here; write the value out".to_owned(), None);
                self.add(Node { mark, value: Value::Refused });
            }
            _ => {}
        }
    }

    fn add(&mut self, node: Node) {
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some(Open::List(_, items)) => items.push(node),
            Some(Open::Map(_, entries, key)) => match key.take() {
                None => *key = Some(node),
                Some(key) => entries.push((key, node)),
            },
        }
    }

    fn close(&mut self) {
        match self.open.pop() {
            Some(Open::List(mark, items)) => self.add(Node { mark, value: Value::List(items) }),
            Some(Open::Map(mark, entries, _)) => self.add(Node { mark, value: Value::Map(entries) }),
            None => {}
        }
    }
}
