//! An executor with one thread a stream.
//!
//! A thread starts with the first operation that needs one, and ends when its queue is closed and empty. It
//! holds its queue and, through it, the memory of the device, but not the platform: dropping the last
//! driver from any thread, a stream's own included, blocks nobody. Threads cannot wait for each other in a
//! circle, because a wait names a mark that was enqueued before it; a kernel, which could ask for one enqueued
//! behind itself, must not wait at all.

use std::cell::Cell;
use std::sync::Arc;
use std::thread;

use super::errno::{EDEADLK, EIO, refuse};
use super::executor::Executor;
use super::mark::Mark;
use super::operation::Operation;
use super::queue::Queue;
use crate::error::Result;

thread_local! {
    /// Whether this is the thread of a stream.
    static IS_STREAM: Cell<bool> = const { Cell::new(false) };
}

/// One thread a stream. All state is in the queues.
#[derive(Debug)]
pub(super) struct Threads;

impl Executor for Threads {
    fn open(&self, _queue: &Arc<Queue>) {}

    fn close(&self, queue: &Arc<Queue>) {
        queue.close();
    }

    fn enqueue(&self, call: &'static str, queue: &Arc<Queue>, operation: Operation) -> Result<()> {
        queue.push_waking(operation, || start(call, Arc::clone(queue)))
    }

    fn advance(&self) {}

    fn wait(&self, call: &'static str, mark: &Mark) -> Result<()> {
        if IS_STREAM.get() && !mark.is_passed() {
            let reason = "a kernel waits for a stream, which may be its own";
            return Err(refuse(call, EDEADLK, reason));
        }
        mark.wait().map_err(|failure| refuse(call, EIO, &*failure))
    }
}

/// Starts the thread of `queue`.
fn start(call: &'static str, queue: Arc<Queue>) -> Result<()> {
    let drain = move || {
        IS_STREAM.set(true);
        while let Some(operation) = queue.take_blocking() {
            queue.execute(operation);
        }
    };
    // Nobody joins the thread: it ends by itself, and what it needs it owns.
    thread::Builder::new()
        .name("kitsune-stream".to_owned())
        .spawn(drain)
        .map(drop)
        .map_err(|error| {
            let code = error.raw_os_error().unwrap_or(EIO);
            refuse(call, code, format!("no thread for the stream: {error}"))
        })
}
