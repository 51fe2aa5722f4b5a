//! The guard: keeps the postmaster and fences it.
