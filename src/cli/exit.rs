//! How a command ends: the exit codes that scripts rely on, and an error that carries one.
//!
//! A command that fails says so once, on standard error, as a chain of causes; only [`Failure::code`] is for programs.

use std::fmt;

use crate::etcd::EtcdError;
use crate::spec::Problems;

/// Done.
pub const DONE: u8 = 0;
/// Failed. For `status --check`: not ready.
pub const FAILED: u8 = 1;
/// Wrong use, or an invalid document.
pub const WRONG: u8 = 2;
/// etcd cannot be reached.
pub const NO_ETCD: u8 = 3;
/// Refused: a precondition does not hold.
pub const REFUSED: u8 = 4;
/// Still running when `--timeout` passed.
pub const TIMED_OUT: u8 = 6;

/// Why a command did not do what it was asked, and the exit code for it.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// What to tell.
    pub error: anyhow::Error,
}

impl Failure {
    /// A failure of this code with this sentence.
    pub fn new(code: u8, sentence: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self { code, error: anyhow::Error::msg(sentence) }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        let code = match error.downcast_ref::<EtcdError>() {
            Some(EtcdError::Unreachable(_)) => NO_ETCD,
            _ => FAILED,
        };
        Self { code, error }
    }
}

impl From<EtcdError> for Failure {
    fn from(error: EtcdError) -> Self {
        anyhow::Error::from(error).into()
    }
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        Self { code: WRONG, error: problems.into() }
    }
}

/// What a command returns: the exit code, or why not.
pub type Outcome = Result<u8, Failure>;
