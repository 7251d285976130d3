//! Streams, events, and the work they hold.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::capture::Clock;
use crate::memory::pointer;
use crate::modules::Launch;
use crate::sim::{Code, Sim, code};

/// The legacy default stream, one of whose two names is 1.
const LEGACY: usize = 0;

/// What the per-thread default streams are called here: this, and the number of the thread.
const PER_THREAD: usize = 1 << 62;

/// The stream that a handle means on this thread.
pub(crate) fn queue(handle: usize) -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static THREAD: usize = THREADS.fetch_add(1, Ordering::Relaxed);
    }
    match handle {
        0 | 1 => LEGACY,
        2 => PER_THREAD + THREAD.with(|thread| *thread),
        handle => handle,
    }
}

#[derive(Default)]
pub(crate) struct Stream {
    queue: VecDeque<Op>,
    /// The capture it is part of.
    pub(crate) capture: Option<usize>,
    /// Whether its handle is gone. What it holds still runs.
    pub(crate) is_destroyed: bool,
    /// Whether it is ordered with the legacy default stream.
    is_blocking: bool,
}

/// A point that a stream passes once.
pub(crate) struct Mark {
    stream: usize,
    passed_at: OnceLock<Instant>,
}

#[derive(Default)]
pub(crate) struct Event {
    pub(crate) mark: Option<EventMark>,
}

#[derive(Clone)]
pub(crate) enum EventMark {
    Plain(Arc<Mark>),
    Captured { capture: usize, clock: Clock },
}

/// A function that a stream calls.
pub(crate) type HostFunction = extern "C" fn(*mut c_void);

/// One entry of a queue.
#[derive(Clone)]
pub(crate) enum Op {
    Copy {
        dst: usize,
        src: usize,
        bytes: usize,
    },
    /// A copy from ordinary memory that the device reaches.
    Late {
        dst: usize,
        src: usize,
        bytes: usize,
    },
    Upload {
        dst: usize,
        staged: Arc<[u8]>,
    },
    Fill {
        dst: usize,
        value: u8,
        bytes: usize,
    },
    Launch(Launch),
    /// A function of the host's, with what it is called with.
    Call(HostFunction, usize),
    Free(usize),
    Record(Arc<Mark>),
    Wait(Arc<Mark>),
    Graph(Arc<[Op]>),
}

impl Sim {
    pub(crate) fn stream(&mut self, handle: usize) -> Result<&mut Stream, Code> {
        if handle == LEGACY || handle >= PER_THREAD {
            let stream = self.streams.entry(handle);
            return Ok(stream.or_insert_with(|| Stream::new(handle != LEGACY)));
        }
        let stream = self.streams.get_mut(&handle);
        stream
            .filter(|stream| !stream.is_destroyed)
            .ok_or(code::INVALID_HANDLE)
    }

    /// Puts work at the end of a stream, or into the capture it is part of.
    pub(crate) fn push(&mut self, handle: usize, op: Op) -> Result<(), Code> {
        let capture = self.stream(handle)?.capture;
        if let Some(capture) = capture {
            return self.capture(capture).push(handle, op);
        }
        self.order_with_legacy(handle);
        self.stream(handle)?.queue.push_back(op);
        Ok(())
    }

    /// Puts what comes next on the legacy stream behind the blocking streams, or what comes next on one of
    /// those behind the legacy stream.
    fn order_with_legacy(&mut self, handle: usize) {
        let behind: Vec<usize> = match self.streams.get(&handle) {
            Some(stream) if stream.is_blocking => vec![LEGACY],
            _ if handle == LEGACY => {
                let blocking = self.streams.iter().filter(|(_, stream)| stream.is_blocking);
                blocking.map(|(handle, _)| *handle).collect()
            }
            _ => Vec::new(),
        };
        for other in behind {
            let Some(other_stream) = self
                .streams
                .get_mut(&other)
                .filter(|other| !other.is_idle())
            else {
                continue;
            };
            let mark = Arc::new(Mark {
                stream: other,
                passed_at: OnceLock::new(),
            });
            other_stream.queue.push_back(Op::Record(Arc::clone(&mark)));
            if let Some(stream) = self.streams.get_mut(&handle) {
                stream.queue.push_back(Op::Wait(mark));
            }
        }
    }

    pub(crate) fn record(&mut self, event: usize, handle: usize) -> Result<(), Code> {
        let capture = self.stream(handle)?.capture;
        let mark = match capture {
            Some(capture) => EventMark::Captured {
                capture,
                clock: self.capture(capture).mark(handle)?,
            },
            None => {
                let mark = Arc::new(Mark {
                    stream: handle,
                    passed_at: OnceLock::new(),
                });
                self.stream(handle)?
                    .queue
                    .push_back(Op::Record(Arc::clone(&mark)));
                EventMark::Plain(mark)
            }
        };
        self.event(event)?.mark = Some(mark);
        Ok(())
    }

    pub(crate) fn wait(&mut self, handle: usize, event: usize) -> Result<(), Code> {
        let mark = self.event(event)?.mark.clone();
        let member_of = self.stream(handle)?.capture;
        match (mark, member_of) {
            (None, _) => Ok(()),
            (Some(EventMark::Plain(mark)), None) => {
                self.stream(handle)?.queue.push_back(Op::Wait(mark));
                Ok(())
            }
            (Some(EventMark::Plain(_)), Some(capture)) => {
                self.capture(capture).invalidate();
                Err(code::CAPTURE_ISOLATION)
            }
            (Some(EventMark::Captured { capture, clock }), member_of) => {
                if !self.captures.contains_key(&capture) {
                    return Err(code::CAPTURED_EVENT);
                }
                if let Some(other) = member_of.filter(|other| *other != capture) {
                    self.capture(other).invalidate();
                    self.capture(capture).invalidate();
                    return Err(code::CAPTURE_MERGE);
                }
                self.capture(capture).join(handle, &clock)?;
                self.stream(handle)?.capture = Some(capture);
                Ok(())
            }
        }
    }

    pub(crate) fn event(&mut self, handle: usize) -> Result<&mut Event, Code> {
        self.events.get_mut(&handle).ok_or(code::INVALID_HANDLE)
    }

    /// The mark of an event that may be asked for; an event that was captured may not.
    pub(crate) fn askable(&mut self, event: usize) -> Result<Option<Arc<Mark>>, Code> {
        match self.event(event)?.mark.clone() {
            None => Ok(None),
            Some(EventMark::Plain(mark)) => Ok(Some(mark)),
            Some(EventMark::Captured { capture, .. }) => {
                if let Some(capture) = self.captures.get_mut(&capture) {
                    capture.invalidate();
                }
                Err(code::CAPTURED_EVENT)
            }
        }
    }

    /// Refuses to wait for a stream that is being captured.
    pub(crate) fn check_waitable(&mut self, handle: usize) -> Result<(), Code> {
        match self.stream(handle)?.capture {
            None => Ok(()),
            Some(capture) => {
                self.capture(capture).invalidate();
                Err(code::CAPTURE_UNSUPPORTED)
            }
        }
    }

    /// Runs all that a stream holds.
    pub(crate) fn drain(&mut self, handle: usize) -> Result<(), Code> {
        while self.step(handle)? {}
        Ok(())
    }

    pub(crate) fn drain_all(&mut self) -> Result<(), Code> {
        let handles: Vec<usize> = self.streams.keys().copied().collect();
        handles
            .into_iter()
            .try_for_each(|handle| self.drain(handle))
    }

    /// Runs other streams, and this one's, until the mark is passed.
    pub(crate) fn pass(&mut self, mark: &Mark) -> Result<(), Code> {
        while !mark.is_passed() {
            let moved = self.step(mark.stream)?;
            assert!(
                moved,
                "a mark lies in the queue of its stream until it is passed"
            );
        }
        Ok(())
    }

    /// One step of a stream; whether there was one to take.
    pub(crate) fn step(&mut self, handle: usize) -> Result<bool, Code> {
        let op = self
            .streams
            .get_mut(&handle)
            .and_then(|stream| stream.queue.pop_front());
        let Some(op) = op else { return Ok(false) };
        if let Op::Wait(mark) = &op {
            self.pass(mark)?;
        }
        let outcome = self.run(&op);
        if let Err(code) = outcome {
            self.broken = Some(code);
        }
        outcome.map(|()| true)
    }

    fn run(&mut self, op: &Op) -> Result<(), Code> {
        match op {
            Op::Copy { dst, src, bytes } => {
                self.check_range(*dst, *bytes)?;
                self.check_range(*src, *bytes)?;
                let (dst, src) = (pointer(*dst).cast::<u8>(), pointer(*src).cast::<u8>());
                // SAFETY: both ranges are there; `copy` allows overlap.
                unsafe { dst.copy_from(src, *bytes) };
            }
            Op::Late { dst, src, bytes } => {
                self.check_range(*dst, *bytes)?;
                let (dst, src) = (pointer(*dst).cast::<u8>(), pointer(*src).cast::<u8>());
                // SAFETY: the destination is there, and the caller keeps the source until here.
                unsafe { dst.copy_from(src, *bytes) };
            }
            Op::Upload { dst, staged } => {
                self.check_range(*dst, staged.len())?;
                let dst = pointer(*dst).cast::<u8>();
                // SAFETY: the range is there, the source is ours.
                unsafe { dst.copy_from(staged.as_ptr(), staged.len()) };
            }
            Op::Fill { dst, value, bytes } => {
                self.check_range(*dst, *bytes)?;
                // SAFETY: the range is there.
                unsafe { pointer(*dst).cast::<u8>().write_bytes(*value, *bytes) };
            }
            Op::Launch(launch) => self.run_kernel(launch)?,
            Op::Call(function, data) => function(pointer(*data)),
            Op::Free(address) => self.memory.free(*address)?,
            // A mark is passed once: captures keep no records.
            Op::Record(mark) => drop(mark.passed_at.set(Instant::now())),
            Op::Wait(_) => {}
            Op::Graph(parts) => parts.iter().try_for_each(|part| self.run(part))?,
        }
        Ok(())
    }

    /// Whether the device can reach all of the range.
    pub(crate) fn is_reachable(&self, address: usize, bytes: usize) -> bool {
        self.memory.holds_device(address, bytes)
            || self.memory.holds_pinned(address, bytes)
            || self.pages.hold(address, bytes)
    }

    fn check_range(&mut self, address: usize, bytes: usize) -> Result<(), Code> {
        if self.is_reachable(address, bytes) {
            return Ok(());
        }
        self.complaints
            .push(format!("{bytes} bytes at {address:#x} are not there"));
        Err(code::ILLEGAL_ADDRESS)
    }
}

impl Stream {
    pub(crate) fn new(is_blocking: bool) -> Self {
        Self {
            is_blocking,
            ..Self::default()
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }
}

impl Mark {
    pub(crate) fn is_passed(&self) -> bool {
        self.passed_at.get().is_some()
    }

    /// When the stream passed here, by the host's clock.
    pub(crate) fn passed_at(&self) -> Option<Instant> {
        self.passed_at.get().copied()
    }

    pub(crate) fn stream(&self) -> usize {
        self.stream
    }
}
