//! What a switchover takes without pgherd: the same commands to three servers by hand, with nothing between a command's end and the next.
//!
//! They have the settings of the primary that pgherd runs, and the same load: two clients, of which one is the same as the one that sees
//! pgherd's switchovers directly. Once with commits that wait for one of two standbys, as pgherd's do, and once with commits that wait for none:
//! what a new primary's first standby costs is the difference.

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

/// A primary and two standbys.
pub struct Floor<'a>(Bare<'a>);

impl<'a> Floor<'a> {
    /// Starts them beside the cluster.
    pub fn start(cluster: &'a LocalCluster, ports: &PortBlock) -> Result<Floor<'a>> {
        let (_, index) = leader(cluster)?;
        let pattern = cluster.connection(cluster.plan.nodes[index].declared.port)?;
        let bare = Bare::start(cluster, ports, &pattern, &["standby", "other"].map(str::to_owned))?;
        make_table_on(bare.config()?)?;
        Ok(Floor(bare))
    }

    /// How long no row is acknowledged when the primary moves, with commits that wait for a standby or do not. Nothing else may be written
    /// meanwhile.
    pub fn measure(&mut self, waits: bool, stop: &AtomicBool) -> Result<Duration> {
        self.0.prepare_to_switch_over(waits)?;
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
