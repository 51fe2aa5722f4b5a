//! What is wrong with a document: every problem, each with its place.
//!
//! A check never stops at the first problem, and never prints one: who loaded the document renders the list.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The document is refused.
    Error,
    /// The document is taken; somebody should look.
    Warning,
}

impl Severity {
    /// `error` or `warning`.
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        }
    }
}

/// One thing that is wrong, where it is, and what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// How bad.
    pub severity: Severity,
    /// The document's name, as given to `load`.
    pub file: String,
    /// From 1; 0 when the problem is not at one place.
    pub line: usize,
    /// From 1, in characters; 0 when the problem is not at one place.
    pub column: usize,
    /// `spec.members[1].port`; empty for the document as a whole.
    pub path: String,
    /// What is wrong and what was expected: lower case, no full stop.
    pub message: String,
    /// What to type instead: ``did you mean `members`?``.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        if self.severity == Severity::Warning {
            f.write_str(": warning")?;
        }
        if !self.path.is_empty() {
            write!(f, ": {}", self.path)?;
        }
        write!(f, ": {}", self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

/// All problems of one document, in the order of their places. Holds at least one error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// The problems that make the document refused.
    pub fn errors(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter().filter(|problem| problem.severity == Severity::Error)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            fmt::Display::fmt(problem, f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// `a.b[1].c`, `a.b[1]`, `a.b`, `a`: the path and the keys above it.
fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| path.rfind(['.', '[']).map(|end| &path[..end]))
}

/// A place in a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mark {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
}

/// Where each key of a document is, by path.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Marks(BTreeMap<String, Mark>);

impl Marks {
    pub(super) fn insert(&mut self, path: &str, mark: Mark) {
        self.0.insert(path.to_owned(), mark);
    }

    /// The place of `path`, or of the nearest key above it that was typed.
    pub fn find(&self, path: &str) -> Mark {
        ancestors(path).chain([""]).find_map(|path| self.0.get(path)).copied().unwrap_or_default()
    }

    /// Whether `path` was typed.
    pub fn contains(&self, path: &str) -> bool {
        self.0.contains_key(path)
    }
}

/// Collects problems while a document is read.
#[derive(Debug)]
pub(super) struct Report {
    file: String,
    pub(super) marks: Marks,
    problems: Vec<Problem>,
    /// Paths whose value could not be taken: rules have nothing to say about them.
    unfit: BTreeSet<String>,
}

impl Report {
    pub(super) fn new(file: &str) -> Self {
        Self { file: file.to_owned(), marks: Marks::default(), problems: Vec::new(), unfit: BTreeSet::new() }
    }

    /// The value at `path` could not be taken.
    pub(super) fn at(&mut self, mark: Mark, path: &str, message: String, hint: Option<String>) {
        self.unfit.insert(path.to_owned());
        self.push(Severity::Error, mark, path, message, hint);
    }

    /// A rule is broken at `path`.
    pub(super) fn error(&mut self, path: &str, message: impl Into<String>) {
        self.rule(Severity::Error, path, message.into(), None);
    }

    /// A rule is broken at `path`, and what was meant can be guessed.
    pub(super) fn error_hint(&mut self, path: &str, message: impl Into<String>, hint: impl Into<String>) {
        self.rule(Severity::Error, path, message.into(), Some(hint.into()));
    }

    /// Somebody should look at `path`.
    pub(super) fn warn(&mut self, path: &str, message: impl Into<String>) {
        self.rule(Severity::Warning, path, message.into(), None);
    }

    fn rule(&mut self, severity: Severity, path: &str, message: String, hint: Option<String>) {
        let unfit = ancestors(path).any(|path| self.unfit.contains(path));
        if !unfit {
            self.push(severity, self.marks.find(path), path, message, hint);
        }
    }

    fn push(&mut self, severity: Severity, mark: Mark, path: &str, message: String, hint: Option<String>) {
        let Mark { line, column } = mark;
        self.problems.push(Problem { severity, file: self.file.clone(), line, column, path: path.to_owned(), message, hint });
    }

    pub(super) fn has_errors(&self) -> bool {
        self.problems.iter().any(|problem| problem.severity == Severity::Error)
    }

    /// The problems so far, in the order of their places.
    pub(super) fn into_parts(mut self) -> (Marks, Vec<Problem>) {
        self.problems.sort_by_key(|problem| (problem.line, problem.column));
        self.problems.dedup();
        (self.marks, self.problems)
    }
}

/// The nearest of `known` to what was typed, if it is near enough to be what was meant.
pub(super) fn nearest<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    /// One slip per this many characters, and always at least one.
    const CHARACTERS_PER_SLIP: usize = 3;
    let typed = typed.to_lowercase();
    let length = typed.chars().count();
    let slips = (length / CHARACTERS_PER_SLIP).max(1).min(length.saturating_sub(1));
    known
        .into_iter()
        .map(|word| (strsim::damerau_levenshtein(&typed, &word.to_lowercase()), word))
        .filter(|(distance, _)| *distance <= slips)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, word)| word)
}
