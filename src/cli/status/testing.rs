//! A made-up cluster for the tests of commands: three members, one leads, two stream.

use std::collections::BTreeMap;

use super::report::{Declared, StatusReport, Wanted, report};
use crate::facts::cluster::{
    ClusterView, DataDirectoryReport, Initialize, LeaderKey, MemberKey, MemberRecord, MemberRole, SpecRecord, StatusRecord, Versions,
};
use crate::types::{Epoch, Incarnation, LeaseId, Lsn, MemberName, Revision, SystemId, TimelineId};

const MEMBERS: [(&str, &str); 3] = [("mdw", "10.0.12.9"), ("standby", "10.0.12.4"), ("standby1", "10.0.16.11")];

/// The name.
pub fn name(text: &str) -> MemberName {
    text.parse().unwrap()
}

/// Everything as it should be; `mdw` leads.
pub fn view() -> ClusterView {
    let member = |(at, (who, host)): (usize, &(&str, &str))| {
        let leads = at == 0;
        let record = MemberRecord {
            maintenance: None,
            incarnation: Incarnation { boot_id: "b".to_owned(), started_ns: 1 },
            role: if leads { MemberRole::Primary } else { MemberRole::Replica },
            state: if leads { "running" } else { "streaming" }.to_owned(),
            machine_state: if leads { "primary" } else { "following" }.to_owned(),
            timeline: Some(TimelineId(3)),
            receive_lsn: Some(Lsn(0x0500_0000)),
            replay_lsn: Some(Lsn(0x0500_0000)),
            system_id: Some(SystemId(7)),
            data_directory: DataDirectoryReport::Full,
            vote: None,
            api_url: format!("http://{host}:8008"),
            host: (*host).to_owned(),
            port: 5432,
            versions: Versions::default(),
            observed_generation: 4,
            features: Vec::new(),
            pending_restart: Vec::new(),
            tags: BTreeMap::new(),
            conditions: Vec::new(),
            lost_writes: Vec::new(),
            copying: None,
        };
        (name(who), MemberKey { record, lease: LeaseId(i64::try_from(at).unwrap()), mod_revision: Revision(9) })
    };
    ClusterView {
        spec: Some(SpecRecord { generation: 4, document: String::new(), by: "dba@mdw".to_owned(), at: "2026-11-22T12:00:00Z".to_owned() }),
        leader: Some(LeaderKey { holder: "mdw".to_owned(), epoch: Epoch(40), lease: LeaseId(0), mod_revision: Revision(40) }),
        members: MEMBERS.iter().enumerate().map(member).collect(),
        status: Some(StatusRecord {
            epoch: Epoch(40),
            timeline: TimelineId(3),
            lsn: Lsn(0x0500_0000),
            slots: Default::default(),
            replayed: Default::default(),
            conditions: Vec::new(),
        }),
        initialize: Some(Initialize::Done(SystemId(7))),
        ..ClusterView::default()
    }
}

/// The spec that names all three.
pub fn wanted() -> Wanted {
    let members = MEMBERS.map(|(who, host)| Declared { name: name(who), host: format!("{host}:5432") });
    Wanted {
        members: members.into(),
        maximum_lag_on_failover: 1024 * 1024,
        mode: crate::spec::cluster::ReplicationMode::Async,
        conditions: Vec::new(),
    }
}

/// What a member says of itself.
pub fn record<'a>(view: &'a mut ClusterView, who: &str) -> &'a mut MemberRecord {
    &mut view.members.get_mut(&name(who)).unwrap().record
}

/// The report of a view under the spec.
pub fn report_of(view: &ClusterView) -> StatusReport {
    report(&"main".parse().unwrap(), view, Some(&wanted()), "2026-11-22T12:00:00.000Z".to_owned())
}
