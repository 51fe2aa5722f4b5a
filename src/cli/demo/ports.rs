//! A block of loopback ports for one local cluster.
//!
//! Blocks lie below the kernel's range for outgoing connections, so that no client takes a server's port between two starts of the
//! server. The first port of a block is kept bound as long as the block is in use: that is how others see that it is taken.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context, Result, bail};

/// Ports in a block.
pub const BLOCK_PORTS: u16 = 40;
/// Where free blocks are looked for.
const SEARCH: std::ops::Range<u16> = 16_000..32_000;

/// A taken block.
#[derive(Debug)]
pub struct PortBlock {
    base: u16,
    _anchor: TcpListener,
}

impl PortBlock {
    /// The block that begins at `base`.
    pub fn at(base: u16) -> Result<PortBlock> {
        let anchor = bind(base).with_context(|| format!("port {base} is in use: end what uses it, or choose another --base-port"))?;
        for port in base + 1..base + BLOCK_PORTS {
            bind(port).with_context(|| format!("port {port} is in use: end what uses it, or choose another --base-port"))?;
        }
        Ok(PortBlock { base, _anchor: anchor })
    }

    /// Some block that is wholly free.
    pub fn free() -> Result<PortBlock> {
        let blocks = (SEARCH.end - SEARCH.start) / BLOCK_PORTS;
        let first = u16::try_from(std::process::id() % u32::from(blocks)).unwrap_or(0);
        for step in 0..blocks {
            let base = SEARCH.start + (first + step) % blocks * BLOCK_PORTS;
            if let Ok(block) = PortBlock::at(base) {
                return Ok(block);
            }
        }
        bail!("no {BLOCK_PORTS} free ports in a row between {} and {}", SEARCH.start, SEARCH.end)
    }

    /// HAProxy's port for writing.
    pub fn write(&self) -> u16 {
        self.base + 1
    }

    /// HAProxy's port for reading.
    pub fn read(&self) -> u16 {
        self.base + 2
    }

    /// HAProxy's statistics page.
    pub fn stats(&self) -> u16 {
        self.base + 3
    }

    /// Client port of the etcd member `index`, below 5.
    pub fn etcd_client(&self, index: u16) -> u16 {
        self.base + 10 + index % 5
    }

    /// Peer port of the etcd member `index`, below 5.
    pub fn etcd_peer(&self, index: u16) -> u16 {
        self.base + 15 + index % 5
    }

    /// PostgreSQL's port of the node `index`, below 10.
    pub fn postgres(&self, index: u16) -> u16 {
        self.base + 20 + index % 10
    }

    /// Port of the HTTP API of the node `index`, below 10.
    pub fn api(&self, index: u16) -> u16 {
        self.base + 30 + index % 10
    }
}

fn bind(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_clusters_get_different_ports() {
        let (one, other) = (PortBlock::free().unwrap(), PortBlock::free().unwrap());
        assert!(one.base.abs_diff(other.base) >= BLOCK_PORTS);
        assert!(PortBlock::at(one.base).is_err());
    }
}
