//! `pgherd demo`: a cluster on this machine's loopback to look at and to break, and the same as a library for the live tests.

pub mod cluster;
pub mod documents;
pub mod etcd;
pub mod haproxy;
pub mod http;
pub mod ports;
pub mod process;
pub mod programs;
pub mod status;
