//! The readable trace of a run, and its hash: the same seed gives the same hash, or something in the core asked the time, the
//! environment or a map without order (I15).

use std::hash::{DefaultHasher, Hash, Hasher};
use std::mem::discriminant;

use pgherd::machine::action::Action;
use pgherd::machine::event::{Event, Finished};

use super::clock::Real;
use super::world::{DaemonDue, What, member};

pub struct Trace {
    lines: Option<Vec<String>>,
    hash: DefaultHasher,
    pub events: u64,
}

impl Trace {
    pub fn new(readable: bool) -> Self {
        Trace { lines: readable.then(Vec::new), hash: DefaultHasher::new(), events: 0 }
    }

    pub fn hash(&self) -> u64 {
        self.hash.finish()
    }

    pub fn lines(&self) -> &[String] {
        self.lines.as_deref().unwrap_or(&[])
    }

    pub fn mark(&mut self, at: Real, what: &What) {
        self.events += 1;
        at.hash(&mut self.hash);
        discriminant(what).hash(&mut self.hash);
        if let What::Daemon { host, run, due } = what {
            (host, run).hash(&mut self.hash);
            discriminant::<DaemonDue>(due).hash(&mut self.hash);
        }
    }

    pub fn say(&mut self, at: Real, host: Option<usize>, line: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.lines {
            let who = host.map_or_else(|| "-".to_owned(), |host| member(host).to_string());
            lines.push(format!("{:>11.6} {who} {}", at.0 as f64 / 1e9, line()));
        }
    }

    pub fn event(&mut self, at: Real, host: usize, event: &Event) {
        discriminant(event).hash(&mut self.hash);
        if matches!(event, Event::Tick | Event::Probed(_)) {
            return;
        }
        self.say(at, Some(host), || format!("<- {}", describe(event)));
    }

    pub fn actions(&mut self, at: Real, host: usize, to: &'static str, actions: &[Action]) {
        to.hash(&mut self.hash);
        for action in actions {
            discriminant(action).hash(&mut self.hash);
            match action {
                Action::Do(operation) => {
                    (operation.kind() as u8).hash(&mut self.hash);
                    let detail = match operation {
                        pgherd::machine::action::Operation::PutMember(record) => format!(
                            " {:?} {} at {:?} on {:?}, vote {:?}",
                            record.role, record.machine_state, record.receive_lsn, record.timeline, record.vote
                        ),
                        pgherd::machine::action::Operation::Start { role, .. } => format!(" {role:?}"),
                        pgherd::machine::action::Operation::Clone { from, old, .. } => {
                            format!(" from {}, over {old:?}", from.member)
                        }
                        pgherd::machine::action::Operation::Promote { timeline, .. } => format!(" onto {timeline}"),
                        _ => String::new(),
                    };
                    self.say(at, Some(host), || format!("   do {:?}{detail}", operation.kind()));
                }
                Action::Record(decision) => {
                    decision.message.hash(&mut self.hash);
                    self.say(at, Some(host), || match decision.transition() {
                        Some((from, to)) => format!("** {from} -> {to}: {}", decision.message),
                        None => format!("** {}: {}", decision.kind, decision.message),
                    });
                }
                other => self.say(at, Some(host), || format!("   {other:?}")),
            }
        }
    }
}

/// An event in one line.
fn describe(event: &Event) -> String {
    match event {
        Event::View(view, _) => format!(
            "view at {}: leader {}, members {}",
            view.revision,
            view.leader.as_ref().map_or_else(|| "none".to_owned(), |leader| format!("{} under {}", leader.holder, leader.epoch)),
            view.members.keys().map(ToString::to_string).collect::<Vec<_>>().join(",")
        ),
        Event::SpecRead(generation, _) => format!("spec, generation {generation}"),
        Event::Guard(facts) => format!("guard: {:?}", facts.postmaster),
        Event::Finished(Finished::Looked(data)) => match data {
            pgherd::facts::postgres::DataDirectory::Full(control) => {
                format!("looked: {:?} on {} at {}", control.state, control.timeline, control.checkpoint)
            }
            other => format!("looked: {other:?}"),
        },
        Event::Finished(finished) => format!("{finished:?}"),
        Event::Lease(lease) => format!("{lease:?}"),
        other => format!("{other:?}").chars().take(200).collect(),
    }
}
