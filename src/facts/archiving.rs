//! WAL that a primary's archiver did not get to before PostgreSQL ended, and what became of it.

/// What is put beside the data directory because it could not be archived yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unarchived {
    /// So many files.
    pub files: usize,
    /// The first of them, in the order in which they are archived.
    pub first: String,
    /// The last one.
    pub last: String,
    /// Where they are on this host.
    pub place: String,
}

/// What one attempt came to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Archived {
    /// So many files were archived.
    pub files: usize,
    /// What is beside the data directory afterwards.
    pub beside: Option<Unarchived>,
    /// Why not all of it was archived; None = it was.
    pub why: Option<String>,
}
