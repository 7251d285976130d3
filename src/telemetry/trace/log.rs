//! Allocation logs as traces.

use std::collections::HashMap;
use std::io::{self, Write};

use super::{Event, Header, Reason, THREADS_MAX, TraceError, TraceWriter};
use crate::memory::{LogAction, LogEvent, LogSink};
use crate::units::StreamId;

/// Writes the events of a [`Log`](crate::memory::Log) as a trace, which
/// [`TraceReader`](super::TraceReader) reads and `kitsune replay` repeats. Lines are many and small: give
/// it a buffered writer.
///
/// Streams are numbered in the order in which they come up; one more than the header announces is an
/// error. Host threads are numbered likewise: an `h` line comes before the events of another thread than the last one,
/// in the order of the log. The 64th and all later threads share the last number. A failure becomes a mark.
/// What orders streams (waits, synchronization) does not pass an allocator and is not in the trace.
///
/// # Examples
/// ```
/// use kitsune::memory::Log;
/// use kitsune::telemetry::trace::TraceLog;
/// use kitsune::{Device, HostConfig, Pool, PoolConfig};
///
/// let device = Device::host(HostConfig::default())?;
/// let pool = Pool::new(&device, PoolConfig::default())?;
/// let log = Log::new(pool, TraceLog::new(Vec::new(), "my-program", 2)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TraceLog<W> {
    writer: TraceWriter<W>,
    streams: HashMap<StreamId, u32>,
    threads: HashMap<u64, u32>,
    /// The thread of the last event.
    thread: u32,
}

impl<W: Write> TraceLog<W> {
    /// A sink with the header written: of a program called `name`, one word, with up to `streams` streams.
    ///
    /// # Errors
    /// [`TraceError`] for a name that is not one word or a count that is out of range, or if `output`
    /// fails.
    pub fn new(output: W, name: &str, streams: u32) -> Result<Self, TraceError> {
        let header = Header {
            streams,
            threads: THREADS_MAX,
            name: name.to_owned(),
            others: Vec::new(),
        };
        Ok(Self {
            writer: TraceWriter::new(output, &header)?,
            streams: HashMap::new(),
            threads: HashMap::new(),
            thread: 0,
        })
    }

    /// Writes an event, behind a line that names its thread if that is not the last one's.
    fn write_on(&mut self, thread: u64, event: &Event) -> Result<(), TraceError> {
        let next = u32::try_from(self.threads.len()).unwrap_or(u32::MAX);
        let last = THREADS_MAX - 1;
        let thread = match self.threads.get(&thread) {
            Some(thread) => *thread,
            None if next < last => *self.threads.entry(thread).or_insert(next),
            None => last,
        };
        if thread != self.thread {
            self.writer.write(&Event::Thread { thread })?;
            self.thread = thread;
        }
        self.writer.write(event)
    }

    /// The number of a stream. The writer refuses one too many.
    fn stream(&mut self, stream: StreamId) -> u32 {
        let next = self.streams.len();
        let next = u32::try_from(next).expect("streams are refused from the 65,537th on");
        *self.streams.entry(stream).or_insert(next)
    }
}

impl<W: Write + Send> LogSink for TraceLog<W> {
    fn write(&mut self, event: &LogEvent) -> io::Result<()> {
        let (id, bytes, stream) = (event.request, event.bytes, self.stream(event.stream));
        let thread = event.thread;
        let event = match event.action {
            LogAction::Allocate => Event::Allocate { id, bytes, stream },
            LogAction::Free => Event::Free { id, stream: None },
            LogAction::RecordStream => Event::RecordStream { id, stream },
            LogAction::Failure => Event::Mark(format!("no room for {bytes} on {stream}")),
        };
        self.write_on(thread, &event).map_err(|error| match error {
            TraceError {
                reason: Reason::Io(error),
                ..
            } => error,
            other => io::Error::other(other),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}
