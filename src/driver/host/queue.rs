//! The queue of one stream, whoever executes it.
//!
//! Invariants: at most one operation of a queue is under way, and operations are taken in the order in
//! which they were pushed. A failure stays for the life of the stream: work behind it is dropped unrun,
//! marks behind it carry it, and so do the streams that wait for those marks, because what they were
//! waiting for never came to be.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::mark::Failure;
use super::memory::Memory;
use super::operation::{Operation, Work};

/// A stream's operations. Lives until the last of them has run, longer than the stream's handle if need be.
#[derive(Debug)]
pub(super) struct Queue {
    id: u64,
    /// Keeps the device's memory mapped while there is work that may touch it.
    _memory: Arc<Memory>,
    state: Mutex<State>,
    /// Signals the thread of the queue, if it has one: an operation, or the close.
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

    /// Takes the next operation, unless one is under way.
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

    /// Appends an operation and wakes the queue's thread, which `start` makes if there is none yet.
    /// An error of `start` leaves the queue as it was.
    pub(super) fn push_waking<E>(
        &self,
        operation: Operation,
        start: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut state = self.state.lock();
        // With nothing before it, a record is passed where it stands, and work whose caller would wait for it is
        // done by the caller: no thread has to wake for it.
        if state.is_idle() {
            if let Operation::Record(mark) = &operation {
                mark.pass(state.failure.clone());
                return Ok(());
            }
            if let Operation::Awaited(..) = operation {
                state.busy = true;
                drop(state);
                self.execute(operation);
                // For what was appended meanwhile.
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

    /// Changes the shadow behind what is in the queue: now, if that is nothing. A queue that is not empty has whoever
    /// runs it.
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

    /// Whether [`take_ready`](Self::take_ready) would give an operation.
    pub(super) fn is_ready(&self) -> bool {
        self.state
            .lock()
            .operations
            .front()
            .is_some_and(Operation::is_ready)
    }

    /// Carries out an operation that was taken from this queue.
    pub(super) fn execute(&self, operation: Operation) {
        let (outcome, mark) = match operation {
            Operation::Record(mark) => (Ok(()), Some(mark)),
            Operation::Wait(mark) => (mark.wait(), None),
            Operation::Work(work) => (self.run(work), None),
            Operation::Awaited(work, mark) => (self.run(work), Some(mark)),
        };
        // In one step, so that a host that saw the mark finds the stream idle.
        let mut state = self.state.lock();
        state.busy = false;
        state.failure = state.failure.take().or(outcome.err());
        if let Some(mark) = mark {
            mark.pass(state.failure.clone());
        }
    }

    /// Does work, or drops it if the stream has failed.
    fn run(&self, work: Work) -> Result<(), Failure> {
        let failed = self.state.lock().failure.is_some();
        if failed {
            work.discard()
        } else {
            work.finish()
        }
    }

    /// Says that nothing more will be pushed. What was pushed still runs.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_one();
    }

    /// Whether the queue is closed and everything in it has run.
    pub(super) fn is_spent(&self) -> bool {
        let state = self.state.lock();
        state.closed && state.is_idle()
    }

    /// Whether everything pushed so far has run, or the failure of what has.
    pub(super) fn progress(&self) -> Result<bool, Failure> {
        let state = self.state.lock();
        match &state.failure {
            Some(failure) => Err(failure.clone()),
            None => Ok(state.is_idle()),
        }
    }
}
