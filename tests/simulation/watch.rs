//! The daemon's watch of etcd: a list, then what changes from there, in order; a list again at any doubt.

use std::sync::Arc;

use pgherd::facts::cluster::ClusterView;
use pgherd::machine::event::Event;

use super::clock::{ms, secs, us};
use super::mutants::{Mutant, mutant};
use super::network::{Caller, EtcdAnswer, EtcdAsk, REQUEST_TIMEOUT_MS};
use super::world::{DaemonDue, Sim, What};

/// The daemon's bounds of the watch, which it derives from a ttl of 10 s: silence is a third of it, a list comes beside it once in it.
const SILENCE_MS: u64 = 3_333;
const QUESTION_EVERY_MS: u64 = 1_111;
const LIST_EVERY_S: u64 = 10;
const RETRY_MS: u64 = 500;
const RESENT_AFTER_MS: u64 = 200;

impl Sim {
    pub fn watch_begins(&mut self, host: usize) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let run = daemon.run;
        daemon.watch.token += 1;
        daemon.watch.known = None;
        daemon.watch.listing = None;
        self.watch_lists(host);
        self.daemon_later(host, run, ms(QUESTION_EVERY_MS), DaemonDue::WatchTick);
    }

    fn watch_lists(&mut self, host: usize) {
        let asked = self.local(host);
        let call = self.call(host, Caller::Watch, EtcdAsk::List, ms(REQUEST_TIMEOUT_MS));
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.watch.listing = Some(call);
            daemon.watch.asked = asked;
        }
    }

    pub fn watch_listed(&mut self, host: usize, call: u64, answer: Option<EtcdAnswer>) {
        let local = self.local(host);
        let Some(daemon) = self.hosts[host].daemon.as_mut().filter(|daemon| daemon.watch.listing == Some(call)) else { return };
        let run = daemon.run;
        daemon.watch.listing = None;
        match answer {
            Some(EtcdAnswer::View(view)) => {
                let watch = &mut daemon.watch;
                watch.next_list = local + secs(LIST_EVERY_S);
                watch.silent_since = None;
                watch.missed = None;
                // A list beside a watch that is well wins only where it has seen more.
                let news = watch.known.as_ref().is_none_or(|known| view.revision >= known.revision && !same(known, &view));
                watch.as_of = watch.asked;
                if news {
                    watch.token += 1;
                    watch.known = Some(Arc::clone(&view));
                    let as_of = watch.as_of;
                    self.fact(host, Event::View(view, as_of));
                }
            }
            _ => {
                daemon.watch.known = None;
                self.fact(host, Event::EtcdUnreachable("no endpoint answers".to_owned()));
                self.daemon_later(host, run, ms(RETRY_MS), DaemonDue::WatchRetry);
            }
        }
    }

    pub fn watch_retries(&mut self, host: usize) {
        let waits = self.hosts[host].daemon.as_ref().is_some_and(|daemon| daemon.watch.known.is_none() && daemon.watch.listing.is_none());
        if waits {
            self.watch_lists(host);
        }
    }

    /// An answer from another state than was seen before.
    pub fn watch_suspicious(&mut self, host: usize, call: u64) {
        let Some(daemon) = self.hosts[host].daemon.as_mut().filter(|daemon| daemon.watch.listing == Some(call)) else { return };
        let run = daemon.run;
        daemon.watch.listing = None;
        daemon.watch.known = None;
        self.fact(host, Event::EtcdSuspicious("its revision went back".to_owned()));
        self.daemon_later(host, run, ms(RETRY_MS), DaemonDue::WatchRetry);
    }

    /// A question for progress, and what the silence since the last answer means.
    pub fn watch_tick(&mut self, host: usize) {
        let local = self.local(host);
        let well = self.reaches_etcd(host);
        let refused = matches!(self.etcd.serving, super::etcd::Serving::No { refuses: true });
        let etcd_revision = self.etcd.view.revision;
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let (run, watch) = (daemon.run, &mut daemon.watch);
        let mut list = false;
        if watch.known.is_some() && watch.listing.is_none() {
            // The state went back under the watch: the answer to the question shows it.
            let went_back = well && watch.known.as_ref().is_some_and(|known| known.revision > etcd_revision);
            if well && !watch.stalled && !went_back {
                watch.silent_since = None;
                watch.as_of = local;
                list = local >= watch.next_list && !mutant(Mutant::WatchGapIgnored);
            } else {
                let since = *watch.silent_since.get_or_insert(local);
                let over = refused || went_back || local.since(since) >= ms(SILENCE_MS);
                if over {
                    watch.known = None;
                    watch.stalled = false;
                    watch.token += 1;
                    list = true;
                }
            }
        }
        if list {
            self.watch_lists(host);
        }
        self.daemon_later(host, run, ms(QUESTION_EVERY_MS), DaemonDue::WatchTick);
    }

    /// etcd's keys changed: whoever watches is told, each at his own time, in order.
    pub fn etcd_changed(&mut self) {
        let view = Arc::clone(&self.etcd.view);
        self.checks.etcd_changed(&view);
        for host in 0..self.hosts.len() {
            let delay = match self.links[host].1.delay {
                Some((least, most)) => self.random.between(least, most),
                None => self.random.between(us(200), ms(4)),
            };
            let now = self.now;
            let loses = self.etcd.bugs.loses_deletions;
            let Some(daemon) = &mut self.hosts[host].daemon else { continue };
            let watch = &mut daemon.watch;
            if watch.known.is_none() || watch.stalled {
                continue;
            }
            if loses && watch.known.as_ref().is_some_and(|known| known.leader.is_some()) && view.leader.is_none() {
                continue;
            }
            let at = now.after(delay).max(watch.not_before);
            watch.not_before = at;
            let (run, token) = (daemon.run, watch.token);
            self.at(at, What::Daemon { host, run, due: DaemonDue::View { token, view: Arc::clone(&view) } });
        }
    }

    pub fn watch_delivers(&mut self, host: usize, token: u64, view: Arc<ClusterView>) {
        let reaches = self.reaches_etcd(host);
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let watch = &mut daemon.watch;
        if watch.token != token || watch.stalled || watch.known.as_ref().is_none_or(|known| known.revision >= view.revision) {
            return;
        }
        if !reaches {
            // TCP sends it again.
            let run = daemon.run;
            return self.later(ms(RESENT_AFTER_MS), What::Daemon { host, run, due: DaemonDue::View { token, view } });
        }
        let view = watch.missed.as_ref().map_or(view.clone(), |missed| Arc::new(with_gap(missed, &view)));
        watch.known = Some(Arc::clone(&view));
        daemon.witness = daemon.witness.max(view.revision);
        let as_of = watch.as_of;
        self.fact(host, Event::View(view, as_of));
    }

    /// etcd was compacted under the watch: it is cancelled, and nothing is assumed to have been seen.
    pub fn compact(&mut self) {
        for host in 0..self.hosts.len() {
            let reaches = self.reaches_etcd(host);
            let Some(daemon) = self.hosts[host].daemon.as_mut().filter(|_| reaches) else { continue };
            if daemon.watch.known.is_none() || daemon.watch.listing.is_some() {
                continue;
            }
            daemon.watch.token += 1;
            daemon.watch.stalled = false;
            if mutant(Mutant::WatchGapIgnored) {
                let known = daemon.watch.known.clone().map(|known| (known, Arc::clone(&self.etcd.view)));
                daemon.watch.missed = daemon.watch.missed.take().or(known);
                continue;
            }
            daemon.watch.known = None;
            self.watch_lists(host);
        }
    }
}

/// A view in which what did not change since the gap is as it was known before it.
fn with_gap((known, at_gap): &(Arc<ClusterView>, Arc<ClusterView>), view: &ClusterView) -> ClusterView {
    let mut seen = view.clone();
    if view.leader == at_gap.leader {
        seen.leader.clone_from(&known.leader);
    }
    if view.history_revision == at_gap.history_revision {
        seen.history.clone_from(&known.history);
        seen.history_revision = known.history_revision;
    }
    if view.spec == at_gap.spec {
        seen.spec.clone_from(&known.spec);
        seen.spec_revision = known.spec_revision;
    }
    if view.failsafe_revision == at_gap.failsafe_revision {
        seen.failsafe.clone_from(&known.failsafe);
        seen.failsafe_revision = known.failsafe_revision;
    }
    seen
}

fn same(watched: &ClusterView, listed: &ClusterView) -> bool {
    let mut same = watched.clone();
    same.revision = listed.revision;
    same == *listed
}
