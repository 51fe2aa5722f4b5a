//! The lines of pg_hba.conf and pg_ident.conf.
