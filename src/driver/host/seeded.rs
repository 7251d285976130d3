//! An executor without threads, whose order depends on a seed.
//!
//! Operations run inside driver calls, one at a time in the whole platform. After every enqueue and before every query,
//! a random generator decides how many operations to run, often none. A host thread that waits runs operations until
//! the wait is satisfied. The next stream is drawn from those that can proceed, with a preference for the one that ran
//! last. Without this preference one stream would rarely get far ahead of another, which is when missing waits show.
//!
//! Operations run only inside driver calls, so a kernel that owns a handle of its device keeps the device alive until
//! something waits for the kernel.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::{self, ThreadId};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::errno::{EDEADLK, EIO, refuse};
use super::executor::Executor;
use super::mark::Mark;
use super::operation::Operation;
use super::queue::Queue;
use crate::error::Result;

/// Runs all streams on the calling threads, in an order that the seed determines.
#[derive(Debug)]
pub(super) struct Seeded {
    state: Mutex<State>,
    /// Signals that the running operation has finished.
    finished: Condvar,
}

#[derive(Debug)]
struct State {
    generator: Generator,
    /// Ordered by number, so that a draw picks the same queue every time.
    queues: BTreeMap<u64, Arc<Queue>>,
    /// The queue that ran last.
    favorite: u64,
    /// The thread that runs an operation. Only that thread may clear it.
    runner: Option<ThreadId>,
}

impl Seeded {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            state: Mutex::new(State {
                generator: Generator(seed),
                queues: BTreeMap::new(),
                favorite: 0,
                runner: None,
            }),
            finished: Condvar::new(),
        }
    }

    /// Runs one operation with the lock released; returns false if none is ready. No other operation may be running.
    fn step(&self, state: &mut MutexGuard<'_, State>) -> bool {
        assert!(state.runner.is_none(), "one operation at a time");
        let Some((queue, operation)) = state.choose() else {
            return false;
        };
        state.runner = Some(thread::current().id());
        MutexGuard::unlocked(state, || queue.execute(operation));
        state.runner = None;
        if queue.is_spent() {
            state.queues.remove(&queue.id());
        }
        self.finished.notify_all();
        true
    }
}

impl State {
    /// Takes a ready operation from a queue that the generator picks.
    fn choose(&mut self) -> Option<(Arc<Queue>, Operation)> {
        let ready: Vec<_> = self
            .queues
            .values()
            .filter(|queue| queue.is_ready())
            .collect();
        if ready.is_empty() {
            return None;
        }
        let stays = !self.generator.one_in(4);
        let favorite = ready.iter().find(|queue| queue.id() == self.favorite);
        let queue = match favorite {
            Some(queue) if stays => queue,
            _ => ready[self.generator.below(ready.len())],
        };
        self.favorite = queue.id();
        // Another host thread can only have appended to the queue since it was found ready.
        let operation = queue.take_ready()?;
        Some((Arc::clone(queue), operation))
    }
}

impl Executor for Seeded {
    fn open(&self, queue: &Arc<Queue>) {
        self.state
            .lock()
            .queues
            .insert(queue.id(), Arc::clone(queue));
    }

    fn close(&self, queue: &Arc<Queue>) {
        let mut state = self.state.lock();
        queue.close();
        if queue.is_spent() {
            state.queues.remove(&queue.id());
        }
    }

    fn enqueue(&self, _call: &'static str, queue: &Arc<Queue>, operation: Operation) -> Result<()> {
        queue.push(operation);
        self.advance();
        Ok(())
    }

    fn advance(&self) {
        let mut state = self.state.lock();
        while state.runner.is_none() && state.generator.one_in(3) {
            if !self.step(&mut state) {
                break;
            }
        }
    }

    fn wait(&self, call: &'static str, mark: &Mark) -> Result<()> {
        let mut state = self.state.lock();
        while !mark.is_passed() {
            match state.runner {
                Some(thread) if thread == thread::current().id() => {
                    let reason = "a kernel waits for a stream, and so for itself";
                    return Err(refuse(call, EDEADLK, reason));
                }
                Some(_) => self.finished.wait(&mut state),
                None => {
                    if !self.step(&mut state) {
                        let reason = "no enqueued work can reach the awaited point";
                        return Err(refuse(call, EDEADLK, reason));
                    }
                }
            }
        }
        drop(state);
        mark.wait().map_err(|failure| refuse(call, EIO, &*failure))
    }
}

impl Drop for Seeded {
    /// Runs the remaining operations: enqueued work always runs, as on every executor.
    fn drop(&mut self) {
        let mut state = self.state.lock();
        while self.step(&mut state) {}
    }
}

/// A small random number generator: a counter passed through a hash (MurmurHash3's finalizer), so that neighboring
/// seeds produce unrelated sequences.
#[derive(Debug)]
struct Generator(u64);

impl Generator {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        value = (value ^ (value >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        value ^ (value >> 33)
    }

    /// A number below `bound`. For small bounds the modulo bias does not matter.
    fn below(&mut self, bound: usize) -> usize {
        crate::units::to_usize(self.next() % bound as u64)
    }

    /// True with probability 1 / `count`.
    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}
