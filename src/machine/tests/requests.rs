//! What operators asked for, and when it is refused.

use std::sync::Arc;

use crate::facts::postgres::{ReplicaFacts, SqlFacts, Survey};
use crate::facts::requests::{Ask, RequestKey, RequestProgress, RequestRecord};
use crate::machine::action::{Action, Operation};
use crate::machine::event::{Event, Finished};
use crate::machine::state::State;
use crate::types::Revision;

use super::checked::Checked;
use super::cluster::s;
use super::fixtures::*;
use super::handover::{asked, is_answered, primary};
use super::reactions::worlds::{leads, led_by_us, ours};

#[test]
fn row_60_a_document_that_means_nothing_is_said_and_the_last_good_one_stays_in_force() {
    let mut primary = Checked::resume(leads(), State::Primary);
    let in_force = primary.world().spec.clone();
    assert!(in_force.is_some());
    primary.handle(T0, Event::SpecUnreadable(9, "spec.members: this key is missing".to_owned()));
    assert_eq!((primary.state(), &primary.world().spec), (&State::Primary, &in_force), "and its generation is the one that is shown");
    let said = primary.world().conditions["spec_unreadable"].message.clone();
    assert!(said.contains("generation 9") && said.contains("spec.members: this key is missing"), "{said}");
    primary.handle(T0, Event::SpecRead(10, in_force.unwrap().1));
    assert_eq!(primary.world().spec.as_ref().map(|(generation, _)| *generation), Some(10));
    assert!(!primary.world().conditions.contains_key("spec_unreadable"));
}

/// Found live: a standby that had come a moment before was refused, "its state is `streaming`".
#[test]
fn row_69_a_standby_that_says_that_it_streams_is_not_refused_before_the_primary_has_looked_again() {
    let mut view = led_by_us();
    view.revision = Revision(500);
    view.members.get_mut(&name("c")).unwrap().record.state = "streaming".to_owned();
    let ask = Ask::Switchover { to: name("c") };
    let record = RequestRecord { ask, by: "a test".to_owned(), at: String::new(), progress: RequestProgress::Created };
    view.requests.insert("1".to_owned(), RequestKey { record, mod_revision: Revision(450) });
    let [mut checked, mut blind] = [(); 2].map(|()| Checked::resume(leads(), State::Primary));
    let answers = |actions: Vec<Action>| {
        let answer = |action| match action {
            Action::Do(Operation::AnswerRequest { progress, .. }) => Some(progress),
            _ => None,
        };
        actions.into_iter().find_map(answer)
    };
    for primary in [&mut checked, &mut blind] {
        primary.handle(T0, Event::View(Arc::new(view.clone()), T0));
        let actions = primary.handle(T0, Event::Finished(Finished::Surveyed(Ok(Survey::default()))));
        assert_eq!(answers(actions), None, "its last look at PostgreSQL may be a second old");
    }
    let sees = streaming("c", 1_000);
    let looked = |seconds, replicas| Event::Probed(probe(T0 + s(seconds), SqlFacts { replicas, ..sql(false, 2, 1_000) }));
    let half_gone = ReplicaFacts { state: "catchup".to_owned(), flush_lsn: None, ..sees.clone() };
    let answer = answers(checked.handle(T0 + s(1), looked(1, vec![half_gone, sees])));
    assert!(matches!(answer, Some(RequestProgress::Claimed { .. })), "{answer:?}");
    assert_eq!(answers(blind.handle(T0 + s(2), looked(2, Vec::new()))), None);
    let answer = answers(blind.handle(T0 + s(3), looked(3, Vec::new())));
    let Some(RequestProgress::Refused { reason }) = answer else { panic!("{answer:?}") };
    assert!(reason.contains("its own state: streaming; in pg_stat_replication: the leader does not see it"), "{reason}");
}

#[test]
fn row_71_of_two_that_were_asked_of_one_leader_the_second_does_not_follow_on_the_first() {
    for (to, done) in [("a", true), ("c", false)] {
        let mut checked = primary(&[("2", asked(RequestProgress::Created, to, "bert", ours().epoch.0 - 1))]);
        is_answered(&checked.handle(T0, Event::Tick), "2", done);
    }
}
