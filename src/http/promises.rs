//! The calls of a leader that goes on without etcd (`POST /failsafe`): handed to the machine, and its answers handed back.
//!
//! The rule that would surprise: nothing in here promises. The machine books a promise before it answers; one that hangs answers nobody,
//! and an answer that comes when nobody waits any more goes nowhere.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};

use crate::clock::BootTime;
use crate::facts::failsafe::PromiseAsk;

/// Calls that may be under way at one time.
const UNDER_WAY_MAX: usize = 16;

/// Hands a call to the machine: its number, the call, and when it was received. Must not block.
pub type HandIn = Box<dyn Fn(u64, PromiseAsk, BootTime) + Send + Sync>;

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answered {
    /// Promised.
    Promised,
    /// Refused: a sentence.
    Refused(String),
    /// The machine did not answer in time, or too many calls are under way: a sentence.
    Unanswered(String),
}

/// Who waits for which answer.
pub struct Promises {
    hand_in: HandIn,
    waiting: Mutex<BTreeMap<u64, oneshot::Sender<Result<(), String>>>>,
    next: AtomicU64,
    places: Semaphore,
}

impl Promises {
    /// Nobody waits yet.
    pub fn new(hand_in: HandIn) -> Arc<Promises> {
        Arc::new(Promises { hand_in, waiting: Mutex::default(), next: AtomicU64::new(1), places: Semaphore::new(UNDER_WAY_MAX) })
    }

    /// The machine's answer.
    pub fn answer(&self, id: u64, result: Result<(), String>) {
        if let Some(waiting) = self.waiting().remove(&id) {
            // Whoever asked may have left at this very moment.
            let _ = waiting.send(result);
        }
    }

    /// Asks the machine, and waits for it no longer than that.
    pub async fn ask(&self, ask: PromiseAsk, received: BootTime, within: Duration) -> Answered {
        let Ok(_place) = self.places.try_acquire() else {
            return Answered::Unanswered(format!("{UNDER_WAY_MAX} such calls are under way"));
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.waiting().insert(id, sender);
        (self.hand_in)(id, ask, received);
        let answered = tokio::time::timeout(within, answer).await;
        self.waiting().remove(&id);
        match answered {
            Ok(Ok(Ok(()))) => Answered::Promised,
            Ok(Ok(Err(why))) => Answered::Refused(why),
            Ok(Err(_)) | Err(_) => Answered::Unanswered(format!("this member did not decide within {} ms", within.as_millis())),
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, oneshot::Sender<Result<(), String>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
