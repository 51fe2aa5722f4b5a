//! Quoting for SQL text that cannot take parameters (utility commands). Everything else is sent as a parameter.
//!
//! The rules are libpq's (PQescapeIdentifier, PQescapeLiteral) as written in `postgres-protocol`: right under either value of
//! `standard_conforming_strings`. A NUL cannot be quoted at all: PostgreSQL's protocol ends a string there.

use anyhow::{Result, ensure};

/// `"name"`, with its own double quotes doubled.
pub fn identifier(name: &str) -> Result<String> {
    ensure!(!name.contains('\0'), "an SQL name cannot hold a NUL byte");
    ensure!(!name.is_empty(), "an SQL name cannot be empty");
    Ok(postgres_protocol::escape::escape_identifier(name))
}

/// `'text'`, or ` E'te\\xt'` when it holds a backslash.
pub fn literal(text: &str) -> Result<String> {
    ensure!(!text.contains('\0'), "an SQL text cannot hold a NUL byte");
    Ok(postgres_protocol::escape::escape_literal(text))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What PostgreSQL's lexer makes of a quoted identifier that fills the whole text; None when it ends early.
    fn read_identifier(quoted: &str) -> Option<String> {
        let inner = quoted.strip_prefix('"')?.strip_suffix('"')?;
        let halves: Vec<&str> = inner.split("\"\"").collect();
        (!halves.iter().any(|half| half.contains('"'))).then(|| halves.join("\""))
    }

    proptest! {
        #[test]
        fn no_name_ends_its_own_quotes(name in "[^\0]{1,40}") {
            prop_assert_eq!(read_identifier(&identifier(&name).unwrap()), Some(name));
        }

        #[test]
        fn a_literal_has_no_lone_quote_and_no_lone_backslash(text in "[^\0]{0,40}") {
            let quoted = literal(&text).unwrap();
            let inner = quoted.trim_start_matches(" E").strip_prefix('\'').unwrap().strip_suffix('\'').unwrap().to_owned();
            prop_assert_eq!(inner.replace("''", "").matches('\'').count(), 0);
            prop_assert_eq!(inner.replace("\\\\", "").matches('\\').count(), 0);
            prop_assert_eq!(inner.replace("''", "'").replace("\\\\", "\\"), text);
        }
    }

    #[test]
    fn a_nul_byte_is_refused_rather_than_cut() {
        assert!(identifier("a\0b").is_err());
        assert!(literal("a\0b").is_err());
    }
}
