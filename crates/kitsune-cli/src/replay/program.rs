//! A trace as a list of operations that can be played with negligible overhead.
//!
//! Ids in a trace are arbitrary numbers. In a program, every live block has a *slot* instead. Slots are few and reused,
//! so that playing needs no lookups. Blocks still live at the end are freed there, so a program leaves nothing behind
//! and can be played again.

use std::collections::HashMap;

use kitsune::telemetry::trace::Event;

/// Index of the slot that holds a block while it is live.
pub(crate) type Slot = u32;
/// Number of a stream, from 0.
pub(crate) type StreamIndex = u16;
/// Number of a host thread of a program, from 0.
pub(crate) type HostThread = u16;

/// One operation. Sixteen bytes, so that a program stays small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Allocates into an empty slot.
    Allocate {
        slot: Slot,
        stream: StreamIndex,
        bytes: u64,
    },
    /// Frees the block in the slot, if its allocation succeeded.
    Free { slot: Slot },
    /// Records that a stream uses the block in the slot.
    RecordStream { slot: Slot, stream: StreamIndex },
    /// Makes a stream wait for another.
    Wait {
        waiter: StreamIndex,
        signaller: StreamIndex,
    },
    /// Makes the host wait for a stream, or for all streams.
    Synchronize { stream: Option<StreamIndex> },
    /// Returns cached memory to the driver.
    Trim,
    /// Hands the block in the slot over to the partner thread.
    Send { slot: Slot },
    /// Takes a block from the partner thread into an empty slot.
    Receive { slot: Slot },
    /// From here on, another host thread plays the program.
    Turn { thread: HostThread },
    /// A step of the training program begins.
    Step,
}

/// The operations of one pass, in order. Host thread 0 plays them until a [`Turn`](Operation::Turn) names another.
#[derive(Clone, Debug, Default)]
pub(crate) struct Program {
    pub(crate) operations: Vec<Operation>,
    /// The line of the trace for each operation; 0 if there is none.
    lines: Vec<u64>,
    /// The number of slots.
    pub(crate) slots: usize,
    /// One more than the highest stream number used.
    pub(crate) streams: u32,
    /// One less than the number of host threads.
    last_thread: HostThread,
    /// Allocations in one pass.
    pub(crate) allocations: u64,
    /// Steps in one pass.
    pub(crate) steps: u64,
}

impl Program {
    /// The number of host threads that play the program.
    pub(crate) fn threads(&self) -> usize {
        usize::from(self.last_thread) + 1
    }

    /// The line of the trace for an operation.
    pub(crate) fn line(&self, operation: usize) -> u64 {
        self.lines[operation]
    }

    /// How many stream synchronizations one pass requests, if there are `streams` streams.
    pub(crate) fn synchronizations(&self, streams: u64) -> u64 {
        let waits = self.operations.iter().map(|operation| match operation {
            Operation::Synchronize { stream: Some(_) } => 1,
            Operation::Synchronize { stream: None } => streams,
            _ => 0,
        });
        waits.sum()
    }

    /// How many uses of blocks on other streams one pass records.
    pub(crate) fn recorded_uses(&self) -> usize {
        let is_use = |operation: &&Operation| matches!(operation, Operation::RecordStream { .. });
        self.operations.iter().filter(is_use).count()
    }
}

/// Merges several programs into one, which host thread 0 plays, an operation of each in turn. No operation may hand a
/// block over. A program that is alone keeps its host threads: they take turns already.
pub(crate) fn in_turn(programs: &[Program]) -> Program {
    if let [alone] = programs {
        return alone.clone();
    }
    let mut all = Program::default();
    let first_slots: Vec<_> = programs
        .iter()
        .map(|program| {
            let first = Slot::try_from(all.slots).expect("fewer than 2^32 blocks fit in memory");
            all.slots += program.slots;
            all.streams = all.streams.max(program.streams);
            all.allocations += program.allocations;
            all.steps += program.steps;
            first
        })
        .collect();
    let longest = programs
        .iter()
        .map(|program| program.operations.len())
        .max();
    for at in 0..longest.unwrap_or(0) {
        for (program, first) in programs.iter().zip(&first_slots) {
            if let Some(operation) = program.operations.get(at) {
                if matches!(operation, Operation::Turn { .. }) {
                    continue;
                }
                all.operations.push(operation.shifted(*first));
                // With several files, a line number alone is ambiguous.
                all.lines.push(0);
            }
        }
    }
    all
}

impl Operation {
    /// The same operation with slots counted from `first`.
    fn shifted(mut self, first: Slot) -> Self {
        match &mut self {
            Self::Allocate { slot, .. }
            | Self::Free { slot }
            | Self::RecordStream { slot, .. }
            | Self::Send { slot }
            | Self::Receive { slot } => *slot += first,
            Self::Wait { .. }
            | Self::Synchronize { .. }
            | Self::Trim
            | Self::Turn { .. }
            | Self::Step => {}
        }
        self
    }
}

/// Builds a program from events. The caller must validate ids, as a trace reader does: using an id that is not live, or
/// allocating one that is, is a bug.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    program: Program,
    slots: HashMap<u64, Slot>,
    vacant: Vec<Slot>,
}

impl Builder {
    /// Appends the operations for `event`, which is on `line`. Kernels and marks other than those of steps have none.
    pub(crate) fn push(&mut self, event: &Event, line: u64) {
        match *event {
            Event::Allocate { id, bytes, stream } => {
                let (slot, stream) = (self.occupy(id), self.index(stream));
                self.append(
                    Operation::Allocate {
                        slot,
                        stream,
                        bytes,
                    },
                    line,
                );
                self.program.allocations += 1;
            }
            Event::Free { id, stream } => {
                let slot = self.vacate(id);
                // A free in another stream's order means that that stream used the block up to this point.
                if let Some(stream) = stream.map(|stream| self.index(stream)) {
                    self.append(Operation::RecordStream { slot, stream }, line);
                }
                self.append(Operation::Free { slot }, line);
            }
            Event::RecordStream { id, stream } => {
                let (slot, stream) = (self.slots[&id], self.index(stream));
                self.append(Operation::RecordStream { slot, stream }, line);
            }
            Event::Wait { waiter, signaller } => {
                let (waiter, signaller) = (self.index(waiter), self.index(signaller));
                self.append(Operation::Wait { waiter, signaller }, line);
            }
            Event::Synchronize { stream } => {
                let stream = stream.map(|stream| self.index(stream));
                self.append(Operation::Synchronize { stream }, line);
            }
            Event::Trim => self.append(Operation::Trim, line),
            Event::Thread { thread } => {
                let thread = HostThread::try_from(thread).expect("a header has at most 64");
                self.program.last_thread = self.program.last_thread.max(thread);
                self.append(Operation::Turn { thread }, line);
            }
            Event::Mark(ref text) if text.starts_with("step ") => {
                self.program.steps += 1;
                self.append(Operation::Step, line);
            }
            Event::Kernel { .. } | Event::Mark(_) => {}
        }
    }

    /// Hands block `id` over to the partner thread. It is no longer live here.
    pub(crate) fn send(&mut self, id: u64) {
        let slot = self.vacate(id);
        self.append(Operation::Send { slot }, 0);
    }

    /// Takes the partner's next block and calls it `id` here.
    pub(crate) fn receive(&mut self, id: u64) {
        let slot = self.occupy(id);
        self.append(Operation::Receive { slot }, 0);
    }

    /// Finishes the program. Blocks still live are freed at its end, in order of slots.
    pub(crate) fn finish(mut self) -> Program {
        let mut live: Vec<_> = self.slots.values().copied().collect();
        live.sort_unstable();
        for slot in live {
            self.append(Operation::Free { slot }, 0);
        }
        self.program
    }

    fn append(&mut self, operation: Operation, line: u64) {
        self.program.operations.push(operation);
        self.program.lines.push(line);
    }

    fn index(&mut self, stream: u32) -> StreamIndex {
        self.program.streams = self.program.streams.max(stream + 1);
        StreamIndex::try_from(stream).expect("the reader refuses more than 2^16 streams")
    }

    fn occupy(&mut self, id: u64) -> Slot {
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.program.slots += 1;
            Slot::try_from(self.program.slots - 1).expect("fewer than 2^32 blocks fit in memory")
        });
        assert!(
            self.slots.insert(id, slot).is_none(),
            "id {id} is live already"
        );
        slot
    }

    fn vacate(&mut self, id: u64) -> Slot {
        let slot = self.slots.remove(&id).expect("the id is live");
        self.vacant.push(slot);
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_take_turns_with_slots_of_their_own() {
        let program = |stream, blocks: u64| {
            let mut builder = Builder::default();
            for id in 0..blocks {
                let bytes = 8;
                builder.push(&Event::Allocate { id, bytes, stream }, id + 2);
            }
            builder.finish()
        };
        let all = in_turn(&[program(0, 1), program(2, 2)]);
        let allocate = |slot, stream| Operation::Allocate {
            slot,
            stream,
            bytes: 8,
        };
        let expected = [
            allocate(0, 0),
            allocate(1, 2),
            Operation::Free { slot: 0 },
            allocate(2, 2),
            Operation::Free { slot: 1 },
            Operation::Free { slot: 2 },
        ];
        assert_eq!(all.operations, expected);
        assert_eq!((all.slots, all.streams, all.allocations), (3, 3, 3));
        let alone = in_turn(&[program(0, 2)]);
        assert_eq!((alone.line(1), all.line(1)), (3, 0));
    }

    #[test]
    fn operations_are_small() {
        assert_eq!(size_of::<Operation>(), 16);
    }

    #[test]
    fn slots_are_used_again_and_nothing_stays_live() {
        let mut builder = Builder::default();
        let allocate = |id| Event::Allocate {
            id,
            bytes: 8,
            stream: 1,
        };
        builder.push(&allocate(1 << 40), 2);
        builder.push(
            &Event::Free {
                id: 1 << 40,
                stream: Some(0),
            },
            3,
        );
        builder.push(&Event::Mark("step 1".to_owned()), 4);
        builder.push(&Event::Mark("stepping aside".to_owned()), 4);
        builder.push(&Event::Thread { thread: 2 }, 5);
        builder.push(&allocate(7), 6);
        let program = builder.finish();
        let expected = [
            Operation::Allocate {
                slot: 0,
                stream: 1,
                bytes: 8,
            },
            Operation::RecordStream { slot: 0, stream: 0 },
            Operation::Free { slot: 0 },
            Operation::Step,
            Operation::Turn { thread: 2 },
            Operation::Allocate {
                slot: 0,
                stream: 1,
                bytes: 8,
            },
            Operation::Free { slot: 0 },
        ];
        assert_eq!(program.operations, expected);
        assert_eq!((program.steps, program.threads()), (1, 3));
        assert_eq!(
            (program.slots, program.allocations, program.line(2)),
            (1, 2, 3)
        );
        assert_eq!(program.streams, 2);
    }
}
