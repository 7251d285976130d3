//! Streams, events and graphs of a group of devices.
//!
//! The devices of a platform share one executor and one table each of streams, events and graphs, so every device
//! accepts every handle. A handle is a number that is never reused. No lock is held while an executor is called,
//! because an executor may run work, and dropping work may call the driver.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use super::capture::{Capture, Clock};
use super::config::HostSchedule;
use super::errno::{EINVAL, EIO, refuse};
use super::executor::{Executor, executor};
use super::mark::Mark;
use super::memory::Memory;
use super::operation::{Operation, Work};
use super::queue::Queue;
use crate::driver::{RawEvent, RawGraph, RawStream};
use crate::error::{Error, Result};

/// The state that the devices of a group share.
#[derive(Debug)]
pub(super) struct Platform {
    id: u64,
    executor: Box<dyn Executor>,
    last_handle: AtomicU64,
    streams: RwLock<HashMap<RawStream, Arc<StreamEntry>>>,
    events: Mutex<HashMap<RawEvent, Point>>,
    graphs: Mutex<HashMap<RawGraph, Arc<[Work]>>>,
}

#[derive(Debug)]
struct StreamEntry {
    queue: Arc<Queue>,
    /// The device that made it.
    ordinal: u32,
    capture: Mutex<Option<Arc<Capture>>>,
}

impl StreamEntry {
    fn capture(&self) -> Option<Arc<Capture>> {
        self.capture.lock().clone()
    }

    /// Refuses `call`, which would have to wait for captured work, and invalidates the capture.
    fn refuse_capturing(&self, call: &'static str) -> Result<()> {
        match self.capture() {
            None => Ok(()),
            Some(capture) => Err(capture.invalidate(call)),
        }
    }
}

/// What an event marks.
#[derive(Clone, Debug)]
enum Point {
    /// Nothing yet.
    Unmarked,
    /// A point in a stream.
    Mark(Arc<Mark>),
    /// A point in a capture.
    Captured(Arc<Capture>, Arc<Clock>),
}

impl Platform {
    pub(super) fn new(schedule: HostSchedule) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self {
            // Relaxed, here and below: the number only has to be unique.
            id: LAST.fetch_add(1, Ordering::Relaxed) + 1,
            executor: executor(schedule),
            last_handle: AtomicU64::new(0),
            streams: RwLock::default(),
            events: Mutex::default(),
            graphs: Mutex::default(),
        }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    fn next_handle(&self) -> u64 {
        self.last_handle.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn stream(&self, call: &'static str, stream: RawStream) -> Result<Arc<StreamEntry>> {
        let entry = self.streams.read().get(&stream).cloned();
        entry.ok_or_else(|| refuse(call, EINVAL, format!("there is no stream {}", stream.0)))
    }

    fn event(&self, call: &'static str, event: RawEvent) -> Result<Point> {
        let point = self.events.lock().get(&event).cloned();
        point.ok_or_else(|| no_event(call, event))
    }

    // Streams.

    /// A stream of device `ordinal`, which keeps that device's `memory` alive until its work has run.
    pub(super) fn create_stream(&self, ordinal: u32, memory: Arc<Memory>) -> RawStream {
        let stream = RawStream(self.next_handle());
        let queue = Arc::new(Queue::new(stream.0, memory));
        self.executor.open(&queue);
        let entry = StreamEntry {
            queue,
            ordinal,
            capture: Mutex::default(),
        };
        self.streams.write().insert(stream, Arc::new(entry));
        stream
    }

    pub(super) fn destroy_stream(&self, stream: RawStream) -> Result<()> {
        const CALL: &str = "destroy_stream";
        let entry = self.streams.write().remove(&stream);
        let entry = entry
            .ok_or_else(|| refuse(CALL, EINVAL, format!("there is no stream {}", stream.0)))?;
        if let Some(capture) = entry.capture()
            && capture.origin() == stream.0
        {
            // The capture can no longer be ended by its caller. Release its members and drop its work.
            let (members, _) = capture.finish(CALL);
            self.dismiss(CALL, &members);
        }
        self.executor.close(&entry.queue);
        Ok(())
    }

    /// Destroys the remaining streams of device `ordinal`.
    pub(super) fn destroy_streams_of(&self, ordinal: u32) {
        let left: Vec<RawStream> = {
            let streams = self.streams.read();
            let of_device = streams.iter().filter(|(_, entry)| entry.ordinal == ordinal);
            of_device.map(|(stream, _)| *stream).collect()
        };
        for stream in left {
            // Fails only if another thread has just destroyed the stream.
            let _ = self.destroy_stream(stream);
        }
    }

    pub(super) fn synchronize_stream(&self, stream: RawStream) -> Result<()> {
        const CALL: &str = "synchronize_stream";
        let entry = self.stream(CALL, stream)?;
        entry.refuse_capturing(CALL)?;
        self.reach_end(CALL, &entry.queue)
    }

    /// Blocks until everything in `queue` so far has run.
    fn reach_end(&self, call: &'static str, queue: &Arc<Queue>) -> Result<()> {
        let mark = Arc::new(Mark::default());
        let record = Operation::Record(Arc::clone(&mark));
        self.executor.enqueue(call, queue, record)?;
        self.executor.wait(call, &mark)
    }

    /// Appends work to `stream` and blocks until it has run. After an error the work may still be in the queue.
    pub(super) fn finish(&self, call: &'static str, stream: RawStream, work: Work) -> Result<()> {
        let entry = self.stream(call, stream)?;
        entry.refuse_capturing(call)?;
        let mark = Arc::new(Mark::default());
        let awaited = Operation::Awaited(work, Arc::clone(&mark));
        self.executor.enqueue(call, &entry.queue, awaited)?;
        self.executor.wait(call, &mark)
    }

    pub(super) fn query_stream(&self, stream: RawStream) -> Result<bool> {
        const CALL: &str = "query_stream";
        let entry = self.stream(CALL, stream)?;
        entry.refuse_capturing(CALL)?;
        self.executor.advance();
        let progress = entry.queue.progress();
        progress.map_err(|failure| refuse(CALL, EIO, &*failure))
    }

    /// Appends work to `stream`, or to the capture it is part of.
    pub(super) fn enqueue(&self, call: &'static str, stream: RawStream, work: Work) -> Result<()> {
        let entry = self.stream(call, stream)?;
        match entry.capture() {
            Some(capture) => capture.push(call, stream.0, work),
            None => self
                .executor
                .enqueue(call, &entry.queue, Operation::Work(work)),
        }
    }

    /// Changes the shadow in order with `stream`. If the stream is capturing, unpoisoning becomes part of the graph,
    /// and poisoning is skipped because the graph may use the memory.
    #[cfg(asan)]
    pub(super) fn change_shadow(&self, shadow: super::shadow::Shadow, stream: RawStream) {
        const CALL: &str = "permit";
        let Ok(entry) = self.stream(CALL, stream) else {
            return;
        };
        match entry.capture() {
            Some(capture) if shadow.is_permitted => {
                // An error means that the capture is invalid and will not become a graph.
                let _ = capture.push(CALL, stream.0, Work::shadow(shadow));
            }
            Some(_) => {}
            None => entry.queue.push_shadow(shadow),
        }
    }

    // Events.

    pub(super) fn create_event(&self) -> RawEvent {
        let event = RawEvent(self.next_handle());
        self.events.lock().insert(event, Point::Unmarked);
        event
    }

    pub(super) fn destroy_event(&self, event: RawEvent) -> Result<()> {
        let removed = self.events.lock().remove(&event);
        removed
            .map(drop)
            .ok_or_else(|| no_event("destroy_event", event))
    }

    pub(super) fn record(&self, event: RawEvent, stream: RawStream) -> Result<()> {
        const CALL: &str = "record";
        let entry = self.stream(CALL, stream)?;
        self.event(CALL, event)?;
        let point = match entry.capture() {
            Some(capture) => {
                let clock = capture.mark(CALL, stream.0)?;
                Point::Captured(capture, Arc::new(clock))
            }
            None => {
                let mark = Arc::new(Mark::default());
                let record = Operation::Record(Arc::clone(&mark));
                self.executor.enqueue(CALL, &entry.queue, record)?;
                Point::Mark(mark)
            }
        };
        let replaced = match self.events.lock().get_mut(&event) {
            Some(present) => std::mem::replace(present, point),
            None => return Err(no_event(CALL, event)),
        };
        // Outside the lock: dropping the last event of a capture drops its work.
        drop(replaced);
        Ok(())
    }

    pub(super) fn query_event(&self, event: RawEvent) -> Result<bool> {
        const CALL: &str = "query_event";
        match self.event(CALL, event)? {
            Point::Unmarked => Ok(true),
            Point::Captured(capture, _) => Err(capture.invalidate(CALL)),
            Point::Mark(mark) => {
                self.executor.advance();
                mark.query(CALL)
            }
        }
    }

    pub(super) fn synchronize_event(&self, event: RawEvent) -> Result<()> {
        const CALL: &str = "synchronize_event";
        match self.event(CALL, event)? {
            Point::Unmarked => Ok(()),
            Point::Captured(capture, _) => Err(capture.invalidate(CALL)),
            Point::Mark(mark) => self.executor.wait(CALL, &mark),
        }
    }

    pub(super) fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()> {
        const CALL: &str = "stream_wait";
        let entry = self.stream(CALL, stream)?;
        match (entry.capture(), self.event(CALL, event)?) {
            (_, Point::Unmarked) => Ok(()),
            (None, Point::Mark(mark)) if mark.is_clear() => Ok(()),
            (None, Point::Mark(mark)) => {
                self.executor
                    .enqueue(CALL, &entry.queue, Operation::Wait(mark))
            }
            // Work inside a capture cannot wait for work outside it.
            (Some(capture), Point::Mark(_)) => Err(capture.invalidate(CALL)),
            (None, Point::Captured(capture, clock)) => {
                capture.join(CALL, stream.0, &clock)?;
                *entry.capture.lock() = Some(capture);
                Ok(())
            }
            (Some(mine), Point::Captured(other, clock)) => {
                if Arc::ptr_eq(&mine, &other) {
                    return mine.join(CALL, stream.0, &clock);
                }
                other.invalidate(CALL);
                Err(mine.invalidate(CALL))
            }
        }
    }

    // Captures and graphs.

    pub(super) fn begin_capture(&self, stream: RawStream) -> Result<()> {
        const CALL: &str = "begin_capture";
        let entry = self.stream(CALL, stream)?;
        let mut present = entry.capture.lock();
        if present.is_some() {
            return Err(Error::Capturing { call: CALL });
        }
        *present = Some(Arc::new(Capture::new(stream.0)));
        Ok(())
    }

    pub(super) fn end_capture(&self, stream: RawStream) -> Result<RawGraph> {
        const CALL: &str = "end_capture";
        let entry = self.stream(CALL, stream)?;
        let capture = entry.capture();
        let capture = capture.ok_or_else(|| {
            refuse(
                CALL,
                EINVAL,
                format!("stream {} is not being captured", stream.0),
            )
        })?;
        if capture.origin() != stream.0 {
            let reason = format!("the capture was begun on stream {}", capture.origin());
            return Err(refuse(CALL, EINVAL, reason));
        }
        let (members, work) = capture.finish(CALL);
        self.dismiss(CALL, &members);
        let graph = RawGraph(self.next_handle());
        self.graphs.lock().insert(graph, work?.into());
        Ok(graph)
    }

    /// Makes the members of a finished capture ordinary streams again.
    fn dismiss(&self, call: &'static str, members: &[u64]) {
        for member in members {
            // A member may have been destroyed meanwhile.
            if let Ok(entry) = self.stream(call, RawStream(*member)) {
                *entry.capture.lock() = None;
            }
        }
    }

    pub(super) fn is_capturing(&self, stream: RawStream) -> Result<bool> {
        Ok(self.stream("is_capturing", stream)?.capture().is_some())
    }

    /// # Safety
    /// As [`Driver::launch_graph`](crate::driver::Driver::launch_graph).
    pub(super) unsafe fn launch_graph(&self, graph: RawGraph, stream: RawStream) -> Result<()> {
        const CALL: &str = "launch_graph";
        let parts = self.graphs.lock().get(&graph).cloned();
        let parts = parts.ok_or_else(|| no_graph(CALL, graph))?;
        // SAFETY: the caller repeats the promises made when the parts were captured.
        let work = unsafe { Work::graph(parts) };
        self.enqueue(CALL, stream, work)
    }

    pub(super) fn destroy_graph(&self, graph: RawGraph) -> Result<()> {
        let removed = self.graphs.lock().remove(&graph);
        removed
            .map(drop)
            .ok_or_else(|| no_graph("destroy_graph", graph))
    }
}

fn no_event(call: &'static str, event: RawEvent) -> Error {
    refuse(call, EINVAL, format!("there is no event {}", event.0))
}

fn no_graph(call: &'static str, graph: RawGraph) -> Error {
    refuse(call, EINVAL, format!("there is no graph {}", graph.0))
}
