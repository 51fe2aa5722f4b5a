//! The live rig: a cluster of real servers, a network that can be broken, a prober that writes to every node all the while, and
//! checkers that judge what it saw.

pub mod checker;
pub mod haproxy;
pub mod prober;
pub mod proxies;
pub mod proxy;
pub mod said;
pub mod secrets;
pub mod wait;
pub mod wall_clock;
pub mod world;
