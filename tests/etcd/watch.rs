//! The watch: nothing is assumed to have been seen, and what is told is whole.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pgherd::clock::BootTime;
use pgherd::etcd::{Etcd, Suspicion, WatchEvent, WatchHandle, WatchTimes};
use pgherd::facts::cluster::ClusterView;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::proxy::{Network, Proxy};
use crate::support::etcd_server::{EtcdServer, PATIENCE, settings};
use crate::support::{lease_of_a_minute, name, record, take_lock};

against_both! { 1, &[];
    a_deleted_leader_is_seen_and_with_its_release,
    a_view_says_how_fresh_it_is_while_nothing_happens,
    row_40_a_watch_survives_compaction_while_it_was_cut_off,
    a_silent_watch_is_found_out_and_continued_elsewhere,
    an_etcd_that_is_away_is_said_to_be_so_until_it_is_back,
    an_etcd_that_was_rebuilt_is_not_believed,
    unreadable_records_cost_only_themselves,
}

struct Watched {
    _handle: WatchHandle,
    events: UnboundedReceiver<WatchEvent>,
}

impl Watched {
    fn start(etcd: &Etcd) -> Watched {
        let times = WatchTimes { silence: Duration::from_millis(600), list_every: Duration::from_secs(60) };
        let (said, events) = unbounded_channel();
        let handle = etcd.watch(times, move |event| {
            let _ = said.send(event);
        });
        Watched { _handle: handle, events }
    }

    async fn next(&mut self) -> WatchEvent {
        tokio::time::timeout(PATIENCE, self.events.recv()).await.expect("the watch says nothing").expect("the watch is there")
    }

    /// Until the watch itself has answered: the list before it is not the watch.
    async fn established(&mut self) -> Arc<ClusterView> {
        let (_, listed) = self.view(|_| true).await;
        loop {
            let (view, as_of) = self.view(|_| true).await;
            if as_of > listed {
                return view;
            }
        }
    }

    async fn view(&mut self, wanted: impl Fn(&ClusterView) -> bool) -> (Arc<ClusterView>, BootTime) {
        loop {
            if let WatchEvent::View { view, as_of } = self.next().await
                && wanted(&view)
            {
                return (view, as_of);
            }
        }
    }
}

fn proxied(server: &EtcdServer) -> (Proxy, String) {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let proxy = Proxy::start(any, (Ipv4Addr::LOCALHOST, server.port(0)).into());
    let url = format!("http://{}", proxy.address());
    (proxy, url)
}

async fn a_deleted_leader_is_seen_and_with_its_release(server: EtcdServer) {
    let etcd = server.etcd();
    let mut watched = Watched::start(&etcd);
    let lock = take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
    watched.view(|view| view.leader.as_ref().is_some_and(|leader| leader.epoch == lock.epoch)).await;
    let left = pgherd::facts::cluster::ReleaseRecord {
        epoch: lock.epoch,
        timeline: pgherd::types::TimelineId(1),
        lsn: pgherd::types::Lsn(1),
        to: None,
        all_seen: true,
    };
    etcd.release(lock.epoch, None, Some(&left)).await.unwrap();
    let (view, _) = watched.view(|view| view.leader.is_none()).await;
    assert_eq!(view.release, Some(left), "one transaction is one view");
    assert_eq!(*view, etcd.read_view().await.unwrap());
}

async fn a_view_says_how_fresh_it_is_while_nothing_happens(server: EtcdServer) {
    let etcd = server.etcd();
    let mut watched = Watched::start(&etcd);
    let (first, mut as_of) = watched.view(|_| true).await;
    for _ in 0..3 {
        let (view, fresher) = loop {
            let (view, later) = watched.view(|_| true).await;
            if later > as_of {
                break (view, later);
            }
        };
        assert!(fresher <= BootTime::now());
        assert!(Arc::ptr_eq(&view, &first), "nothing changed, and nothing was written");
        as_of = fresher;
    }
}

async fn row_40_a_watch_survives_compaction_while_it_was_cut_off(server: EtcdServer) {
    let (proxy, url) = proxied(&server);
    let mut watched = Watched::start(&Etcd::new(settings(vec![url])).unwrap());
    let etcd = server.etcd();
    let first = watched.established().await;
    proxy.set(Network::Silent);
    let lease = lease_of_a_minute(&server).await;
    etcd.put_member(&name("a"), &record(1), lease).await.unwrap();
    etcd.revoke(lease).await.unwrap();
    etcd.put_member(&name("b"), &record(1), lease_of_a_minute(&server).await).await.unwrap();
    let revision = etcd.read_view().await.unwrap().revision;
    assert!(revision > first.revision);
    server.stranger().await.compact(revision.0, None).await.unwrap();
    proxy.set(Network::Pass);
    let (view, _) = watched.view(|view| view.members.contains_key(&name("b"))).await;
    assert_eq!(*view, etcd.read_view().await.unwrap());
    etcd.put_member(&name("c"), &record(1), lease_of_a_minute(&server).await).await.unwrap();
    watched.view(|view| view.members.contains_key(&name("c"))).await;
}

async fn a_silent_watch_is_found_out_and_continued_elsewhere(server: EtcdServer) {
    let (proxy, url) = proxied(&server);
    let direct = server.endpoints().remove(0);
    let mut watched = Watched::start(&Etcd::new(settings(vec![url, direct])).unwrap());
    watched.established().await;
    proxy.set(Network::AnswersLost);
    let etcd = server.etcd();
    etcd.put_member(&name("a"), &record(1), lease_of_a_minute(&server).await).await.unwrap();
    watched.view(|view| view.members.contains_key(&name("a"))).await;
}

async fn an_etcd_that_is_away_is_said_to_be_so_until_it_is_back(server: EtcdServer) {
    let etcd = server.etcd();
    let mut watched = Watched::start(&etcd);
    watched.view(|_| true).await;
    server.kill(0);
    let mut since = None;
    for _ in 0..3 {
        let told = loop {
            if let WatchEvent::Unreachable { since, .. } = watched.next().await {
                break since;
            }
        };
        assert_eq!(*since.get_or_insert(told), told, "since the first failure");
    }
    server.start_member(0);
    watched.view(|_| true).await;
}

async fn an_etcd_that_was_rebuilt_is_not_believed(mut server: EtcdServer) {
    let etcd = server.etcd();
    let mut watched = Watched::start(&etcd);
    take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
    let (before, _) = watched.view(|view| view.leader.is_some()).await;
    server.rebuild().await;
    loop {
        match watched.next().await {
            WatchEvent::Suspicious { why: Suspicion::OtherCluster { .. } } => break,
            WatchEvent::View { view, .. } => assert_eq!(view.etcd_cluster, before.etcd_cluster, "what the new one has is never told"),
            WatchEvent::Unreachable { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    let refused = etcd.write_status(before.leader.as_ref().unwrap().epoch, &status(&before)).await;
    assert!(refused.is_err(), "{refused:?}");
}

fn status(view: &ClusterView) -> pgherd::facts::cluster::StatusRecord {
    crate::status(view.leader.as_ref().unwrap().epoch)
}

async fn unreadable_records_cost_only_themselves(server: EtcdServer) {
    let etcd = server.etcd();
    let mut watched = Watched::start(&etcd);
    etcd.put_member(&name("a"), &record(1), lease_of_a_minute(&server).await).await.unwrap();
    server.stranger().await.put("/pgherd/main/members/b", "{}", None).await.unwrap();
    let (view, _) = watched.view(|view| view.unreadable.contains_key("members/b")).await;
    assert_eq!(view.members.keys().collect::<Vec<_>>(), [&name("a")]);
    server.stranger().await.delete("/pgherd/main/members/b", None).await.unwrap();
    watched.view(|view| view.unreadable.is_empty()).await;
}
