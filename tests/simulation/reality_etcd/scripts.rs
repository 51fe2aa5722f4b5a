//! The scripts, by what they are about. What none of us thought of is `generated`.

use super::Group;
use super::generated::generated;
use super::script::Judged::{Before, Now};
use super::script::Step::{
    Acquire, Answer, Ask, ByHand, Claim, ClearRequest, Failsafe, GiveUp, Grant, GrantedTtl, Halfway, KeepAlive, KeepAliveLate,
    LeaderKilled, LeaderMoves, Move, Prove, Put, PutOver, Reaffirm, RecordPromotion, Release, Remember, Revoke, RunOut, Status,
};
use super::script::{Hand, Judged, Lease, Script, Step, Thing};

/// Of a lease that does not run out while a script runs.
pub const LONG_S: u64 = 60;
/// Of one that does: etcd's least.
pub const SHORT_S: u64 = 2;
/// Of one that is half over while etcd has no leader.
const ELECTED_S: u64 = 3;
/// The identity that members find in their control files.
pub const IDENTITY: u64 = 7_000_000_042;

pub const GROUPS: &[Group] = &[
    Group {
        promise: "the_lock_is_taken_and_missed_for_the_same_reasons_in_the_model",
        members: 1,
        scripts: the_lock,
        met: &[
            "Acquired",
            "Held",
            "HistoryMoved",
            "SyncMoved",
            "FailsafeMoved",
            "MemberKeyNotOurs",
            "InitializeTaken",
            "(\"proof\", true)",
            "(\"proof\", false)",
        ],
    },
    Group { promise: "the_same_writes_are_fenced_off_in_the_model", members: 1, scripts: writes, met: &["Acquired"] },
    Group { promise: "keys_hang_on_leases_and_run_out_with_them_in_the_model_too", members: 1, scripts: leases, met: &["Acquired"] },
    Group { promise: "leases_begin_anew_with_etcds_next_leader_in_the_model_too", members: 3, scripts: elections, met: &["Acquired"] },
    Group {
        promise: "sequences_that_nobody_thought_of_end_alike_in_the_model",
        members: 1,
        scripts: generated,
        met: &["Acquired", "Held", "HistoryMoved", "MemberKeyNotOurs", "(\"proof\", true)", "(\"proof\", false)"],
    },
];

fn script(name: &str, steps: Vec<Step>) -> Script {
    Script { name: name.to_owned(), steps }
}

/// Members `a`, `b` on leases 1, 2, nobody leads.
fn members(then: Vec<Step>) -> Vec<Step> {
    let mut steps = vec![
        Grant { lease: 1, ttl_s: LONG_S },
        Grant { lease: 2, ttl_s: LONG_S },
        Put { member: "a", lease: 1, run: 1 },
        Put { member: "b", lease: 2, run: 1 },
    ];
    steps.extend(then);
    steps
}

/// The same, and `a` leads.
fn led(then: Vec<Step>) -> Vec<Step> {
    let mut steps = members(vec![acquire("a", 1, Now)]);
    steps.extend(then);
    steps
}

fn acquire(member: &'static str, lease: Lease, judged: Judged) -> Step {
    Acquire { member, lease, judged, initialize: None }
}

fn first(member: &'static str, lease: Lease, id: u64) -> Step {
    Acquire { member, lease, judged: Now, initialize: Some(id) }
}

fn by_hand(hand: Hand) -> Step {
    ByHand(hand)
}

fn delete(thing: Thing) -> Step {
    ByHand(Hand::Delete(thing))
}

fn the_lock() -> Vec<Script> {
    let release = || Release { lock: 0, record: true };
    vec![
        script(
            "taken, held, asked for twice, given up and taken by the next",
            led(vec![
                acquire("a", 1, Now),
                acquire("b", 2, Now),
                acquire("b", 1, Now),
                Prove { lock: 0, on: None },
                Prove { lock: 0, on: Some(2) },
                release(),
                Prove { lock: 0, on: None },
                acquire("b", 2, Now),
                Prove { lock: 0, on: None },
                Prove { lock: 1, on: None },
            ]),
        ),
        script(
            "judged on what is over",
            members(vec![
                Remember,
                acquire("a", 1, Now),
                release(),
                acquire("b", 2, Before),
                Remember,
                by_hand(Hand::PutSync),
                acquire("b", 2, Before),
                Remember,
                acquire("b", 2, Now),
                Failsafe { lock: 0, judged: Now, members: &["a", "b"] },
                release(),
                Remember,
                acquire("a", 1, Now),
                Failsafe { lock: 0, judged: Now, members: &["a"] },
                release(),
                acquire("b", 2, Before),
                delete(Thing::Failsafe),
                Remember,
                by_hand(Hand::PutSync),
                delete(Thing::Sync),
                acquire("b", 2, Before),
                delete(Thing::History),
                acquire("b", 2, Before),
                acquire("b", 2, Now),
            ]),
        ),
        script(
            "who may lead has changed, and nothing else",
            led(vec![
                Failsafe { lock: 0, judged: Now, members: &["a", "b"] },
                delete(Thing::Leader),
                Remember,
                delete(Thing::Failsafe),
                acquire("b", 2, Before),
                acquire("b", 2, Now),
            ]),
        ),
        script(
            "without a member key of one's own",
            vec![
                Grant { lease: 1, ttl_s: LONG_S },
                acquire("a", 1, Now),
                Grant { lease: 2, ttl_s: LONG_S },
                Put { member: "a", lease: 2, run: 1 },
                acquire("a", 1, Now),
                acquire("a", 9, Now),
                Revoke { lease: 2 },
                acquire("a", 2, Now),
                Put { member: "a", lease: 1, run: 1 },
                acquire("a", 1, Now),
            ],
        ),
        script(
            "the cluster's first",
            members(vec![
                Claim { member: "a", lease: 2 },
                Claim { member: "c", lease: 1 },
                Claim { member: "a", lease: 1 },
                Claim { member: "a", lease: 1 },
                Claim { member: "b", lease: 2 },
                first("b", 2, IDENTITY),
                GiveUp { lease: 2 },
                GiveUp { lease: 1 },
                GiveUp { lease: 1 },
                Claim { member: "b", lease: 2 },
                first("b", 2, IDENTITY),
                GiveUp { lease: 2 },
                Claim { member: "a", lease: 1 },
                release(),
                first("a", 1, IDENTITY + 1),
                first("a", 1, IDENTITY),
                Revoke { lease: 1 },
                delete(Thing::Initialize),
                Claim { member: "b", lease: 2 },
                Revoke { lease: 2 },
            ]),
        ),
        script(
            "an identity that somebody typed",
            members(vec![
                by_hand(Hand::PutInitialize(IDENTITY)),
                Claim { member: "a", lease: 1 },
                GiveUp { lease: 1 },
                first("a", 1, 1),
                first("a", 1, IDENTITY),
            ]),
        ),
        script(
            "changed by hand under the leader",
            led(vec![
                by_hand(Hand::PutLeader { holder: "a", on: None }),
                Prove { lock: 0, on: None },
                acquire("a", 1, Now),
                Revoke { lease: 1 },
                delete(Thing::Leader),
                delete(Thing::Leader),
                by_hand(Hand::PutLeader { holder: "b", on: Some(2) }),
                acquire("b", 2, Now),
                Prove { lock: 0, on: None },
                by_hand(Hand::PutLeader { holder: "b", on: Some(2) }),
                Prove { lock: 0, on: None },
                by_hand(Hand::PutLeader { holder: "somebody", on: Some(2) }),
                acquire("b", 2, Now),
                Prove { lock: 0, on: None },
                Release { lock: 0, record: false },
            ]),
        ),
        script(
            "everything is wiped",
            led(vec![
                by_hand(Hand::Pause),
                Status { lock: 0, lsn: 5 },
                by_hand(Hand::Wipe),
                by_hand(Hand::Wipe),
                Prove { lock: 0, on: None },
                Status { lock: 0, lsn: 6 },
                acquire("a", 1, Now),
                Put { member: "a", lease: 1, run: 1 },
                acquire("a", 1, Now),
                Prove { lock: 1, on: None },
                delete(Thing::Maintenance),
            ]),
        ),
    ]
}

fn writes() -> Vec<Script> {
    vec![
        script(
            "status, history and failsafe, by the leader and by one that was",
            led(vec![
                Status { lock: 0, lsn: 1 },
                Status { lock: 0, lsn: 1 },
                RecordPromotion { lock: 0 },
                Remember,
                Failsafe { lock: 0, judged: Now, members: &["a", "b"] },
                Failsafe { lock: 0, judged: Before, members: &["a"] },
                Failsafe { lock: 0, judged: Now, members: &["a", "b"] },
                Failsafe { lock: 0, judged: Before, members: &[] },
                Failsafe { lock: 0, judged: Now, members: &[] },
                Failsafe { lock: 0, judged: Now, members: &[] },
                Failsafe { lock: 0, judged: Now, members: &["b"] },
                Release { lock: 0, record: true },
                acquire("b", 2, Now),
                Status { lock: 1, lsn: 2 },
                RecordPromotion { lock: 1 },
                Failsafe { lock: 1, judged: Now, members: &["a"] },
                Status { lock: 0, lsn: 3 },
            ]),
        ),
        script(
            "released with a record, without one, and once more",
            led(vec![
                Release { lock: 0, record: true },
                Release { lock: 0, record: true },
                Release { lock: 0, record: false },
                acquire("b", 2, Now),
                Release { lock: 1, record: true },
                Release { lock: 0, record: false },
                Release { lock: 0, record: false },
                acquire("a", 1, Now),
                Release { lock: 0, record: true },
                delete(Thing::Release),
                Release { lock: 0, record: true },
                Release { lock: 9, record: true },
            ]),
        ),
        script(
            "the lock's key is written again",
            led(vec![
                Reaffirm { member: "a", lock: 0 },
                Prove { lock: 0, on: None },
                Release { lock: 0, record: true },
                Reaffirm { member: "a", lock: 0 },
                acquire("b", 2, Now),
                Reaffirm { member: "a", lock: 0 },
                Reaffirm { member: "b", lock: 1 },
            ]),
        ),
        script(
            "keys move to another lease",
            led(vec![
                Grant { lease: 3, ttl_s: LONG_S },
                Move { member: "a", lock: Some(0), from: 2, to: 3 },
                Move { member: "a", lock: Some(0), from: 1, to: 9 },
                Move { member: "a", lock: Some(0), from: 1, to: 3 },
                Move { member: "a", lock: Some(0), from: 1, to: 3 },
                Prove { lock: 0, on: None },
                Prove { lock: 0, on: Some(3) },
                Move { member: "a", lock: Some(0), from: 3, to: 3 },
                Revoke { lease: 1 },
                Move { member: "b", lock: Some(0), from: 2, to: 3 },
                Move { member: "b", lock: None, from: 2, to: 3 },
                Move { member: "b", lock: None, from: 2, to: 3 },
                Grant { lease: 1, ttl_s: LONG_S },
                by_hand(Hand::PutLeader { holder: "somebody", on: Some(3) }),
                Move { member: "a", lock: Some(0), from: 3, to: 1 },
                by_hand(Hand::PutLeader { holder: "a", on: None }),
                Move { member: "a", lock: Some(0), from: 1, to: 3 },
                Move { member: "a", lock: None, from: 1, to: 3 },
                Revoke { lease: 3 },
                Move { member: "a", lock: None, from: 3, to: 1 },
            ]),
        ),
        script(
            "a member's own record",
            vec![
                Grant { lease: 1, ttl_s: LONG_S },
                Remember,
                Put { member: "a", lease: 9, run: 1 },
                Put { member: "a", lease: 1, run: 1 },
                Put { member: "a", lease: 1, run: 1 },
                PutOver { member: "a", lease: 1, run: 1 },
                PutOver { member: "a", lease: 1, run: 2 },
                Remember,
                PutOver { member: "a", lease: 1, run: 2 },
                PutOver { member: "a", lease: 1, run: 3 },
                Grant { lease: 2, ttl_s: LONG_S },
                Put { member: "a", lease: 2, run: 4 },
                PutOver { member: "a", lease: 2, run: 4 },
                Remember,
                delete(Thing::Member("a")),
                PutOver { member: "a", lease: 1, run: 5 },
                Put { member: "a", lease: 2, run: 6 },
                PutOver { member: "a", lease: 1, run: 6 },
                Revoke { lease: 2 },
                Put { member: "a", lease: 2, run: 7 },
                Remember,
                Put { member: "a", lease: 1, run: 8 },
                Revoke { lease: 1 },
                PutOver { member: "a", lease: 1, run: 9 },
            ],
        ),
        script(
            "requests",
            vec![
                Ask { request: 5, ttl_s: LONG_S },
                Remember,
                Answer { request: 5, judged: Now, word: "taken" },
                Answer { request: 5, judged: Before, word: "taken" },
                Answer { request: 5, judged: Before, word: "refused" },
                Answer { request: 5, judged: Now, word: "done" },
                Answer { request: 8, judged: Now, word: "nobody asked" },
                ClearRequest { request: 5 },
                ClearRequest { request: 5 },
                Answer { request: 5, judged: Before, word: "done" },
                Ask { request: 6, ttl_s: LONG_S },
                Answer { request: 6, judged: Now, word: "taken" },
                Revoke { lease: 6 },
                Answer { request: 6, judged: Now, word: "done" },
            ],
        ),
    ]
}

fn leases() -> Vec<Script> {
    vec![
        script(
            "what hangs on it goes with it",
            members(vec![
                Claim { member: "a", lease: 1 },
                Revoke { lease: 1 },
                Revoke { lease: 1 },
                GrantedTtl { lease: 1 },
                KeepAlive { lease: 1 },
                GrantedTtl { lease: 9 },
                KeepAlive { lease: 9 },
                KeepAlive { lease: 2 },
                acquire("b", 2, Now),
                Release { lock: 0, record: true },
                acquire("b", 2, Now),
                Status { lock: 0, lsn: 4 },
                Failsafe { lock: 0, judged: Now, members: &["b"] },
                Revoke { lease: 2 },
                Grant { lease: 3, ttl_s: LONG_S },
                Put { member: "b", lease: 3, run: 2 },
                acquire("b", 3, Now),
            ]),
        ),
        script(
            "a ttl below etcd's least is raised to it",
            vec![
                Grant { lease: 1, ttl_s: 1 },
                GrantedTtl { lease: 1 },
                KeepAlive { lease: 1 },
                Put { member: "a", lease: 1, run: 1 },
                RunOut { lease: 1 },
                Grant { lease: 2, ttl_s: 5 },
                GrantedTtl { lease: 2 },
                KeepAlive { lease: 2 },
            ],
        ),
        script(
            "the leader's lease runs out",
            members(vec![
                Grant { lease: 3, ttl_s: SHORT_S },
                Put { member: "c", lease: 3, run: 1 },
                acquire("c", 3, Now),
                KeepAlive { lease: 3 },
                RunOut { lease: 3 },
                Prove { lock: 0, on: None },
                Status { lock: 0, lsn: 1 },
                KeepAlive { lease: 3 },
                GrantedTtl { lease: 3 },
                acquire("a", 1, Now),
            ]),
        ),
        script(
            "a request runs out",
            vec![
                Ask { request: 5, ttl_s: SHORT_S },
                Answer { request: 5, judged: Now, word: "taken" },
                RunOut { lease: 5 },
                Answer { request: 5, judged: Now, word: "done" },
            ],
        ),
        script(
            "a renewal begins the ttl anew, and one that is late does not",
            vec![
                Grant { lease: 1, ttl_s: SHORT_S },
                Put { member: "a", lease: 1, run: 1 },
                Claim { member: "a", lease: 1 },
                Halfway { lease: 1 },
                KeepAlive { lease: 1 },
                KeepAliveLate { lease: 1 },
                GrantedTtl { lease: 1 },
                Put { member: "a", lease: 1, run: 1 },
            ],
        ),
    ]
}

fn elections() -> Vec<Script> {
    vec![
        script(
            "a leader that hands over",
            members(vec![
                Grant { lease: 3, ttl_s: ELECTED_S },
                Put { member: "c", lease: 3, run: 1 },
                acquire("c", 3, Now),
                Halfway { lease: 3 },
                LeaderMoves,
                Prove { lock: 0, on: None },
                RunOut { lease: 3 },
                acquire("a", 1, Now),
            ]),
        ),
        script(
            "a leader that is killed",
            members(vec![
                Grant { lease: 3, ttl_s: ELECTED_S },
                Put { member: "c", lease: 3, run: 1 },
                acquire("c", 3, Now),
                Halfway { lease: 3 },
                LeaderKilled,
                KeepAlive { lease: 1 },
                GrantedTtl { lease: 3 },
                RunOut { lease: 3 },
                acquire("a", 1, Now),
            ]),
        ),
    ]
}
