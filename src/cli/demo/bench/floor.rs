//! What a switchover takes without pgherd: the same commands to two servers by hand, with nothing between a command's end and the next.
//!
//! They have the settings of the primary that pgherd runs, and the same load: two clients, of which one is the same as the one that sees
//! pgherd's switchovers directly. No commit of theirs waits for a standby, which a third server would have to be found by first; so that is in
//! pgherd's figure and not in this one.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result};

use super::super::cluster::LocalCluster;
use super::super::drill::leader;
use super::super::ports::PortBlock;
use super::bare::Bare;
use super::clients::Client;
use super::{make_table_on, waiting};
use crate::clock::BootTime;

/// Two servers, one of which streams from the other.
pub struct Floor<'a>(Bare<'a>);

impl<'a> Floor<'a> {
    /// Starts them beside the cluster.
    pub fn start(cluster: &'a LocalCluster, ports: &PortBlock) -> Result<Floor<'a>> {
        let (_, index) = leader(cluster)?;
        let pattern = cluster.connection(cluster.plan.nodes[index].declared.port)?;
        let bare = Bare::start(cluster, ports, &pattern, &["standby".to_owned()])?;
        make_table_on(bare.config()?)?;
        Ok(Floor(bare))
    }

    /// How long no row is acknowledged when the primary moves. Nothing else may be written meanwhile.
    pub fn measure(&mut self, stop: &AtomicBool) -> Result<Duration> {
        let clients = [Client::direct(self.0.configs()?)?, Client::direct(self.0.configs()?)?];
        let flow = |since| waiting::until_rows_flow(stop, &[&clients[0], &clients[1]], since);
        flow(BootTime::now())?;
        let ordered = BootTime::now();
        self.0.switch_over().context("a switchover by hand")?;
        flow(BootTime::now())?;
        let took = clients[0].outage_after(ordered)?;
        for client in clients {
            client.end()?;
        }
        self.0.follow()?;
        Ok(took)
    }

    /// Ends them.
    pub fn end(self) -> Result<()> {
        self.0.end()
    }
}
