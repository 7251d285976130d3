//! The queue of one stream, used by every executor.
//!
//! Invariants: at most one operation of a queue runs at a time, and operations are taken in the order in which they
//! were pushed. A failure is permanent for the stream: work after it is dropped without running, and marks after it
//! carry the failure. Streams that wait for those marks fail as well, because the work they waited for never ran.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::mark::Failure;
use super::memory::Memory;
use super::operation::{Operation, Work};

/// A stream's operations. Lives until the last of them has run, even after the stream's handle is gone.
#[derive(Debug)]
pub(super) struct Queue {
    id: u64,
    /// Keeps the device's memory mapped while there is work that may touch it.
    _memory: Arc<Memory>,
    state: Mutex<State>,
    /// Wakes the queue's thread, if it has one: an operation was pushed, or the queue was closed.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    operations: VecDeque<Operation>,
    /// Whether an operation was taken and has not finished.
    busy: bool,
    closed: bool,
    has_thread: bool,
    failure: Option<Failure>,
}

impl State {
    fn is_idle(&self) -> bool {
        self.operations.is_empty() && !self.busy
    }

    /// Takes the next operation, unless one is running.
    fn take(&mut self) -> Option<Operation> {
        if self.busy {
            return None;
        }
        let operation = self.operations.pop_front()?;
        self.busy = true;
        Some(operation)
    }
}

impl Queue {
    pub(super) fn new(id: u64, memory: Arc<Memory>) -> Self {
        Self {
            id,
            _memory: memory,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Appends an operation, for an executor without threads.
    pub(super) fn push(&self, operation: Operation) {
        self.state.lock().operations.push_back(operation);
    }

    /// Appends an operation and wakes the queue's thread, which `start` creates if there is none yet.
    /// If `start` fails, the queue is unchanged.
    pub(super) fn push_waking<E>(
        &self,
        operation: Operation,
        start: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut state = self.state.lock();
        // On an idle queue, pass a mark at once, and run work whose caller would wait for it on the calling thread.
        // Neither needs to wake the queue's thread.
        if state.is_idle() {
            if let Operation::Record(mark) = &operation {
                mark.pass(state.failure.clone());
                return Ok(());
            }
            if let Operation::Awaited(..) = operation {
                state.busy = true;
                drop(state);
                self.execute(operation);
                // Operations may have been appended meanwhile.
                self.changed.notify_one();
                return Ok(());
            }
        }
        if !state.has_thread {
            start()?;
            state.has_thread = true;
        }
        state.operations.push_back(operation);
        self.changed.notify_one();
        Ok(())
    }

    /// Changes the shadow after everything in the queue, or now if the queue is idle. A queue that is not idle has a
    /// thread that runs it.
    #[cfg(asan)]
    pub(super) fn push_shadow(&self, shadow: super::shadow::Shadow) {
        let mut state = self.state.lock();
        if state.is_idle() {
            shadow.apply();
        } else {
            let work = super::operation::Work::shadow(shadow);
            state.operations.push_back(Operation::Work(work));
            self.changed.notify_one();
        }
    }

    /// Takes the next operation, blocking while there is none; `None` once the queue is closed and empty.
    pub(super) fn take_blocking(&self) -> Option<Operation> {
        let mut state = self.state.lock();
        loop {
            if let Some(operation) = state.take() {
                return Some(operation);
            }
            if state.closed && state.operations.is_empty() {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }

    /// Takes the next operation if it can run without waiting.
    pub(super) fn take_ready(&self) -> Option<Operation> {
        let mut state = self.state.lock();
        if state.operations.front()?.is_ready() {
            state.take()
        } else {
            None
        }
    }

    /// Whether [`take_ready`](Self::take_ready) would return an operation.
    pub(super) fn is_ready(&self) -> bool {
        self.state
            .lock()
            .operations
            .front()
            .is_some_and(Operation::is_ready)
    }

    /// Runs an operation that was taken from this queue.
    pub(super) fn execute(&self, operation: Operation) {
        let (outcome, mark) = match operation {
            Operation::Record(mark) => (Ok(()), Some(mark)),
            Operation::Wait(mark) => (mark.wait(), None),
            Operation::Work(work) => (self.run(work), None),
            Operation::Awaited(work, mark) => (self.run(work), Some(mark)),
        };
        // Under one lock, so that a host thread that sees the mark passed also finds the stream idle.
        let mut state = self.state.lock();
        state.busy = false;
        state.failure = state.failure.take().or(outcome.err());
        if let Some(mark) = mark {
            mark.pass(state.failure.clone());
        }
    }

    /// Runs work, or drops it if the stream has failed.
    fn run(&self, work: Work) -> Result<(), Failure> {
        let failed = self.state.lock().failure.is_some();
        if failed {
            work.discard()
        } else {
            work.finish()
        }
    }

    /// Closes the queue: nothing more will be pushed. Operations already pushed still run.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_one();
    }

    /// Whether the queue is closed and everything in it has run.
    pub(super) fn is_spent(&self) -> bool {
        let state = self.state.lock();
        state.closed && state.is_idle()
    }

    /// Whether everything pushed so far has run, or the stream's failure.
    pub(super) fn progress(&self) -> Result<bool, Failure> {
        let state = self.state.lock();
        match &state.failure {
            Some(failure) => Err(failure.clone()),
            None => Ok(state.is_idle()),
        }
    }
}
