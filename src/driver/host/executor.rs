//! The interface of an executor, which decides where and when operations run.

use std::fmt::Debug;
use std::sync::Arc;

use super::config::HostSchedule;
use super::mark::Mark;
use super::operation::Operation;
use super::queue::Queue;
use super::seeded::Seeded;
use super::threads::Threads;
use crate::error::Result;

/// Runs the queues of a platform. Operations of one queue run in order, and a wait blocks its queue until its mark is
/// passed. Executors make no other promise about the order.
pub(super) trait Executor: Debug + Send + Sync {
    /// Takes charge of a new queue.
    fn open(&self, queue: &Arc<Queue>);

    /// Releases a queue once everything in it has run. Does not wait for that.
    fn close(&self, queue: &Arc<Queue>);

    /// Appends `operation` to `queue`. An error changes nothing.
    fn enqueue(&self, call: &'static str, queue: &Arc<Queue>, operation: Operation) -> Result<()>;

    /// Called before the host queries a stream's progress, so that a polling loop terminates.
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
