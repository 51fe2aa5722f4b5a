//! When the lock must be given up, rung by rung.
