//! Captures: work kept in the order of its calls, which is one that all its dependencies allow.
//!
//! A clock says how many steps of each member are behind a point; it tells whether all members were joined.

use std::collections::HashMap;
use std::sync::Arc;

use crate::sim::{Code, Sim, code};
use crate::streams::Op;

/// Steps of each stream that are behind a point.
pub(crate) type Clock = HashMap<usize, u64>;

pub(crate) struct Capture {
    origin: usize,
    ops: Vec<Op>,
    /// The clock at the end of each member.
    members: HashMap<usize, Clock>,
    is_invalid: bool,
}

impl Capture {
    pub(crate) fn of(origin: usize) -> Self {
        Self {
            origin,
            ops: Vec::new(),
            members: HashMap::from([(origin, Clock::from([(origin, 0)]))]),
            is_invalid: false,
        }
    }

    fn check(&self) -> Result<(), Code> {
        if self.is_invalid {
            return Err(code::CAPTURE_INVALIDATED);
        }
        Ok(())
    }

    pub(crate) fn push(&mut self, stream: usize, op: Op) -> Result<(), Code> {
        self.check()?;
        *self
            .members
            .entry(stream)
            .or_default()
            .entry(stream)
            .or_default() += 1;
        self.ops.push(op);
        Ok(())
    }

    pub(crate) fn mark(&self, stream: usize) -> Result<Clock, Code> {
        self.check()?;
        Ok(self.members[&stream].clone())
    }

    pub(crate) fn join(&mut self, stream: usize, point: &Clock) -> Result<(), Code> {
        self.check()?;
        // Joining is a step: a member that does nothing has to be joined back as well.
        let clock = self
            .members
            .entry(stream)
            .or_insert_with(|| Clock::from([(stream, 1)]));
        for (other, steps) in point {
            let known = clock.entry(*other).or_default();
            *known = (*known).max(*steps);
        }
        Ok(())
    }

    pub(crate) fn invalidate(&mut self) {
        self.is_invalid = true;
    }

    /// 1 while it is good, 2 when it was invalidated: CUDA's numbers.
    pub(crate) fn status(&self) -> i32 {
        if self.is_invalid { 2 } else { 1 }
    }

    fn is_joined(&self) -> bool {
        let end = &self.members[&self.origin];
        self.members
            .iter()
            .all(|(stream, clock)| end.get(stream) >= clock.get(stream))
    }
}

impl Sim {
    /// The capture that a stream says it is part of.
    pub(crate) fn capture(&mut self, handle: usize) -> &mut Capture {
        self.captures
            .get_mut(&handle)
            .expect("a stream is part of captures under way only")
    }

    pub(crate) fn begin_capture(&mut self, stream: usize) -> Result<(), Code> {
        let handle = self.handle();
        let begun = self.stream(stream)?;
        if begun.capture.is_some() {
            return Err(code::ILLEGAL_STATE);
        }
        begun.capture = Some(handle);
        self.captures.insert(handle, Capture::of(stream));
        Ok(())
    }

    /// Ends the capture begun on `stream` and gives the handle of its graph.
    pub(crate) fn end_capture(&mut self, stream: usize) -> Result<usize, Code> {
        let handle = self.stream(stream)?.capture.ok_or(code::ILLEGAL_STATE)?;
        if self.capture(handle).origin != stream {
            self.capture(handle).invalidate();
            return Err(code::CAPTURE_UNMATCHED);
        }
        let capture = self.drop_capture(handle);
        capture.check()?;
        if !capture.is_joined() {
            return Err(code::CAPTURE_UNJOINED);
        }
        let graph = self.handle();
        self.graphs.insert(graph, Arc::from(capture.ops));
        Ok(graph)
    }

    /// Makes the members of a capture ordinary streams again.
    pub(crate) fn drop_capture(&mut self, handle: usize) -> Capture {
        let capture = self
            .captures
            .remove(&handle)
            .expect("the capture is under way");
        for stream in self.streams.values_mut() {
            if stream.capture == Some(handle) {
                stream.capture = None;
            }
        }
        capture
    }

    /// The capture that `stream` began, if one is under way.
    pub(crate) fn capture_from(&self, stream: usize) -> Option<usize> {
        let begun =
            |(handle, capture): (&usize, &Capture)| (capture.origin == stream).then_some(*handle);
        self.captures.iter().find_map(begun)
    }
}
