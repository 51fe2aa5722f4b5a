//! Faults at random, each a plausible one, then all healed: I1 at every step, and from wherever it got to the cluster comes together.
//!
//! A failure prints its seed, and the seed alone replays it: `PGHERD_SEED=7 cargo test --lib chaos`. `PGHERD_SEEDS=500` tries more.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::facts::cluster::{Ask, RequestProgress};
use crate::machine::action::OperationKind;
use crate::machine::tests::fixtures::{ms, name, spec_with};

use super::toy::Toy;

/// Seeds of an ordinary run.
const SEEDS: u64 = 12;
/// How long faults go on.
const STORM_S: u64 = 60;
/// How long everything may take to come together once they are over: leases, back-offs, abstention, copies.
const HEAL_S: u64 = 120;

const WITH_FAILSAFE: &str = "ha: { ttl: 10s, loop_wait: 5s, failsafe: true }";
const WITHOUT_FAILSAFE: &str = "ha: { ttl: 10s, loop_wait: 5s, failsafe: false }";

const THREE: [&str; 3] = ["a", "b", "c"];

/// Knuth's linear congruential generator, the upper half: enough for picking faults, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below
    }

    fn member(&mut self) -> &'static str {
        THREE[self.next(3)]
    }
}

const KINDS: [OperationKind; 10] = [
    OperationKind::PutMember,
    OperationKind::Acquire,
    OperationKind::Release,
    OperationKind::RecordPromotion,
    OperationKind::ClaimInitialize,
    OperationKind::Start,
    OperationKind::Promote,
    OperationKind::Clone,
    OperationKind::PlanRejoin,
    OperationKind::Look,
];

fn one_fault(toy: &mut Toy, random: &mut Random, requests: &mut usize) {
    let (member, now) = (random.member(), toy.now);
    let has_daemon = toy.hosts[&name(member)].daemon.is_some();
    let sees_etcd = toy.leader().is_none_or(|leader| {
        let host = &toy.hosts[&name(leader)];
        host.daemon.is_some() && host.connected && toy.etcd.up && host.server.guard.as_ref().is_some_and(|guard| !guard.frozen)
    });
    match random.next(19) {
        0 => toy.power_off(member),
        // Guard and daemon both unable to work, without a watchdog, is a limit that is stated (P1).
        1 => {
            toy.kill_daemon(member);
            if let Some(guard) = &mut toy.host(member).server.guard {
                guard.frozen = false;
            }
        }
        2 if has_daemon => toy.kill_guard(member),
        3 if has_daemon => toy.stop_daemon(member),
        4 => toy.host(member).server.crash(now),
        5 | 6 => toy.host(member).connected ^= true,
        7 => {
            if toy.etcd.up {
                toy.etcd.up = false;
            } else {
                toy.etcd.come_back(now);
            }
        }
        // A lock that goes early while its holder cannot be told is another (SAFETY 5, what remains).
        8 if sees_etcd => toy.etcd.by_hand(|keys| keys.leader = None),
        9 => {
            *requests += 1;
            let id = format!("{requests}");
            toy.ask(&id, Ask::Switchover { to: name(random.member()) });
        }
        10 | 11 => {
            let kind = KINDS[random.next(KINDS.len())];
            let lost = &mut toy.host(member).lost_answers;
            if !lost.remove(&kind) {
                lost.insert(kind);
            }
        }
        12 => toy.etcd.by_hand(|keys| {
            keys.members.remove(&name(member));
        }),
        13 if sees_etcd => {
            if let Some(lease) = toy.etcd.keys.members.get(&name(member)).map(|key| key.lease) {
                toy.etcd.revoke(lease);
            }
        }
        14 if toy.hosts[&name(member)].server.in_recovery() => toy.promote_by_hand(member),
        15 if has_daemon => {
            if let Some(guard) = &mut toy.host(member).server.guard {
                guard.frozen ^= true;
            }
        }
        16 => toy.host(member).server.crashes ^= true,
        17 => {
            let failsafe = random.next(2) == 0;
            toy.apply(spec_with(&THREE, &format!("ha: {{ ttl: 10s, loop_wait: 3s, failsafe: {failsafe} }}")));
        }
        18 => {
            let pair = (name(member), name(random.member()));
            if !toy.cut.remove(&pair) {
                toy.cut.insert(pair);
            }
        }
        _ => {}
    }
}

fn heal(toy: &mut Toy) {
    let now = toy.now;
    toy.cut.clear();
    if !toy.etcd.up {
        toy.etcd.come_back(now);
    }
    for member in THREE {
        let host = toy.host(member);
        host.connected = true;
        host.lost_answers.clear();
        host.server.crashes = false;
        if let Some(guard) = &mut host.server.guard {
            guard.frozen = false;
        }
        if host.daemon.is_none() {
            toy.start_daemon(member);
        }
    }
}

fn storm(seed: u64) {
    let mut random = Random(seed);
    random.next(1);
    // Half of the storms are under failsafe.
    let spec = spec_with(&THREE, if seed.is_multiple_of(2) { WITHOUT_FAILSAFE } else { WITH_FAILSAFE });
    let mut toy = if random.next(4) == 0 { Toy::new(&THREE) } else { Toy::working_with(&THREE, Arc::clone(&spec)) };
    if toy.etcd.keys.spec.is_none() {
        toy.apply(spec);
    }
    let until = toy.now + Duration::from_secs(STORM_S);
    let mut requests = 0;
    while toy.now < until {
        toy.run(ms(50 + random.next(4_000) as u64));
        one_fault(&mut toy, &mut random, &mut requests);
        // Who left comes back, as a supervisor would have it.
        let member = random.member();
        if toy.hosts[&name(member)].daemon.is_none() && random.next(2) == 0 {
            toy.start_daemon(member);
        }
    }
    heal(&mut toy);
    // Whoever left in the meantime (a stop in the last moment, a name taken) is started once more.
    toy.run(Duration::from_secs(30));
    heal(&mut toy);
    toy.converges(Duration::from_secs(HEAL_S));
    let open = |toy: &Toy| toy.etcd.keys.requests.values().any(|key| matches!(key.record.progress, RequestProgress::Created));
    toy.until("every request has been looked at", Duration::from_secs(30), |toy| !open(toy));
    toy.converges(Duration::from_secs(60));
    stays_calm(&mut toy);
}

/// L5: a healed cluster does nothing but report its positions.
fn stays_calm(toy: &mut Toy) {
    toy.run(Duration::from_secs(25));
    let (decisions, writes) = (toy.log.len(), toy.etcd.writes.len());
    toy.run(Duration::from_secs(20));
    assert_eq!(toy.log.len(), decisions, "decisions without a cause\n{}", toy.story());
    let written = toy.etcd.writes.len() - writes;
    assert!(written <= 4 * 8, "{written} writes in 20 s\n{}", toy.story());
    let conditions: Vec<String> = THREE
        .iter()
        .flat_map(|member| {
            toy.daemon(member).checked.world().conditions.values().map(move |condition| format!("{member}: {}", condition.message))
        })
        .collect();
    assert!(conditions.is_empty(), "conditions outlive what they are about: {conditions:#?}");
}

fn seeds() -> Range<u64> {
    let number = |key: &str| std::env::var(key).ok().and_then(|text| text.parse::<u64>().ok());
    match (number("PGHERD_SEED"), number("PGHERD_SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (None, count) => 0..count.unwrap_or(SEEDS),
    }
}

#[test]
fn l2_whatever_happened_a_healed_cluster_comes_together_and_stays_calm() {
    let failed: Vec<u64> = seeds().filter(|seed| std::panic::catch_unwind(|| storm(*seed)).is_err()).collect();
    assert!(failed.is_empty(), "seeds that failed, see above: {failed:?}");
}
