//! Maintenance mode: the key `maintenance`, which a person sets and ends. While it is there nobody is elected.

use serde::{Deserialize, Serialize};

/// What a member key's `features` says when its daemon goes by the key.
pub const FEATURE: &str = "maintenance";

/// `maintenance`. Its mod revision names it: every word to a guard is of one, and an earlier word changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaintenanceRecord {
    /// Who set it, or who ends it.
    pub by: String,
    /// Why it was set.
    pub why: String,
    /// Since when, in wall-clock RFC 3339: for people only.
    #[serde(default)]
    pub at: String,
    /// Until when it is meant to last, RFC 3339: for people, who are reminded; nothing ends by itself. None = nobody said.
    pub until: Option<String>,
    /// On, or ending.
    #[serde(default)]
    pub phase: Phase,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// A person works on the cluster.
    #[default]
    On,
    /// A person has ended it. The key stays until all who have to have heard of it.
    Ending,
}
