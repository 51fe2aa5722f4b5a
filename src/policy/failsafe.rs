//! Decides what failsafe rests on: which record is to be in etcd, who may promise not to run, and what holds a member back. Never talks
//! to anybody.
//!
//! While a leader goes on without etcd nobody else can have taken the lock: whoever may take it is in the record (others never run), each
//! promised, when it was called, not to send an acquiring transaction for a ttl from then on, none had one under way when it promised,
//! and a daemon that starts does not run for one ttl, so that a restart loses no promise. The leader's E counts from before it called.
//!
//! The rule that would surprise: a record is never changed on the word of a promise. What is new in it has promised nothing; so the
//! leader first stops relying on promises, then has its lock proved by etcd, then writes.

use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, FailsafeRecord, HistoryEntry, LeaderKey};
use crate::facts::failsafe::{Armed, FEATURE, PromiseAsk};
use crate::mutants::{Mutant, mutant};
use crate::policy::deadlines::{TTL_MAX_SECONDS, TTL_MIN_SECONDS};
use crate::spec::cluster::{ClusterSpec, Member};
use crate::types::{Epoch, LockIdentity, MemberName, Revision};

/// The key's name in [`ClusterView::unreadable`].
const KEY: &str = "failsafe";

/// What `failsafe` should hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// This.
    Record(FailsafeRecord),
    /// Nothing: the spec says so.
    Off,
    /// Nothing yet: a sentence says who is waited for.
    Waits(String),
}

impl Wanted {
    /// The record, if there is to be one.
    pub fn record(self) -> Option<FailsafeRecord> {
        match self {
            Wanted::Record(record) => Some(record),
            Wanted::Off | Wanted::Waits(_) => None,
        }
    }
}

/// What the leader has to see to. The rule is in force once every declared member that may lead has said that its daemon knows it; one
/// that has said so, is in the record and is down later does not take it out of force.
pub fn wanted(spec: &ClusterSpec, view: &ClusterView, ttl: Duration) -> Wanted {
    if !spec.ha.failsafe {
        return Wanted::Off;
    }
    let may_lead = || spec.members.iter().filter(|member| !member.nofailover());
    let said_so = |member: &Member| match view.members.get(&member.name) {
        Some(key) => key.knows(FEATURE),
        None => view.failsafe.as_ref().is_some_and(|record| record.members.contains_key(&member.name)),
    };
    match may_lead().find(|member| !said_so(member)) {
        Some(member) if view.members.contains_key(&member.name) => {
            Wanted::Waits(format!("failsafe is not in force: the daemon of `{}` does not know it", member.name))
        }
        Some(member) => Wanted::Waits(format!("failsafe is not in force: `{}` has not said that its daemon knows it", member.name)),
        None => Wanted::Record(FailsafeRecord {
            ttl_s: ttl.as_secs(),
            members: may_lead().map(|member| (member.name.clone(), member.api_url())).collect(),
        }),
    }
}

/// Whether `failsafe` has to be written, or written again. `written` is the revision at which this run of the daemon wrote it: a record
/// that somebody else wrote is not relied on, because a write of theirs may still be on its way.
pub fn has_to_be_written(wanted: &Wanted, view: &ClusterView, written: Option<Revision>) -> bool {
    if written.is_some_and(|at| view.revision < at) {
        return false;
    }
    match wanted {
        Wanted::Record(record) => view.failsafe.as_ref() != Some(record) || written != Some(view.failsafe_revision),
        Wanted::Off | Wanted::Waits(_) => view.failsafe.is_some() || view.unreadable.contains_key(KEY),
    }
}

/// What the leader may go on with: the wanted record, as this run wrote it and sees it in etcd, names it.
pub fn armed(me: &MemberName, lock: LockIdentity, wanted: Wanted, view: &ClusterView, written: Option<Revision>) -> Option<Armed> {
    let record = wanted.record()?;
    let seen = view.failsafe.as_ref() == Some(&record) && written == Some(view.failsafe_revision);
    let mut peers = record.members;
    let named = peers.remove(me).is_some();
    (seen && named).then_some(Armed { lock, peers })
}

/// What a member that is called knows of itself and of the caller.
#[derive(Debug)]
pub struct Called<'a> {
    /// Who is called.
    pub me: &'a MemberName,
    /// It holds a lock, or thinks so, or its guard does; or its PostgreSQL may be writable.
    pub leads: bool,
    /// It is taking the lock.
    pub acquiring: bool,
    /// Another run of a daemon has its name: that one may run.
    pub impostor: bool,
    /// The leader key that it saw last, also when it is absent now.
    pub leader_seen: Option<&'a LeaderKey>,
    /// etcd's keys, if it has seen any since its start.
    pub view: Option<&'a ClusterView>,
}

/// Whether it promises not to run, and for how long.
///
/// # Errors
/// Why not: a sentence.
pub fn may_promise(called: &Called<'_>, ask: &PromiseAsk) -> Result<Duration, String> {
    if ask.to != *called.me {
        return Err(format!("this is `{}` and not `{}`", called.me, ask.to));
    }
    if !(TTL_MIN_SECONDS..=TTL_MAX_SECONDS).contains(&ask.ttl_s) {
        return Err(format!("a ttl of {} s is none", ask.ttl_s));
    }
    if called.impostor {
        return Err(format!("another daemon is named `{}`", called.me));
    }
    if called.leads {
        return Err("this member holds a lock, or its PostgreSQL may be writable".to_owned());
    }
    if called.acquiring {
        return Err("this member is taking the lock".to_owned());
    }
    if called.view.and_then(|view| view.release.as_ref()).is_some_and(|release| release.epoch == ask.epoch) {
        return Err(format!("the leadership of epoch {} was released", ask.epoch));
    }
    if !is_the_last_leadership(called, ask) {
        return Err(format!("the last leadership is another than that of `{}` of epoch {}", ask.member, ask.epoch));
    }
    Ok(Duration::from_secs(ask.ttl_s))
}

/// By the leader key seen last; by `history`, if none was there since the start. Nothing is known before the first view: then the caller
/// may be right, and is believed.
fn is_the_last_leadership(called: &Called<'_>, ask: &PromiseAsk) -> bool {
    if let Some(seen) = called.leader_seen {
        return seen.holder == ask.member.as_str() && seen.epoch == ask.epoch && seen.lease == ask.lease;
    }
    let Some(view) = called.view else { return true };
    let taken_on = |entry: &HistoryEntry| entry.continued.map_or(entry.lease, |continued| continued.lease);
    view.history.last().is_some_and(|entry| entry.is_of(ask.epoch) && entry.member == ask.member && taken_on(entry) == ask.lease)
}

/// A promise not to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promise {
    /// To whom.
    pub to: MemberName,
    /// For the sake of which leadership. None = of several.
    pub epoch: Option<Epoch>,
    /// Until when.
    pub until: BootTime,
}

impl Promise {
    /// The leader that it was given to has let its lock go in good order: it does not go on under it.
    pub fn is_released(&self, view: &ClusterView) -> bool {
        view.release.as_ref().is_some_and(|release| self.epoch == Some(release.epoch))
    }
}

/// One promise more. None is ever shortened.
pub fn promised(before: Option<Promise>, ask: &PromiseAsk, received: BootTime, ttl: Duration, now: BootTime) -> Promise {
    let new = Promise { to: ask.member.clone(), epoch: Some(ask.epoch), until: received + ttl };
    match before.filter(|before| before.until > now) {
        Some(before) => Promise { until: before.until.max(new.until), epoch: new.epoch.filter(|_| before.epoch == new.epoch), ..new },
        None => new,
    }
}

/// What holds a member back from running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeldBack {
    /// As long as the record is as it is.
    Never(String),
    /// Until then.
    Until(BootTime, String),
}

/// Whether a member is held back, on the view that it would take the lock on: the transaction compares the record's revision.
pub fn held_back(now: BootTime, me: &MemberName, view: &ClusterView, promise: Option<&Promise>, started: BootTime) -> Option<HeldBack> {
    if let Some(why) = view.unreadable.get(KEY) {
        return Some(HeldBack::Never(format!("the key failsafe is unreadable, and may name others only: {why}")));
    }
    if let Some(promise) = promise.filter(|promise| now < promise.until && !promise.is_released(view)) {
        let why = format!("promised `{}`, which leads without etcd, not to run", promise.to);
        return Some(HeldBack::Until(promise.until, why));
    }
    let record = view.failsafe.as_ref()?;
    if !record.members.contains_key(me) && !mutant(Mutant::OutsidersRun) {
        return Some(HeldBack::Never("the key failsafe does not name this member: the leader may go on without its promise".to_owned()));
    }
    // Who left in good order goes on under no promise, and whoever takes the lock next removes the record of it: as long as it is there,
    // nobody relies on what a run before this may have promised.
    if view.release.is_some() {
        return None;
    }
    let bound_until = started + Duration::from_secs(record.ttl_s);
    (now < bound_until && !mutant(Mutant::PromiseForgotten)).then(|| {
        let why = "the run of this daemon before may have promised not to run: it waits one ttl from its start".to_owned();
        HeldBack::Until(bound_until, why)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::cluster::{Continued, MemberRole, ReleaseRecord};
    use crate::machine::tests::fixtures::{T0, key, leader, lock, ms, name, record, recorded, spec_with, view};
    use crate::types::{LeaseId, Lsn, TimelineId};

    const TTL: Duration = Duration::from_secs(10);
    const ON: &str = "ha: { ttl: 10s, failsafe: true }";

    /// Three members that all know the rule, and a record that the leader `a` wrote at revision 40.
    fn in_force() -> ClusterView {
        let mut view = view(60);
        for member in ["a", "b", "c"] {
            view.members.insert(name(member), key(record(MemberRole::Replica, 1, 1), 7));
        }
        view.leader = Some(leader("a", 7, 10));
        view.history = vec![recorded(1, "a", 7, 10, 0, 0)];
        view.failsafe = wanted(&spec_with(&["a", "b", "c"], ON), &view, TTL).record();
        view.failsafe_revision = Revision(40);
        view
    }

    fn waits(spec: &ClusterSpec, view: &ClusterView) -> String {
        match wanted(spec, view, TTL) {
            Wanted::Waits(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_record_names_every_declared_member_that_may_lead_with_its_address_and_the_leases_ttl() {
        let spec = spec_with(&["a", "b, failover_priority: 0", "c, tags: { nofailover: true }", "d, api_port: 8009"], ON);
        let mut view = in_force();
        view.members.insert(name("d"), key(record(MemberRole::Replica, 1, 1), 7));
        let record = wanted(&spec, &view, TTL).record().unwrap();
        assert_eq!(record.ttl_s, 10);
        let expected = [("a", "http://10.0.0.1:8008"), ("d", "http://10.0.0.4:8009")];
        assert_eq!(record.members, expected.map(|(member, url)| (name(member), url.to_owned())).into());
    }

    #[test]
    fn the_rule_is_in_force_once_every_member_that_may_lead_says_that_it_knows_it_and_stays_so_when_one_is_down() {
        let spec = spec_with(&["a", "b", "c"], ON);
        let mut view = in_force();
        let known = view.failsafe.take();
        view.members.remove(&name("c"));
        assert!(waits(&spec, &view).contains("`c` has not said"));
        view.failsafe = known;
        assert!(matches!(wanted(&spec, &view, TTL), Wanted::Record(_)), "it said so once, and is down");
        view.members.insert(name("c"), key(record(MemberRole::Replica, 1, 1), 7));
        view.members.get_mut(&name("c")).unwrap().record.features.clear();
        assert!(waits(&spec, &view).contains("the daemon of `c` does not know it"), "it came back as an older one");
        view.failsafe = None;
        assert_eq!(wanted(&spec_with(&["a", "b"], "ha: { failsafe: false }"), &view, TTL), Wanted::Off);
        assert!(matches!(wanted(&spec_with(&["a", "b"], ON), &view, TTL), Wanted::Record(_)), "an undeclared one never runs");
    }

    #[test]
    fn a_record_is_relied_on_only_as_this_run_wrote_it_and_sees_it() {
        let (spec, view) = (spec_with(&["a", "b", "c"], ON), in_force());
        let relied_on = |view: &ClusterView, written: i64| {
            armed(&name("a"), lock(7, 10), wanted(&spec, view, TTL), view, Some(Revision(written))).map(|armed| armed.peers.len())
        };
        assert_eq!(relied_on(&view, 40), Some(2), "all but itself");
        assert_eq!(relied_on(&view, 39), None, "somebody wrote after it");
        let of_another_ttl = wanted(&spec, &view, Duration::from_secs(20));
        assert_eq!(armed(&name("a"), lock(7, 10), of_another_ttl, &view, Some(Revision(40))), None);
        let without_us = spec_with(&["a, failover_priority: 0", "b", "c"], ON);
        let mut named = view.clone();
        named.failsafe = wanted(&without_us, &view, TTL).record();
        assert_eq!(armed(&name("a"), lock(7, 10), wanted(&without_us, &named, TTL), &named, Some(Revision(40))), None);
    }

    #[test]
    fn the_record_is_written_once_by_each_run_and_again_when_it_is_not_what_it_should_be() {
        let (spec, mut view) = (spec_with(&["a", "b", "c"], ON), in_force());
        let due = |view: &ClusterView, written: Option<i64>| has_to_be_written(&wanted(&spec, view, TTL), view, written.map(Revision));
        assert!(due(&view, None), "a write of the run before may be on its way");
        assert!(!due(&view, Some(40)));
        assert!(!due(&view, Some(61)), "the view is older than the write");
        view.failsafe_revision = Revision(41);
        assert!(due(&view, Some(40)), "somebody's hand");
        view.failsafe.as_mut().unwrap().members.remove(&name("c"));
        assert!(due(&view, Some(41)));
        assert!(has_to_be_written(&Wanted::Off, &view, Some(Revision(41))), "it has to go");
        (view.failsafe, view.failsafe_revision) = (None, Revision(0));
        assert!(!has_to_be_written(&Wanted::Off, &view, None));
        view.unreadable.insert("failsafe".to_owned(), "?".to_owned());
        assert!(has_to_be_written(&Wanted::Off, &view, None));
    }

    fn ask() -> PromiseAsk {
        PromiseAsk { cluster: "main".parse().unwrap(), to: name("b"), member: name("a"), epoch: Epoch(10), lease: LeaseId(7), ttl_s: 10 }
    }

    fn asked(change: impl FnOnce(&mut PromiseAsk, &mut ClusterView, &mut Called<'_>)) -> Result<Duration, String> {
        let (mut ask, mut view, me) = (ask(), in_force(), name("b"));
        let mut called = Called { me: &me, leads: false, acquiring: false, impostor: false, leader_seen: None, view: None };
        change(&mut ask, &mut view, &mut called);
        let seen = view.leader.clone();
        may_promise(&Called { leader_seen: called.leader_seen.or(seen.as_ref()), view: Some(&view), ..called }, &ask)
    }

    #[test]
    fn a_member_that_cannot_lead_now_promises_the_leader_it_knows_for_the_leases_ttl() {
        assert_eq!(asked(|_, _, _| {}), Ok(TTL));
        assert_eq!(asked(|ask, _, _| ask.ttl_s = 300), Ok(Duration::from_secs(300)));
    }

    #[test]
    fn a_promise_is_refused_by_whom_it_would_not_bind_and_to_whom_it_is_not_due() {
        for (because, answer) in [
            ("not `c`", asked(|ask, _, _| ask.to = name("c"))),
            ("holds a lock", asked(|_, _, called| called.leads = true)),
            ("taking the lock", asked(|_, _, called| called.acquiring = true)),
            ("another daemon", asked(|_, _, called| called.impostor = true)),
            ("a ttl of 2 s", asked(|ask, _, _| ask.ttl_s = 2)),
            ("a ttl of 301 s", asked(|ask, _, _| ask.ttl_s = 301)),
            ("another", asked(|ask, _, _| ask.member = name("c"))),
            ("another", asked(|ask, _, _| ask.epoch = Epoch(9))),
            ("another", asked(|ask, _, _| ask.lease = LeaseId(8))),
            (
                "released",
                asked(|_, view, _| {
                    view.release = Some(ReleaseRecord { epoch: Epoch(10), timeline: TimelineId(1), lsn: Lsn(1), to: None, all_seen: true });
                }),
            ),
        ] {
            let why = answer.unwrap_err();
            assert!(why.contains(because), "{why}, expected: {because}");
        }
    }

    #[test]
    fn a_daemon_that_never_saw_a_leader_goes_by_history_and_believes_the_caller_before_its_first_view() {
        let (me, mut vacant) = (name("b"), in_force());
        vacant.leader = None;
        let promise = |view: Option<&ClusterView>, ask: &PromiseAsk| {
            may_promise(&Called { me: &me, leads: false, acquiring: false, impostor: false, leader_seen: None, view }, ask).is_ok()
        };
        assert!(promise(None, &ask()));
        assert!(promise(Some(&vacant), &ask()));
        for wrong in
            [PromiseAsk { epoch: Epoch(11), ..ask() }, PromiseAsk { lease: LeaseId(8), ..ask() }, PromiseAsk { member: name("c"), ..ask() }]
        {
            assert!(!promise(Some(&vacant), &wrong), "{wrong:?}");
        }
        vacant.history[0].continued = Some(Continued { lease: LeaseId(8), epoch: Some(Epoch(20)) });
        assert!(promise(Some(&vacant), &PromiseAsk { epoch: Epoch(20), lease: LeaseId(8), ..ask() }));
        vacant.history.push(recorded(2, "c", 9, 30, 1, 1));
        assert!(!promise(Some(&vacant), &ask()), "another led after it");
    }

    #[test]
    fn a_promise_is_never_shortened_and_one_for_two_leaderships_is_released_by_neither() {
        let first = promised(None, &ask(), T0, TTL, T0);
        assert_eq!((first.until, first.epoch), (T0 + TTL, Some(Epoch(10))));
        let again = promised(Some(first.clone()), &PromiseAsk { ttl_s: 3, ..ask() }, T0 + ms(100), ms(3_000), T0 + ms(100));
        assert_eq!((again.until, again.epoch), (T0 + TTL, Some(Epoch(10))));
        let other = PromiseAsk { epoch: Epoch(20), ..ask() };
        assert_eq!(promised(Some(again), &other, T0 + ms(200), TTL, T0 + ms(200)).epoch, None);
        let later = T0 + TTL;
        assert_eq!(promised(Some(first), &other, later, TTL, later).epoch, Some(Epoch(20)), "the one before is over");
    }

    #[test]
    fn a_member_is_held_back_by_its_promise_by_a_fresh_start_and_by_a_record_that_does_not_name_it() {
        let (mut view, promise, long_ago) = (in_force(), promised(None, &ask(), T0, TTL, T0), BootTime(0));
        let back =
            |now, who: &str, view: &ClusterView, promise: Option<&Promise>, started| held_back(now, &name(who), view, promise, started);
        let until = |held: Option<HeldBack>| match held {
            Some(HeldBack::Until(at, _)) => at,
            other => panic!("{other:?}"),
        };
        assert_eq!(until(back(T0 + ms(9_999), "b", &view, Some(&promise), long_ago)), T0 + TTL);
        assert_eq!(back(T0 + TTL, "b", &view, Some(&promise), long_ago), None);
        assert_eq!(until(back(T0 + ms(4_999), "b", &view, None, T0.before(ms(5_000)))), T0 + ms(5_000));
        assert_eq!(back(T0 + ms(5_000), "b", &view, None, T0.before(ms(5_000))), None);
        assert!(matches!(back(T0 + TTL, "d", &view, None, long_ago), Some(HeldBack::Never(_))));

        view.release = Some(ReleaseRecord { epoch: Epoch(10), timeline: TimelineId(1), lsn: Lsn(1), to: Some(name("b")), all_seen: true });
        assert_eq!(back(T0, "b", &view, Some(&promise), long_ago), None, "the leader it promised has given up");
        assert_eq!(back(T0, "b", &view, None, T0), None, "a switchover to a member whose daemon has just started");
        let of_several = Promise { epoch: None, ..promise.clone() };
        assert!(back(T0, "b", &view, Some(&of_several), long_ago).is_some());

        (view.failsafe, view.failsafe_revision, view.release) = (None, Revision(0), None);
        assert_eq!(back(T0, "d", &view, None, T0), None, "not in force: nobody can be relying on anybody");
        assert!(back(T0, "b", &view, Some(&promise), long_ago).is_some(), "a promise is kept all the same");
        view.unreadable.insert("failsafe".to_owned(), "not JSON".to_owned());
        assert!(matches!(back(T0 + TTL, "b", &view, None, long_ago), Some(HeldBack::Never(_))));
    }
}
