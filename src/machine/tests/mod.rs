//! Tests of the machine as a whole: every state against every kind of event, the claims of SAFETY 3 against any sequence of events, and
//! small clusters of machines over a toy etcd and toy servers.

#[allow(dead_code)]
mod checked;
#[allow(dead_code)]
pub(crate) mod fixtures;
mod toy;

mod cluster;
mod found;
mod reactions;
mod recovery;
mod requests;
mod without_etcd;
