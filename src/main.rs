//! The `pgherd` command.

fn main() {}
