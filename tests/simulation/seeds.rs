//! Seeds that found something, each with what it was. They run first, for ever: a bug that comes back is caught at once.

/// Seed, and why it is here.
pub const REGRESSIONS: &[(u64, &str)] = &[
    (28, "a guard that knows a later leadership than a restored etcd refused every proof, and the member took and lost the lock for ever"),
    (160, "a standby that was promoted by hand followed a leader whose timeline has the number of its own"),
];
