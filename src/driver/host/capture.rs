//! Captures: recording work instead of running it.
//!
//! A capture begins on its *origin*; a stream that waits for an event recorded in the capture becomes a *member*.
//! Work is kept in the order in which it was enqueued. That order satisfies every wait, so events and waits are not
//! kept. They are still tracked as *clocks*, to check that every member was joined back: a clock counts the steps of
//! each stream that precede a point.
//!
//! A call that would have to wait for captured work *invalidates* the capture: the wait is impossible, and a graph
//! without it would not be what the program meant.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::errno::{ECANCELED, EINVAL, refuse};
use super::operation::Work;
use crate::error::{Error, Result};

/// How many steps of each stream, by its number, precede a point.
pub(super) type Clock = HashMap<u64, u64>;

/// A capture, active or over.
#[derive(Debug)]
pub(super) struct Capture {
    origin: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    work: Vec<Work>,
    /// The clock at the current end of each member. The member's own entry counts its steps.
    members: HashMap<u64, Clock>,
    /// The call that invalidated the capture.
    invalidated: Option<&'static str>,
    over: bool,
}

impl State {
    /// Fails if the capture is over or can no longer become a graph.
    fn check(&self, call: &'static str) -> Result<()> {
        if self.over {
            let reason = "the event marks a point in a capture that is over";
            return Err(refuse(call, EINVAL, reason));
        }
        match self.invalidated {
            None => Ok(()),
            Some(by) => Err(refuse(
                call,
                ECANCELED,
                format!("the capture was invalidated by {by}"),
            )),
        }
    }

    fn clock(&mut self, stream: u64) -> &mut Clock {
        self.members
            .get_mut(&stream)
            .expect("a capturing stream is a member of its capture")
    }
}

impl Capture {
    /// A capture whose only member is `origin`.
    pub(super) fn new(origin: u64) -> Self {
        let state = State {
            members: HashMap::from([(origin, Clock::from([(origin, 0)]))]),
            ..State::default()
        };
        Self {
            origin,
            state: Mutex::new(state),
        }
    }

    pub(super) fn origin(&self) -> u64 {
        self.origin
    }

    /// Appends work to the member `stream`.
    pub(super) fn push(&self, call: &'static str, stream: u64, work: Work) -> Result<()> {
        let mut state = self.state.lock();
        state.check(call)?;
        *state.clock(stream).entry(stream).or_default() += 1;
        state.work.push(work);
        Ok(())
    }

    /// The clock at the current end of the member `stream`.
    pub(super) fn mark(&self, call: &'static str, stream: u64) -> Result<Clock> {
        let mut state = self.state.lock();
        state.check(call)?;
        Ok(state.clock(stream).clone())
    }

    /// Makes everything that precedes `point` also precede the end of `stream`, which becomes a member if needed.
    pub(super) fn join(&self, call: &'static str, stream: u64, point: &Clock) -> Result<()> {
        let mut state = self.state.lock();
        state.check(call)?;
        // Becoming a member counts as a step: even a stream that did nothing has to be joined back.
        let fresh = || Clock::from([(stream, 1)]);
        let clock = state.members.entry(stream).or_insert_with(fresh);
        for (&other, &steps) in point {
            let known = clock.entry(other).or_default();
            *known = steps.max(*known);
        }
        Ok(())
    }

    /// Invalidates the capture because of `call`, and returns the error for `call`.
    pub(super) fn invalidate(&self, call: &'static str) -> Error {
        let mut state = self.state.lock();
        match state.check(call) {
            Err(error) if state.over => error,
            _ => {
                state.invalidated.get_or_insert(call);
                Error::Capturing { call }
            }
        }
    }

    /// Ends the capture. Returns its members, and its work unless it was invalidated or a member was not
    /// joined back to the origin.
    pub(super) fn finish(&self, call: &'static str) -> (Vec<u64>, Result<Vec<Work>>) {
        let mut state = self.state.lock();
        let valid = state.check(call);
        state.over = true;
        let members = std::mem::take(&mut state.members);
        let work = std::mem::take(&mut state.work);
        // Dropping work runs destructors of its kernels, so the capture must not be locked then.
        drop(state);
        let end = &members[&self.origin];
        let unjoined = members
            .iter()
            .find(|(stream, clock)| end.get(stream) < clock.get(stream));
        let outcome = match unjoined {
            Some((stream, _)) if valid.is_ok() => {
                let reason = format!(
                    "unjoined: stream {stream} has captured work that stream {} does not wait for",
                    self.origin
                );
                Err(refuse(call, EINVAL, reason))
            }
            _ => valid.map(|()| work),
        };
        (members.into_keys().collect(), outcome)
    }
}
