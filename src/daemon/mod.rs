//! One queue, one owner of the machine.
