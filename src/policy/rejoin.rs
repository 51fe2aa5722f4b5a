//! How a member gets back behind the leader.
