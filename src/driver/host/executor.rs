//! Who runs the operations, and when.

use std::fmt::Debug;
use std::sync::Arc;

use super::config::HostSchedule;
use super::mark::Mark;
use super::operation::Operation;
use super::queue::Queue;
use super::seeded::Seeded;
use super::threads::Threads;
use crate::error::Result;

/// Runs the queues of a platform. Operations of one queue run in order, and a wait holds its queue until
/// its mark is passed; nothing else is promised about the order.
pub(super) trait Executor: Debug + Send + Sync {
    /// Takes charge of a new queue.
    fn open(&self, queue: &Arc<Queue>);

    /// Lets go of a queue once everything in it has run. Does not wait for that.
    fn close(&self, queue: &Arc<Queue>);

    /// Appends `operation` to `queue`. An error leaves everything as it was.
    fn enqueue(&self, call: &'static str, queue: &Arc<Queue>, operation: Operation) -> Result<()>;

    /// Called before the host asks how far a stream is, so that asking again and again comes to an end.
    fn advance(&self);

    /// Blocks until `mark` is passed.
    fn wait(&self, call: &'static str, mark: &Mark) -> Result<()>;
}

/// The executor that `schedule` names.
pub(super) fn executor(schedule: HostSchedule) -> Box<dyn Executor> {
    match schedule {
        HostSchedule::Threads => Box::new(Threads),
        HostSchedule::Seeded(seed) => Box::new(Seeded::new(seed)),
    }
}
