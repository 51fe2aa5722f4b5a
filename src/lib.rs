//! pgherd keeps a PostgreSQL cluster the way its spec says.
//!
//! Data flows one way: facts -> decision -> actions -> facts. See docs/ARCHITECTURE.md for the house.

/// An enum without fields that has the list of its values: nobody can add one and forget it there.
#[macro_export]
macro_rules! enumerated {
    ($(#[$about:meta])* $kind:ident { $($(#[$doc:meta])* $value:ident),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $kind {
            $($(#[$doc])* $value),+
        }

        impl $kind {
            /// All of them, in order.
            pub const ALL: &'static [$kind] = &[$($kind::$value),+];
        }
    };
}

pub mod cli;
pub mod clock;
pub mod daemon;
pub mod etcd;
pub mod facts;
pub mod guard;
pub mod http;
pub mod machine;
pub mod mutants;
pub mod policy;
pub mod postgres;
pub mod routing;
pub mod spec;
pub mod telemetry;
pub mod types;
