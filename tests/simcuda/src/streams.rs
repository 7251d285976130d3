//! Streams, events, and the work they hold.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::capture::Clock;
use crate::memory::pointer;
use crate::modules::Launch;
use crate::sim::{Code, Sim, code};

/// Handles of the default streams: the legacy one under both of its names, and the one of each thread, which
/// is one stream for all of them here.
const DEFAULTS: [usize; 3] = [0, 1, 2];

#[derive(Default)]
pub(crate) struct Stream {
    queue: VecDeque<Op>,
    /// The capture it is part of.
    pub(crate) capture: Option<usize>,
    /// Whether its handle is gone. What it holds still runs.
    pub(crate) is_destroyed: bool,
}

/// A point that a stream passes once.
pub(crate) struct Mark {
    stream: usize,
    is_passed: AtomicBool,
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

/// One entry of a queue.
#[derive(Clone)]
pub(crate) enum Op {
    Copy {
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
    Free(usize),
    Record(Arc<Mark>),
    Wait(Arc<Mark>),
    Graph(Arc<[Op]>),
}

impl Sim {
    pub(crate) fn stream(&mut self, handle: usize) -> Result<&mut Stream, Code> {
        if DEFAULTS.contains(&handle) {
            return Ok(self.streams.entry(handle).or_default());
        }
        let stream = self.streams.get_mut(&handle);
        stream
            .filter(|stream| !stream.is_destroyed)
            .ok_or(code::INVALID_HANDLE)
    }

    /// Puts work at the end of a stream, or into the capture it is part of.
    pub(crate) fn push(&mut self, handle: usize, op: Op) -> Result<(), Code> {
        let stream = self.stream(handle)?;
        match stream.capture {
            None => stream.queue.push_back(op),
            Some(capture) => self.capture(capture).push(handle, op)?,
        }
        Ok(())
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
                    is_passed: AtomicBool::new(false),
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
            Op::Free(address) => self.memory.free(*address)?,
            Op::Record(mark) => mark.is_passed.store(true, Ordering::Relaxed),
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
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }
}

impl Mark {
    pub(crate) fn is_passed(&self) -> bool {
        self.is_passed.load(Ordering::Relaxed)
    }

    pub(crate) fn stream(&self) -> usize {
        self.stream
    }
}
