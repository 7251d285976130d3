//! Every event, in one order, to a sink.
//!
//! The order is that of the lock of the sink. A free is written before its memory can be handed out again,
//! an allocation after, so an address that is used again is freed first in the log too.
//!
//! A sink that fails (a full disk, a closed pipe) must not stop the program: its error is kept and told by
//! [`Log::flush`], and nothing more is written, so that what the sink took remains a log without gaps.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;

use super::Allocate;
use crate::driver::{DevicePtr, Stream};
use crate::error::Result;
use crate::memory::pool::{Block, Pool, Watch};
use crate::units::StreamId;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LogAction {
    /// A block was handed out.
    Allocate,
    /// A block was dropped.
    Free,
    /// A request was refused.
    Failure,
    /// A stream other than home was recorded on a block.
    RecordStream,
}

/// One event of a [`Log`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LogEvent {
    /// What happened.
    pub action: LogAction,
    /// Counts the requests of the log, from 0, and names the block that came of one.
    pub request: u64,
    /// Address of the block; zero for a failure.
    pub ptr: DevicePtr,
    /// Bytes asked for.
    pub bytes: u64,
    /// The block's home; for [`RecordStream`](LogAction::RecordStream) the stream that was recorded.
    pub stream: StreamId,
    /// The thread that did it, numbered from 0 in the order in which threads met any log of the process.
    pub thread: u64,
    /// When it was logged.
    pub time: SystemTime,
}

/// Takes the events of a [`Log`]. [`telemetry`](crate::telemetry) has sinks that write files.
///
/// Must not panic, and must not allocate through the log that it serves.
pub trait LogSink: Send {
    /// Takes one event.
    ///
    /// # Errors
    /// If it cannot be written; it is then the last one.
    fn write(&mut self, event: &LogEvent) -> io::Result<()>;

    /// Sees to it that what was taken is where it belongs.
    ///
    /// # Errors
    /// If that fails.
    fn flush(&mut self) -> io::Result<()>;
}

/// A log that is not complete.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the log is incomplete, {missing} events were not taken: {source}")]
pub struct LogError {
    /// Events that the sink was not given, and the one it failed at. What a sink had buffered may be
    /// missing as well.
    pub missing: u64,
    /// What the sink said.
    pub source: Arc<io::Error>,
}

/// An allocator that writes down what is asked of it.
///
/// # Examples
/// ```
/// use kitsune::memory::{Allocate, Log};
/// use kitsune::telemetry::ReplayCsv;
/// use kitsune::{Device, HostConfig, Pool, PoolConfig};
///
/// let device = Device::host(HostConfig::default())?;
/// let pool = Pool::new(&device, PoolConfig::default())?;
/// let log = Log::new(pool, ReplayCsv::new(std::io::stdout())?);
/// let stream = device.create_stream()?;
/// drop(log.allocate(1000, &stream)?);
/// log.flush()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Log<A> {
    inner: A,
    writer: Arc<Writer>,
}

struct Writer {
    core: Mutex<Core>,
}

struct Core {
    sink: Box<dyn LogSink>,
    next_request: u64,
    failed: Option<LogError>,
}

impl<A: Allocate> Log<A> {
    /// Writes what is asked of `inner` to `sink`.
    #[must_use]
    pub fn new(inner: A, sink: impl LogSink + 'static) -> Self {
        let core = Core {
            sink: Box::new(sink),
            next_request: 0,
            failed: None,
        };
        let writer = Arc::new(Writer {
            core: Mutex::new(core),
        });
        Self { inner, writer }
    }

    /// Flushes the sink and says whether it has taken every event so far. Without this the sink decides
    /// what happens to what it has buffered when it is dropped, with the log and its last block.
    ///
    /// # Errors
    /// [`LogError`] if the sink failed now or ever: an error is told at every call from then on.
    pub fn flush(&self) -> Result<(), LogError> {
        let mut core = self.writer.core.lock();
        if core.failed.is_none()
            && let Err(error) = core.sink.flush()
        {
            core.fail(error, 0);
        }
        core.failed.clone().map_or(Ok(()), Err)
    }

    /// The allocator inside.
    #[must_use]
    pub fn inner(&self) -> &A {
        &self.inner
    }
}

impl Core {
    fn fail(&mut self, error: io::Error, missing: u64) {
        self.failed = Some(LogError {
            missing,
            source: Arc::new(error),
        });
    }

    /// Numbers the next request.
    fn request(&mut self) -> u64 {
        let request = self.next_request;
        self.next_request += 1;
        request
    }

    fn write(
        &mut self,
        action: LogAction,
        request: u64,
        ptr: DevicePtr,
        bytes: u64,
        stream: &Stream,
    ) {
        if let Some(failed) = &mut self.failed {
            failed.missing += 1;
            return;
        }
        let event = LogEvent {
            action,
            request,
            ptr,
            bytes,
            stream: stream.id(),
            thread: thread_number(),
            time: SystemTime::now(),
        };
        if let Err(error) = self.sink.write(&event) {
            self.fail(error, 1);
        }
    }
}

fn thread_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    thread_local! {
        // Relaxed: the number only has to be unique.
        static NUMBER: u64 = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}

impl Watch for Writer {
    /// The key is the request's number.
    fn freed(&self, key: u64, block: &Block) {
        if let Some(home) = block.home() {
            let (ptr, bytes) = (block.ptr(), block.requested());
            let mut core = self.core.lock();
            core.write(LogAction::Free, key, ptr, bytes, home);
        }
    }

    fn recorded(&self, key: u64, block: &Block, stream: &Stream) {
        let (ptr, bytes) = (block.ptr(), block.requested());
        let mut core = self.core.lock();
        core.write(LogAction::RecordStream, key, ptr, bytes, stream);
    }
}

impl<A: Allocate> Allocate for Log<A> {
    fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
        let outcome = self.inner.allocate(bytes, stream);
        if bytes == 0 {
            return outcome;
        }
        let mut core = self.writer.core.lock();
        let request = core.request();
        match outcome {
            Ok(mut block) => {
                core.write(LogAction::Allocate, request, block.ptr(), bytes, stream);
                drop(core);
                block.watch(self.writer.clone(), request);
                Ok(block)
            }
            Err(error) => {
                core.write(LogAction::Failure, request, DevicePtr(0), bytes, stream);
                Err(error)
            }
        }
    }

    fn pool(&self) -> &Pool {
        self.inner.pool()
    }
}

impl<A: fmt::Debug> fmt::Debug for Log<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writer")
    }
}
