//! Scripts that a seed makes, from the same steps: mostly what a member would do, sometimes with somebody else's lease, lock or look.

use super::super::random::Random;
use super::script::{Hand, Judged, Lease, Script, Step, Thing};
use super::scripts::{IDENTITY, LONG_S, SHORT_S};

const SEEDS: u64 = 6;
const STEPS: usize = 60;
/// A lease runs out in every so many: that takes its time.
const RUNS_OUT_EVERY: u64 = 2;
/// Stream of the seed.
const STREAM: u64 = 61;

/// Each has a lease of its own that is its by right.
const MEMBERS: [(&str, Lease); 3] = [("a", 1), ("b", 2), ("c", 3)];
const LEASES: [Lease; 5] = [1, 2, 3, 4, 9];
const REQUESTS: [Lease; 2] = [11, 12];
const FAILSAFE: [&[&str]; 3] = [&["a", "b"], &["a"], &[]];

pub fn generated() -> Vec<Script> {
    (1..=SEEDS).map(script).collect()
}

fn script(seed: u64) -> Script {
    let mut random = Random::new(seed, STREAM);
    let mut steps: Vec<Step> = MEMBERS.map(|(_, lease)| Step::Grant { lease, ttl_s: LONG_S }).to_vec();
    steps.extend(MEMBERS.map(|(member, lease)| Step::Put { member, lease, run: 1 }));
    let runs_out_at = seed.is_multiple_of(RUNS_OUT_EVERY).then(|| STEPS / 2 + random.index(STEPS / 4));
    while steps.len() < STEPS {
        if Some(steps.len()) == runs_out_at {
            steps.extend(runs_out(&mut random));
        }
        steps.push(step(&mut random));
    }
    Script { name: format!("seed {seed}"), steps }
}

/// A lease that nobody renews in time, with what may hang on it.
fn runs_out(random: &mut Random) -> Vec<Step> {
    let (member, lease) = *random.pick(&MEMBERS);
    let mut steps = vec![
        Step::Revoke { lease },
        Step::Grant { lease, ttl_s: SHORT_S },
        Step::Put { member, lease, run: 2 },
        Step::Claim { member, lease },
        acquire(random, member, lease),
    ];
    if random.percent(50) {
        steps.push(Step::KeepAlive { lease });
    }
    steps.push(if random.percent(50) { Step::RunOut { lease } } else { Step::KeepAliveLate { lease } });
    steps.extend([Step::Grant { lease, ttl_s: LONG_S }, Step::Put { member, lease, run: 3 }]);
    steps
}

fn judged(random: &mut Random) -> Judged {
    if random.percent(75) { Judged::Now } else { Judged::Before }
}

fn acquire(random: &mut Random, member: &'static str, lease: Lease) -> Step {
    let initialize = random.percent(30).then(|| IDENTITY + random.below(10) / 9);
    Step::Acquire { member, lease, judged: judged(random), initialize }
}

fn step(random: &mut Random) -> Step {
    let (member, own) = *random.pick(&MEMBERS);
    let lease = if random.percent(85) { own } else { *random.pick(&LEASES) };
    // Mostly the lock that is held, if one is.
    let lock = if random.percent(80) { 0 } else { 1 + random.index(3) };
    let run = 1 + random.below(3);
    let judged = judged(random);
    match random.below(100) {
        0..10 => Step::Put { member, lease, run },
        10..15 => Step::PutOver { member, lease, run },
        15..19 => Step::Claim { member, lease },
        19..22 => Step::GiveUp { lease },
        22..30 => Step::Remember,
        30..46 => acquire(random, member, lease),
        46..48 => Step::Reaffirm { member, lock },
        48..51 => Step::Prove { lock, on: random.percent(30).then_some(lease) },
        51..56 => Step::Status { lock, lsn: random.below(1_000) },
        56..60 => Step::RecordPromotion { lock },
        60..65 => Step::Failsafe { lock, judged, members: random.pick::<&[&str]>(&FAILSAFE) },
        65..73 => Step::Release { lock, record: random.percent(60) },
        73..78 => Step::Move { member, lock: random.percent(60).then_some(lock), from: own, to: *random.pick(&LEASES) },
        78..81 => Step::Ask { request: *random.pick(&REQUESTS), ttl_s: LONG_S },
        81..85 => Step::Answer { request: *random.pick(&REQUESTS), judged, word: random.pick::<&str>(&["taken", "done"]) },
        85 => Step::ClearRequest { request: *random.pick(&REQUESTS) },
        86..90 => Step::KeepAlive { lease },
        90 => Step::GrantedTtl { lease },
        91 => Step::Revoke { lease: *random.pick(&REQUESTS) },
        92 => Step::Revoke { lease },
        93..95 => Step::Grant { lease: *random.pick(&LEASES[..4]), ttl_s: LONG_S },
        _ => Step::ByHand(hand(random, member, lease)),
    }
}

fn hand(random: &mut Random, holder: &'static str, lease: Lease) -> Hand {
    match random.below(20) {
        0..12 => Hand::Delete(*random.pick(&Thing::ALL)),
        12..15 => Hand::PutLeader { holder, on: random.percent(70).then_some(lease) },
        15..18 => Hand::PutSync,
        18 => Hand::Pause,
        _ => Hand::PutInitialize(IDENTITY),
    }
}
