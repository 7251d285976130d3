//! Plays a program, pass after pass. Its host threads take turns with the player.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use super::backend::{Backend, Trouble};
use super::meter::{Meter, Metering};
use super::probe::AllocationClock;
use super::program::{HostThread, Operation, Program};

/// The most blocks in transit from one thread to its partner.
pub(crate) const HANDOFF_CAPACITY: usize = 256;

/// A program with its blocks.
pub(crate) struct Player<'a, B: Backend> {
    program: &'a Program,
    backend: B,
    slots: Vec<Option<B::Block>>,
    handoff: Handoff<B::Block>,
    tools: Tools,
    /// The operation that comes next.
    next: usize,
    /// Failed allocations since the last [`take_ooms`](Self::take_ooms).
    ooms: u64,
}

/// Tools that the players of a crew share.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tools {
    /// Counts allocations, if a lag depends on them.
    pub(crate) clock: Option<Arc<AllocationClock>>,
    /// Tracks the live bytes in the first pass only, since later passes may be timed.
    pub(crate) meter: Option<Arc<Meter>>,
}

/// A thread's end of the channel to its partner. A block that could not be allocated is handed over as `None`.
pub(crate) enum Handoff<T> {
    None,
    To(SyncSender<Option<T>>),
    From(Receiver<Option<T>>),
}

impl<'a, B: Backend> Player<'a, B> {
    /// A player of `program`.
    pub(crate) fn new(
        program: &'a Program,
        backend: B,
        handoff: Handoff<B::Block>,
        tools: Tools,
    ) -> Self {
        let slots = (0..program.slots).map(|_| None).collect();
        Self {
            program,
            backend,
            slots,
            handoff,
            tools,
            next: 0,
            ooms: 0,
        }
    }

    /// The number of host threads that play the program.
    pub(super) fn threads(&self) -> usize {
        self.program.threads()
    }

    /// Plays up to the next turn and returns the host thread whose turn it is, or up to the end of the pass. After an
    /// error the player must not be used again.
    pub(super) fn turn(&mut self) -> Result<Option<HostThread>, (u64, Trouble)> {
        let Some(meter) = self.tools.meter.clone() else {
            return self.turn_with(());
        };
        let turn = self.turn_with(&*meter);
        if matches!(turn, Ok(None)) {
            self.tools.meter = None;
        }
        turn
    }

    /// Returns the number of failed allocations since the last call.
    pub(super) fn take_ooms(&mut self) -> u64 {
        std::mem::take(&mut self.ooms)
    }

    fn turn_with(&mut self, meter: impl Metering) -> Result<Option<HostThread>, (u64, Trouble)> {
        let program = self.program;
        let from = self.next;
        for (at, operation) in program.operations.iter().enumerate().skip(from) {
            if let Operation::Turn { thread } = *operation {
                self.next = at + 1;
                return Ok(Some(thread));
            }
            let outcome = self.play(*operation, meter);
            outcome.map_err(|trouble| (program.line(at), trouble))?;
        }
        self.next = 0;
        self.backend.finish().map_err(|trouble| (0, trouble))?;
        Ok(None)
    }

    #[inline]
    fn play(&mut self, operation: Operation, meter: impl Metering) -> Result<(), Trouble> {
        match operation {
            Operation::Allocate {
                slot,
                stream,
                bytes,
            } => {
                if let Some(clock) = &self.tools.clock {
                    clock.tick();
                }
                let block = self.backend.allocate(bytes, stream)?;
                match &block {
                    Some(_) => meter.allocated(bytes),
                    None => self.ooms += 1,
                }
                self.slots[slot as usize] = block;
                Ok(())
            }
            Operation::Free { slot } => match self.slots[slot as usize].take() {
                Some(block) => {
                    meter.freed(B::bytes(&block));
                    self.backend.free(block)
                }
                None => Ok(()),
            },
            Operation::RecordStream { slot, stream } => match &mut self.slots[slot as usize] {
                Some(block) => self.backend.record_stream(block, stream),
                None => Ok(()),
            },
            Operation::Wait { waiter, signaller } => self.backend.wait(waiter, signaller),
            Operation::Synchronize { stream } => self.backend.synchronize(stream),
            Operation::Trim => self.backend.trim(),
            Operation::Step => {
                meter.step();
                Ok(())
            }
            Operation::Turn { .. } => unreachable!("a turn ends here"),
            Operation::Send { slot } => {
                let block = self.slots[slot as usize].take();
                if let Handoff::To(partner) = &self.handoff {
                    // If the partner is gone, it has stopped with an error of its own, which is reported.
                    let _ = partner.send(block);
                }
                Ok(())
            }
            Operation::Receive { slot } => {
                if let Handoff::From(partner) = &self.handoff {
                    self.slots[slot as usize] = partner.recv().unwrap_or(None);
                }
                Ok(())
            }
        }
    }
}
