//! What a call to etcd can end in, as far as callers tell it apart.
//!
//! The rule that would surprise: a write without an answer is [`EtcdError::Unknown`], never a failure. It may have happened, and it may
//! still happen later.

use std::error::Error as _;

use tonic::Code;

/// Why etcd did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EtcdError {
    /// No endpoint gave an answer. Nothing was written.
    #[error("no etcd endpoint answered: {0}")]
    Unreachable(String),
    /// A write was sent and no answer came: it may or may not have happened.
    #[error("etcd was asked to write and did not answer, so that it is not known whether it did: {0}")]
    Unknown(String),
    /// etcd answered, and refused.
    #[error("etcd refused: {0}")]
    Refused(String),
    /// The lease that a key was to hang on is gone.
    #[error("the lease is not known to etcd any more")]
    LeaseNotFound,
    /// The answer is not from the etcd that was spoken to before (SAFETY row 43).
    #[error("{0}")]
    Suspicious(Suspicion),
    /// A record in etcd cannot be read.
    #[error("{key} in etcd cannot be read: {why}")]
    Unreadable {
        /// Which key, without the prefix.
        key: String,
        /// What is wrong with it.
        why: String,
    },
}

/// Signs that etcd was replaced or restored from a backup.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Suspicion {
    /// Another cluster id than before.
    #[error(
        "{endpoint} belongs to etcd cluster {found:x}, and this daemon has been speaking to {expected:x}: nobody will lead; \
         if etcd was rebuilt on purpose, restart the daemon on every member"
    )]
    OtherCluster {
        /// Who answered.
        endpoint: String,
        /// The id seen first.
        expected: u64,
        /// The id in this answer.
        found: u64,
    },
    /// A linearizable answer at a lower revision than one seen before.
    #[error(
        "{endpoint} answered at revision {found} although revision {seen} was seen before, as after a restore from a backup: nobody \
         will lead; if etcd was restored on purpose, restart the daemon on every member"
    )]
    RevisionWentBack {
        /// Who answered.
        endpoint: String,
        /// The highest revision seen before the request was sent.
        seen: i64,
        /// The revision of this answer.
        found: i64,
    },
}

/// What one try at one endpoint proved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// The request never left: the connection could not be made.
    NotSent(String),
    /// It may have been carried out.
    NoAnswer(String),
    /// The member said that it cannot tell or cannot serve now.
    Busy(String),
    /// The member said no.
    Refused(String),
    /// The member does not know the lease.
    LeaseNotFound,
    /// The answer cannot be trusted.
    Suspicious(Suspicion),
}

/// Sorts what the client reports. A status with a source is the transport's own; one without came from etcd.
pub(super) fn classify(error: &etcd_client::Error) -> Failure {
    let etcd_client::Error::GRpcStatus(status) = error else {
        return match error {
            etcd_client::Error::TransportError(e) => Failure::NotSent(chain(e)),
            other => Failure::NotSent(other.to_string()),
        };
    };
    if let Some(source) = status.source() {
        let text = chain(source);
        return if never_connected(source) { Failure::NotSent(text) } else { Failure::NoAnswer(text) };
    }
    let text = format!("{:?}: {}", status.code(), status.message());
    match status.code() {
        // Of the calls made here only those that name a lease can answer so.
        Code::NotFound => Failure::LeaseNotFound,
        Code::InvalidArgument
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented => Failure::Refused(text),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => Failure::Busy(text),
    }
}

/// Whether etcd refused because its database is full, which it does for every transaction, also one that writes nothing.
pub(super) fn is_no_space(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status) if status.code() == Code::ResourceExhausted && status.source().is_none())
}

fn never_connected(mut error: &(dyn std::error::Error + 'static)) -> bool {
    loop {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        match error.source() {
            Some(next) => error = next,
            None => return false,
        }
    }
}

/// An error and what is behind it, each said once.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        next = cause.source();
    }
    text
}

/// What all tries together prove. `writes` says whether the request would have changed something.
pub(super) fn conclude(failures: &[(String, Failure)], writes: bool) -> EtcdError {
    let unknown = |f: &Failure| matches!(f, Failure::NoAnswer(_) | Failure::Busy(_));
    let all = failures.iter().map(|(endpoint, failure)| format!("{endpoint}: {}", words(failure))).collect::<Vec<_>>().join("; ");
    if writes && failures.iter().any(|(_, f)| unknown(f)) {
        return EtcdError::Unknown(all);
    }
    if failures.iter().any(|(_, f)| matches!(f, Failure::LeaseNotFound)) {
        return EtcdError::LeaseNotFound;
    }
    if let Some(why) = failures.iter().find_map(|(_, f)| if let Failure::Suspicious(s) = f { Some(s.clone()) } else { None }) {
        return EtcdError::Suspicious(why);
    }
    if failures.iter().any(|(_, f)| matches!(f, Failure::Refused(_))) {
        return EtcdError::Refused(all);
    }
    EtcdError::Unreachable(all)
}

fn words(failure: &Failure) -> String {
    match failure {
        Failure::NotSent(text) | Failure::NoAnswer(text) | Failure::Busy(text) | Failure::Refused(text) => text.clone(),
        Failure::LeaseNotFound => "lease not found".into(),
        Failure::Suspicious(why) => why.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(failure: Failure) -> Vec<(String, Failure)> {
        vec![("a".into(), failure)]
    }

    #[test]
    fn a_write_that_got_no_answer_is_unknown_whatever_the_others_said() {
        let mut failures = one(Failure::NoAnswer("timed out".into()));
        failures.push(("b".into(), Failure::Refused("no space".into())));
        assert!(matches!(conclude(&failures, true), EtcdError::Unknown(_)));
        assert!(matches!(conclude(&failures, false), EtcdError::Refused(_)), "a read cannot have happened by half");
    }

    #[test]
    fn a_write_that_never_left_is_not_unknown() {
        assert!(matches!(conclude(&one(Failure::NotSent("refused".into())), true), EtcdError::Unreachable(_)));
    }

    #[test]
    fn a_gone_lease_is_told_apart() {
        let status = tonic::Status::new(Code::NotFound, "etcdserver: requested lease not found");
        assert_eq!(classify(&etcd_client::Error::GRpcStatus(status)), Failure::LeaseNotFound);
        assert_eq!(conclude(&one(Failure::LeaseNotFound), true), EtcdError::LeaseNotFound);
    }

    #[test]
    fn no_space_is_a_refusal_and_no_leader_is_not() {
        let status = |code, text: &str| etcd_client::Error::GRpcStatus(tonic::Status::new(code, text));
        assert!(matches!(classify(&status(Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded")), Failure::Refused(_)));
        assert!(matches!(classify(&status(Code::Unavailable, "etcdserver: no leader")), Failure::Busy(_)));
    }
}
