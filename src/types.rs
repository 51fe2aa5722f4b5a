//! The names and numbers that everything else speaks in. Each parses and prints as PostgreSQL or etcd does, and cannot hold a
//! value that those would refuse.
//!
//! Never compare what is in here as text: an LSN compared as a string once cost others data (SAFETY 1).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is not the value it should be. The message is one sentence for the person who typed it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(pub String);

/// Most bytes of a member name: PostgreSQL truncates `application_name` and slot names at 63.
pub const MEMBER_NAME_MAX_BYTES: usize = 63;
/// Most bytes of a cluster name.
pub const CLUSTER_NAME_MAX_BYTES: usize = 40;

fn check_name(text: &str, what: &str, max_bytes: usize, also: &str) -> Result<(), ParseError> {
    let fits = text.len() <= max_bytes
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || also.contains(c));
    if fits {
        return Ok(());
    }
    Err(ParseError(format!(
        "{what} is a lower-case letter followed by lower-case letters, digits or any of `{also}`, at most {max_bytes} bytes in all"
    )))
}

/// Text newtypes with a checked constructor and serde as a plain string.
macro_rules! checked_text {
    ($(#[$doc:meta])* $name:ident, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                let check: fn(&str) -> Result<(), ParseError> = $check;
                check(text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

checked_text!(
    /// A declared member: `[a-z][a-z0-9_-]{0,62}`. It is the member's `application_name` as it stands.
    MemberName,
    |text| check_name(text, "a member name", MEMBER_NAME_MAX_BYTES, "_-")
);

checked_text!(
    /// A cluster: `[a-z][a-z0-9-]{0,39}`. Part of every etcd key, and PostgreSQL's `cluster_name`.
    ClusterName,
    |text| check_name(text, "a cluster name", CLUSTER_NAME_MAX_BYTES, "-")
);

/// A position in the write-ahead log, printed as PostgreSQL prints `pg_lsn`: `16/B374D848`.
///
/// Two of them may be compared only along one lineage, never by number alone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Bytes from `earlier` to `self`; zero when `self` is not ahead.
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Lsn {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let bad = || ParseError(format!("`{text}` is not a WAL position such as 16/B374D848"));
        let half = |part: &str| {
            let fits = (1..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
            fits.then(|| u64::from_str_radix(part, 16).ok()).flatten().ok_or_else(bad)
        };
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        Ok(Self(half(high)? << 32 | half(low)?))
    }
}

/// Numbers that are newtypes only so that they cannot be mixed up.
macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number!(
    /// A PostgreSQL timeline. Ids start at 1; an id is used once per cluster, ever (I9).
    TimelineId, u32
);
number!(
    /// The create revision of the leader key: names one leadership, and fences every write made under it (I4).
    Epoch, i64
);
number!(
    /// A revision of etcd's key space.
    Revision, i64
);
number!(
    /// An etcd lease.
    LeaseId, i64
);

impl Epoch {
    /// No leadership at all: stands in a member's own record for a promotion that pgherd did not order. etcd's revisions start at 1.
    pub const BY_HAND: Epoch = Epoch(0);
}

impl TimelineId {
    /// The name of this timeline's history file: `00000002.history`.
    pub fn history_file_name(self) -> String {
        format!("{:08X}.history", self.0)
    }

    /// The timeline after this one by number.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// 64-bit identifiers travel as text: JSON readers round large numbers.
macro_rules! wide_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                text.trim().parse().map(Self).map_err(|_| ParseError(format!("`{text}` is not {}", $what)))
            }
        }
    };
}

wide_id!(
    /// PostgreSQL's database system identifier, from the control file.
    SystemId, "a database system identifier"
);
wide_id!(
    /// The identity of an etcd cluster, from its response headers.
    EtcdClusterId, "an etcd cluster id"
);

/// Serde as the `Display` text, for types whose text form is the contract.
macro_rules! serde_as_text {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
serde_as_text!(Lsn, SystemId, EtcdClusterId);

/// One run of one daemon: tells a restarted daemon, or a second one of the same name, from this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incarnation {
    /// The kernel's boot id.
    pub boot_id: String,
    /// CLOCK_BOOTTIME at the daemon's start, in nanoseconds.
    pub started_ns: u64,
}

/// A lease and the etcd cluster it was granted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseIdentity {
    /// The etcd cluster.
    pub cluster: EtcdClusterId,
    /// The lease.
    pub lease: LeaseId,
}

/// What names one leadership beyond doubt. Kept in the guard's memory and nowhere else: any stranger can renew a lease whose id it
/// can read, so a matching member name proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockIdentity {
    /// The lease that the lock hangs on.
    pub lease: LeaseIdentity,
    /// The leader key's create revision.
    pub epoch: Epoch,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_prints_and_parses_as_postgresql_does() {
        for (text, number) in [("0/0", 0), ("16/B374D848", 0x16_B374_D848), ("FFFFFFFF/FFFFFFFF", u64::MAX)] {
            assert_eq!(text.parse::<Lsn>().unwrap(), Lsn(number));
            assert_eq!(Lsn(number).to_string(), text);
        }
        for wrong in ["", "/", "0", "0/", "/0", "0/123456789", "+1/0", "0/ 1", "g/0"] {
            assert!(wrong.parse::<Lsn>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn lsns_are_ordered_as_numbers_and_not_as_text() {
        assert!("9/0".parse::<Lsn>().unwrap() < "10/0".parse::<Lsn>().unwrap());
    }

    #[test]
    fn hostile_member_names_are_refused() {
        let long = "a".repeat(MEMBER_NAME_MAX_BYTES + 1);
        for wrong in ["", "A", "1a", "a b", "a/../b", "a'; DROP TABLE t; --", "a\n", "\u{e4}", long.as_str()] {
            assert!(wrong.parse::<MemberName>().is_err(), "{wrong:?}");
        }
        assert!("standby_1-b".parse::<MemberName>().is_ok());
        assert!("standby_1".parse::<ClusterName>().is_err(), "an underscore is not for cluster names");
    }

    #[test]
    fn a_system_identifier_survives_json_whole() {
        let id = SystemId(7_512_345_678_901_234_567);
        let text = serde_json::to_string(&id).unwrap();
        assert_eq!(text, "\"7512345678901234567\"");
        assert_eq!(serde_json::from_str::<SystemId>(&text).unwrap(), id);
    }
}
