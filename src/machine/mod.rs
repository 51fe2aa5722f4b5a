//! The typed state machine: facts in, actions out.
