//! An executor with one thread per stream.
//!
//! A thread starts with the first operation that needs one, and ends when its queue is closed and empty. It keeps its
//! queue alive and, through it, the device's memory, but not the platform. So the last driver can be dropped on any
//! thread, including a stream's own, without blocking. Threads cannot deadlock on each other, because a wait names a
//! mark that was enqueued before it. A kernel could wait for a mark enqueued after itself, so kernels must not wait at
//! all.

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

/// Runs one thread per stream. All state is in the queues.
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
            let reason = "a kernel waits for a stream, possibly its own";
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
    // The thread is not joined: it ends by itself and owns everything it needs.
    thread::Builder::new()
        .name("kitsune-stream".to_owned())
        .spawn(drain)
        .map(drop)
        .map_err(|error| {
            let code = error.raw_os_error().unwrap_or(EIO);
            refuse(
                call,
                code,
                format!("cannot start a thread for the stream: {error}"),
            )
        })
}
