//! This host's PostgreSQL: files, programs, SQL.
