//! A trace as operations on slots, so that playing it looks nothing up.
//!
//! What makes streams or the host wait, kernels and trims are left out: nothing runs on the blocks, and what is
//! timed is the work of the allocator. Blocks that are live at the end are freed there.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use kitsune::telemetry::trace::{Event, TraceReader};
use kitsune::{Error, Result};

use crate::peers::Peer;

/// One thing to do. A slot holds a block while it is live.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Allocate {
        slot: usize,
        bytes: u64,
        stream: usize,
    },
    Free {
        slot: usize,
    },
    RecordStream {
        slot: usize,
        stream: usize,
    },
}

/// What one pass does.
#[derive(Debug, Default)]
pub(crate) struct Program {
    operations: Vec<Operation>,
    slots: usize,
    pub(crate) streams: usize,
    pub(crate) allocations: usize,
    /// The most bytes asked for that are live at once.
    pub(crate) peak_bytes: u64,
}

impl Program {
    /// Reads the trace at `path`, which is not compressed.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let refused = |reason: String| Error::InvalidArgument {
            op: "trace",
            reason: format!("{}: {reason}", path.display()),
        };
        let file = File::open(path).map_err(|error| refused(error.to_string()))?;
        let reader = TraceReader::new(BufReader::new(file));
        let reader = reader.map_err(|error| refused(error.to_string()))?;
        let mut builder = Builder::default();
        builder.program.streams = reader.header().streams as usize;
        for event in reader {
            builder.push(&event.map_err(|error| refused(error.to_string()))?);
        }
        Ok(builder.finish())
    }

    /// Plays all operations once. `live` is empty before and after; a failure frees what is in it.
    pub(crate) fn play<P: Peer>(&self, peer: &P, live: &mut Vec<Option<P::Block>>) -> Result<()> {
        live.resize_with(self.slots, || None);
        let mut operations = self.operations.iter();
        let outcome = operations.try_for_each(|operation| operation.play(peer, live));
        if outcome.is_err() {
            for block in live.iter_mut().filter_map(Option::take) {
                peer.free(block)?;
            }
        }
        outcome
    }
}

impl Operation {
    fn play<P: Peer>(self, peer: &P, live: &mut [Option<P::Block>]) -> Result<()> {
        match self {
            Self::Allocate {
                slot,
                bytes,
                stream,
            } => live[slot] = Some(peer.allocate(bytes, stream)?),
            Self::Free { slot } => {
                if let Some(block) = live[slot].take() {
                    peer.free(block)?;
                }
            }
            Self::RecordStream { slot, stream } => {
                if let Some(block) = &mut live[slot] {
                    peer.record_stream(block, stream)?;
                }
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Builder {
    program: Program,
    /// Live blocks by their ids: slot, stream and bytes.
    live: HashMap<u64, (usize, u32, u64)>,
    free_slots: Vec<usize>,
    live_bytes: u64,
}

impl Builder {
    fn push(&mut self, event: &Event) {
        match *event {
            Event::Allocate { id, bytes, stream } => {
                let slot = self.free_slots.pop().unwrap_or_else(|| {
                    self.program.slots += 1;
                    self.program.slots - 1
                });
                self.live.insert(id, (slot, stream, bytes));
                self.live_bytes += bytes;
                self.program.peak_bytes = self.program.peak_bytes.max(self.live_bytes);
                self.program.allocations += 1;
                let stream = stream as usize;
                self.program.operations.push(Operation::Allocate {
                    slot,
                    bytes,
                    stream,
                });
            }
            Event::Free { id, stream } => self.free(id, stream),
            Event::RecordStream { id, stream } => self.record(id, stream),
            _ => {}
        }
    }

    fn record(&mut self, id: u64, stream: u32) {
        if let Some((slot, _, _)) = self.live.get(&id) {
            let (slot, stream) = (*slot, stream as usize);
            self.program
                .operations
                .push(Operation::RecordStream { slot, stream });
        }
    }

    /// A free on another stream than the block's is a use there, then a free.
    fn free(&mut self, id: u64, on: Option<u32>) {
        let Some((slot, home, bytes)) = self.live.get(&id).copied() else {
            return;
        };
        if let Some(on) = on.filter(|on| *on != home) {
            self.record(id, on);
        }
        self.live.remove(&id);
        self.live_bytes -= bytes;
        self.free_slots.push(slot);
        self.program.operations.push(Operation::Free { slot });
    }

    fn finish(mut self) -> Program {
        let mut left: Vec<u64> = self.live.keys().copied().collect();
        left.sort_unstable();
        left.into_iter().for_each(|id| self.free(id, None));
        self.program
    }
}
