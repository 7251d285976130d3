//! The clock of one stream: its epoch, its recorded events, and how far it is known to be.

use std::collections::VecDeque;

use crate::driver::{Event, Stream};
use crate::memory::types::EPOCH_BITS;

/// Most recorded events of a deterministic stream. Older ones are dropped: each later event covers them.
const UNSEEN_MAX: usize = 32;

#[derive(Debug)]
pub(crate) struct Clock {
    /// `None` for unowned memory and for numbers whose stream was dropped.
    pub(super) stream: Option<Stream>,
    /// The epoch that a free stamps now. It moves on with each recorded event.
    pub(super) epoch: u64,
    /// Recorded events that were not seen complete yet, with the epochs they cover, oldest first.
    pub(super) events: VecDeque<(u64, Event)>,
    /// Newest epoch known to be complete.
    pub(super) complete: u64,
    /// For each other owner, the newest epoch that this stream was made to wait for.
    pub(super) waited: Vec<u64>,
    /// Frees since the last event, while other streams lack memory of this one.
    pub(super) frees: u32,
    /// Events that are still to be recorded in advance.
    pub(super) ahead: u32,
    pub(super) is_deterministic: bool,
}

impl Clock {
    /// Queries recorded events, oldest first, and records what is complete.
    pub(super) fn poll(&mut self) {
        if self.is_deterministic {
            let surplus = self.events.len().saturating_sub(UNSEEN_MAX);
            self.events.drain(..surplus);
            return;
        }
        while let Some((epoch, event)) = self.events.front() {
            // An event that cannot be queried (a capture is under way, the stream failed) counts as not
            // complete: memory is held back, never handed out early.
            if !event.is_complete().unwrap_or(false) {
                return;
            }
            self.complete = *epoch;
            self.events.pop_front();
        }
    }

    /// Makes sure that an event covers `epoch`; whether one does.
    pub(super) fn cover(&mut self, epoch: u64) -> bool {
        if self
            .events
            .back()
            .is_some_and(|(covered, _)| *covered >= epoch)
        {
            return true;
        }
        // Drop what is complete first, so that events do not pile up if nobody queries them.
        self.poll();
        // An event recorded in a capture never completes, and a stream that waits for it joins the capture.
        let stream = self
            .stream
            .as_ref()
            .filter(|stream| is_free_to_wait(stream));
        let Some(Ok(event)) = stream.map(Stream::record) else {
            return false;
        };
        self.events.push_back((self.epoch, event));
        self.move_on();
        true
    }

    pub(super) fn move_on(&mut self) {
        self.epoch += 1;
        assert!(
            self.epoch >> EPOCH_BITS == 0,
            "a stream has fewer than 2^43 epochs"
        );
    }
}

/// Whether `stream` is known not to be part of a capture.
pub(crate) fn is_free_to_wait(stream: &Stream) -> bool {
    matches!(stream.driver().is_capturing(stream.raw()), Ok(false))
}

impl Clock {
    pub(super) fn new(stream: Option<Stream>, epoch: u64, is_deterministic: bool) -> Self {
        // Everything before the first epoch is complete: there was nothing.
        let complete = epoch - 1;
        Self {
            stream,
            epoch,
            events: VecDeque::new(),
            complete,
            waited: Vec::new(),
            frees: 0,
            ahead: 0,
            is_deterministic,
        }
    }

    /// Waits on the host until everything up to `epoch` has run; whether it has.
    pub(super) fn synchronize(&mut self, epoch: u64) -> bool {
        let first = self.events.partition_point(|(covered, _)| *covered < epoch);
        let Some((covered, event)) = self.events.get(first) else {
            return false;
        };
        if event.synchronize().is_err() {
            return false;
        }
        self.complete = *covered;
        self.events.drain(..=first);
        true
    }
}
