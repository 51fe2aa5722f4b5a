//! Credentials, a full database, a cluster of somebody else: what etcd refuses, and what goes on all the same.

use etcd_client::Permission;
use pgherd::etcd::{Etcd, EtcdError, Fenced, Secret, Settings};
use pgherd::facts::lease::LeaseEvent;

use crate::status;
use crate::support::etcd_server::EtcdServer;
use crate::support::{Keeper, lease_is_gone, take_lock};

against_both! { 1, &["--bcrypt-cost", "4", "--quota-backend-bytes", "2000000"];
    credentials_are_enough_for_one_cluster_and_survive_a_restart,
    the_lock_is_proved_while_etcds_database_is_full,
    clusters_with_one_prefix_do_not_see_each_other,
}

const PASSWORD: &str = "canary-3f9a";

/// Passwords are wanted from now on; `pgherd` may touch its own cluster's keys only (SAFETY row 78).
async fn lock_up(server: &EtcdServer) -> Settings {
    let mut root = server.stranger().await;
    root.user_add("root", PASSWORD, None).await.unwrap();
    root.user_grant_role("root", "root").await.unwrap();
    root.role_add("pgherd-main").await.unwrap();
    root.role_grant_permission("pgherd-main", Permission::read_write("/pgherd/main/").with_prefix()).await.unwrap();
    root.user_add("pgherd", PASSWORD, None).await.unwrap();
    root.user_grant_role("pgherd", "pgherd-main").await.unwrap();
    root.auth_enable().await.unwrap();
    Settings { username: Some("pgherd".into()), password: Some(Secret::new(PASSWORD)), ..server.settings() }
}

async fn credentials_are_enough_for_one_cluster_and_survive_a_restart(server: EtcdServer) {
    let settings = lock_up(&server).await;
    let etcd = Etcd::new(settings.clone()).unwrap();
    let mut keeper = Keeper::start(settings.clone(), 15);
    let lock = keeper.leading(&etcd, "a").await;
    assert_eq!(etcd.write_status(lock.epoch, &status(lock.epoch)).await.unwrap(), Fenced::Written);

    let others = Settings { cluster: "other".parse().unwrap(), ..settings.clone() };
    assert!(matches!(Etcd::new(others).unwrap().read_view().await, Err(EtcdError::Refused(_))));
    let nobody = server.etcd().read_view().await;
    assert!(matches!(nobody, Err(EtcdError::Refused(_))), "{nobody:?}");
    let wrong = Settings { password: Some(Secret::new("wrong")), ..settings };
    let refused = Etcd::new(wrong).unwrap().read_view().await.unwrap_err();
    assert!(matches!(refused, EtcdError::Refused(_)) && !refused.to_string().contains(PASSWORD), "{refused}");

    // Tokens live in the server's memory: after its restart they are refused, and asked for anew within the call.
    server.kill(0);
    server.start_member(0);
    server.wait_ready().await;
    let events = keeper.until(|event| matches!(event, LeaseEvent::Proved { .. })).await;
    assert!(!events.iter().any(|event| matches!(event, LeaseEvent::Lost { .. })), "{events:?}");
    keeper.proved(lock).await;
    assert_eq!(etcd.write_status(lock.epoch, &status(lock.epoch)).await.unwrap(), Fenced::Written);
}

/// SAFETY row 44.
async fn the_lock_is_proved_while_etcds_database_is_full(server: EtcdServer) {
    let etcd = server.etcd();
    let mut keeper = Keeper::start(server.settings(), 6);
    let lock = keeper.leading(&etcd, "a").await;
    let mut stranger = server.stranger().await;
    let mut count = 0;
    while stranger.put(format!("/filling/{count}"), vec![0_u8; 200_000], None).await.is_ok() {
        count += 1;
    }
    let refused = etcd.write_status(lock.epoch, &status(lock.epoch)).await;
    assert!(matches!(&refused, Err(EtcdError::Refused(why)) if why.contains("space")), "{refused:?}");
    for _ in 0..3 {
        keeper.proved(lock).await;
    }
    assert!(etcd.read_view().await.is_ok());

    // The lock can be given up, but not taken, nor can there be a new lease: the outage has a name.
    keeper.handle.revoke();
    lease_is_gone(&server, lock.lease.lease).await;
    assert_eq!(etcd.read_view().await.unwrap().leader, None);
    keeper.handle.grant();
    let failed = keeper.until(|event| matches!(event, LeaseEvent::Failed { .. })).await.pop();
    assert!(matches!(&failed, Some(LeaseEvent::Failed { why }) if why.contains("space")), "{failed:?}");
}

/// A second cluster beside ours in one etcd.
async fn clusters_with_one_prefix_do_not_see_each_other(server: EtcdServer) {
    let main = server.etcd();
    let other = Etcd::new(Settings { cluster: "main2".parse().unwrap(), ..server.settings() }).unwrap();
    let lease = crate::support::lease_of_a_minute(&server).await;
    take_lock(&other, "a", lease).await;
    let view = main.read_view().await.unwrap();
    assert!(view.leader.is_none() && view.members.is_empty() && view.history.is_empty());
}
