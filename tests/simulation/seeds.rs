//! Seeds that found something, each with what it was, on the tree of that day. They run first. A new kind of fault or a changed model makes
//! another storm of a seed, so what holds a bug down for good is the unit test that came with its mending.

/// Seed, and why it is here.
pub const REGRESSIONS: &[(u64, &str)] = &[
    (28, "a guard that knows a later leadership than a restored etcd refused every proof, and the member took and lost the lock for ever"),
    (160, "a standby that was promoted by hand followed a leader whose timeline has the number of its own"),
    (376, "the same, promoted by hand while the other was running for the lock"),
    (347, "a daemon took its former run's key, kept alive by etcd's leader change, for a living namesake and stayed down"),
    (1_088, "the same, after a change of the ttl"),
    (106, "a copy took the place of a data directory that somebody had brought back"),
    (157, "a member that waited for data to come back never looked whether it had"),
    (534, "a ttl was changed between a promotion and its record, and the leadership could not be recognised afterwards"),
    (1_015, "a member without a data directory kept up a lock that nobody led under"),
    (1_969, "a promotion by hand was not recognised when the leadership of the same number had ended before it was recorded"),
    (4_259, "without etcd's keys a member ran for the lock before everybody with data had said how far it is"),
    (2_926, "an order for a lease crossed the lease, and the daemon kept up one and used the other"),
    (12_773, "a lease of another ttl was granted before the former run's was taken over: the same"),
    (16_708, "a holder that was ending PostgreSQL did not say that it may write"),
    (26_995, "a guard stood still, and the daemon that had just started knew no deadline"),
    (28_616, "PostgreSQL was started again under a lock that was being given back"),
    (8_888, "a lock was kept up by another lease than the one it hangs on, which a run between had got"),
    (6_781, "a new guard was told of a lease that the lock had not moved to, and counted the lock by it"),
    (3_088, "a promotion was not on record while the leader's view was late, and those who elected the next one passed it over"),
    (5_747, "etcd was restored, and the leader went on by promises of fewer members than the record in it names"),
    (7_942, "a member out of the spec had the last leader's data and was passed over"),
    (11_358, "two members were promoted by hand to one number, and one followed the other"),
    (12_598, "a member promoted by hand and cut off was started behind the leader of an old view"),
    (7_522, "the member that ran initdb was taken out of the spec, gave its claim back, and another ran initdb beside its data"),
    (1_633, "the last word of a guard that had died overtook the news of it, and the member asked it for ever to start PostgreSQL"),
    (1_780, "etcd was restored and named the leader before the present one: the check's error, the limit is stated"),
    (1_057, "one promotion past its reservation after a promotion by hand, its host cut off: the check's error, not the machine's"),
];
