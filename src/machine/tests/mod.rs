//! Tests of the machine as a whole: every state against every kind of event, found cases, and small clusters of machines over a toy etcd
//! and toy servers; all of them judged by the claims of SAFETY 3. Sequences that nobody wrote are the simulator's (tests/simulation).

mod checked;
pub(crate) mod fixtures;
mod toy;

mod adoption;
mod archiving;
mod cluster;
mod endings;
mod found;
mod gate;
mod handed;
mod handover;
mod lapses;
mod paused;
mod reactions;
mod receiving;
mod recovery;
mod refused;
mod reinit;
mod releases;
mod requests;
mod restart;
mod rewinds;
mod synchronous;
mod without_etcd;
