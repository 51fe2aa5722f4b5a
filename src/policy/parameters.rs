//! The content of postgresql.conf.
