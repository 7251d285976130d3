//! Plays the program of one host thread, pass after pass.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use super::backend::{Backend, Trouble};
use super::meter::{Meter, Metering};
use super::probe::AllocationClock;
use super::program::{Operation, Program};

/// Blocks that may be on their way from one thread to its partner.
pub(crate) const HANDOFF_CAPACITY: usize = 256;

/// One thread's program with its blocks.
pub(crate) struct Player<'a, B: Backend> {
    program: &'a Program,
    backend: B,
    slots: Vec<Option<B::Block>>,
    handoff: Handoff<B::Block>,
    tools: Tools,
    /// Allocations that found no room since this was last asked for.
    ooms: u64,
}

/// What the players of a crew share.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tools {
    /// Ticks with every allocation, where a lag is counted in them.
    pub(crate) clock: Option<Arc<AllocationClock>>,
    /// Follows the live bytes through the first pass; later ones may be timed.
    pub(crate) meter: Option<Arc<Meter>>,
}

/// How a thread meets its partner. A block that could not be allocated is handed on as `None`.
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
            ooms: 0,
        }
    }

    /// Plays the program once. After an error the player is of no more use.
    pub(super) fn pass(&mut self) -> Result<(), (u64, Trouble)> {
        match self.tools.meter.take() {
            None => self.pass_with(()),
            Some(meter) => self.pass_with(&*meter),
        }
    }

    /// Allocations that found no room since this was last asked for.
    pub(super) fn take_ooms(&mut self) -> u64 {
        std::mem::take(&mut self.ooms)
    }

    fn pass_with(&mut self, meter: impl Metering) -> Result<(), (u64, Trouble)> {
        for (at, operation) in self.program.operations.iter().enumerate() {
            let outcome = self.play(*operation, meter);
            outcome.map_err(|trouble| (self.program.line(at), trouble))?;
        }
        self.backend.finish().map_err(|trouble| (0, trouble))
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
            Operation::Send { slot } => {
                let block = self.slots[slot as usize].take();
                if let Handoff::To(partner) = &self.handoff {
                    // A partner that is gone has stopped for a reason of its own, which is told.
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
