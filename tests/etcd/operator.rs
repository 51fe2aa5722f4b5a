//! What operators write: specs by compare-and-swap, requests that expire, events that stay few.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use pgherd::etcd::{Applied, Etcd, EtcdError};
use pgherd::facts::cluster::DecisionRecord;
use pgherd::facts::requests::{Ask, RequestProgress};

use crate::support::etcd_server::{EtcdServer, settings};
use crate::support::lossy::{Afterwards, lose_answer_to};
use crate::support::{lease_is_gone, name};

against_both! { 1, &[];
    of_two_that_apply_at_once_one_is_told,
    the_last_twenty_specs_are_kept,
    generations_go_on_where_the_spec_was_deleted,
    a_request_is_answered_by_compare_and_swap_and_once_taken_up_outlives_its_requester,
    a_schedule_whose_answer_was_lost_is_named,
    the_last_decisions_are_kept_and_read_in_order,
    the_servers_version_is_judged,
}

async fn of_two_that_apply_at_once_one_is_told(server: EtcdServer) {
    let etcd = server.etcd();
    assert_eq!(etcd.apply_spec("a: 1", "x@h", Some(0)).await.unwrap(), Applied::Applied { generation: 1 });
    let (one, other) = tokio::join!(etcd.apply_spec("a: 2", "x@h", Some(1)), etcd.apply_spec("a: 3", "y@h", Some(1)));
    let (one, other) = (one.unwrap(), other.unwrap());
    let won = Applied::Applied { generation: 2 };
    let lost = Applied::Conflict { found: Some(2) };
    assert!((one, other) == (won, lost) || (one, other) == (lost, won), "{one:?} {other:?}");
    let spec = etcd.read_spec().await.unwrap().unwrap();
    assert_eq!(spec.document, if one == won { "a: 2" } else { "a: 3" });
    assert_eq!(etcd.apply_spec("a: 4", "x@h", Some(0)).await.unwrap(), lost, "there is one already");
}

async fn the_last_twenty_specs_are_kept(server: EtcdServer) {
    let etcd = server.etcd();
    for round in 1..=23 {
        assert_eq!(etcd.apply_spec(&format!("a: {round}"), "x@h", None).await.unwrap(), Applied::Applied { generation: round });
    }
    assert_eq!(etcd.spec_generations().await.unwrap(), (4..=23).collect::<Vec<_>>());
    assert_eq!(etcd.read_old_spec(4).await.unwrap().unwrap().document, "a: 4");
    assert_eq!(etcd.read_old_spec(3).await.unwrap(), None);
    assert_eq!(etcd.read_view().await.unwrap().spec, etcd.read_spec().await.unwrap());
}

async fn generations_go_on_where_the_spec_was_deleted(server: EtcdServer) {
    let etcd = server.etcd();
    etcd.apply_spec("a: 1", "x@h", None).await.unwrap();
    etcd.apply_spec("a: 2", "x@h", None).await.unwrap();
    server.stranger().await.delete("/pgherd/main/spec", None).await.unwrap();
    assert_eq!(etcd.read_spec().await.unwrap(), None);
    assert_eq!(etcd.apply_spec("a: 3", "x@h", Some(0)).await.unwrap(), Applied::Applied { generation: 3 });
    server.stranger().await.put("/pgherd/main/spec", "a: by hand", None).await.unwrap();
    assert!(matches!(etcd.read_spec().await, Err(EtcdError::Unreadable { .. })));
    assert_eq!(etcd.apply_spec("a: 4", "x@h", None).await.unwrap(), Applied::Applied { generation: 4 });
}

async fn a_request_is_answered_by_compare_and_swap_and_once_taken_up_outlives_its_requester(server: EtcdServer) {
    let etcd = server.etcd();
    let ask = Ask::Switchover { to: name("b") };
    let id = etcd.create_request(ask.clone(), "x@h", Duration::from_secs(5)).await.unwrap();
    let asked = etcd.read_request(&id).await.unwrap().unwrap();
    assert_eq!((asked.record.ask, asked.record.progress), (ask, RequestProgress::Created));
    assert!(etcd.read_view().await.unwrap().requests.contains_key(&id));

    let claim = |by: &str| RequestProgress::Claimed { by: name(by), stage: "checkpoint".into(), stages: Vec::new() };
    let (a, b) =
        tokio::join!(etcd.update_request(&id, asked.mod_revision, claim("a")), etcd.update_request(&id, asked.mod_revision, claim("b")));
    assert_ne!(a.unwrap(), b.unwrap(), "exactly one took it up");
    let lease = pgherd::types::LeaseId(i64::from_str_radix(&id, 16).unwrap());
    lease_is_gone(&server, lease).await;
    let taken_up = etcd.read_request(&id).await.unwrap().expect("the death of its requester changes nothing any more");
    assert!(!etcd.update_request(&id, asked.mod_revision, claim("c")).await.unwrap());
    let done = RequestProgress::Done { message: "b leads".into(), stages: Vec::new() };
    assert!(etcd.update_request(&id, taken_up.mod_revision, done).await.unwrap());
    let kv = server.stranger().await.get(format!("/pgherd/main/requests/{id}"), None).await.unwrap();
    assert_ne!(kv.kvs()[0].lease(), 0, "the answer goes away by itself");

    let nobody = etcd.create_request(Ask::Bootstrap { on: name("a") }, "x@h", Duration::from_secs(2)).await.unwrap();
    lease_is_gone(&server, pgherd::types::LeaseId(i64::from_str_radix(&nobody, 16).unwrap())).await;
    assert_eq!(etcd.read_request(&nobody).await.unwrap(), None, "what nobody took up goes with its requester");

    let taken_back = etcd.create_request(Ask::Bootstrap { on: name("a") }, "x@h", Duration::from_secs(60)).await.unwrap();
    etcd.delete_request(&taken_back).await.unwrap();
    assert_eq!(etcd.read_request(&taken_back).await.unwrap(), None);
}

fn decision(number: usize) -> DecisionRecord {
    DecisionRecord {
        at: "2026-01-01T00:00:00Z".into(),
        member: name("a"),
        kind: "promoted".into(),
        message: number.to_string(),
        facts: BTreeMap::new(),
    }
}

/// It has no lease and will be carried out: whoever asked has to be able to take it back.
async fn a_schedule_whose_answer_was_lost_is_named(server: EtcdServer) {
    let (url, _) = lose_answer_to("lost@h", server.port(0), Afterwards::Pass).await;
    let lossy = Etcd::new(settings(vec![url])).unwrap();
    let asked = lossy.create_request(Ask::ScheduledSwitchover { to: name("b"), at_s: 1 }, "lost@h", Duration::from_secs(5)).await;
    let view = server.etcd().read_view().await.unwrap();
    let (id, _) = view.requests.first_key_value().unwrap();
    assert!(matches!(&asked, Err(EtcdError::Unknown(why)) if why.contains(id)), "{id}: {asked:?}");
}

async fn the_last_decisions_are_kept_and_read_in_order(server: EtcdServer) {
    const AT_ONCE: usize = 50;
    const ROUNDS: usize = 22;
    let etcd = server.etcd();
    for round in 0..ROUNDS {
        let events: Vec<DecisionRecord> = (0..AT_ONCE).map(|at| decision(round * AT_ONCE + at)).collect();
        for written in join_all(events.iter().map(|event| etcd.append_event(event))).await {
            written.unwrap();
        }
    }
    let last = decision(ROUNDS * AT_ONCE);
    etcd.append_event(&last).await.unwrap();
    let all = etcd.read_events(10_000).await.unwrap();
    assert_eq!(all.len(), 1_000, "the one after a full round trimmed");
    assert_eq!(all.last(), Some(&last));
    assert_eq!(etcd.read_events(3).await.unwrap(), all[997..]);
    let view = etcd.read_view().await.unwrap();
    assert_eq!(view.unreadable, BTreeMap::new(), "events are not part of the view");
}

async fn the_servers_version_is_judged(server: EtcdServer) {
    let (version, condition) = server.etcd().version().await.unwrap();
    let message = condition.expect("both versions of the tests have known bugs").message;
    assert!(message.contains(&version) && message.contains("#15247"), "{message}");
}
