//! The workloads as programs, one per host thread.

use std::collections::VecDeque;

use clap::ValueEnum;
use kitsune::telemetry::trace::Event;
use kitsune::units::MIB;

use super::cases;
use super::minstd::MinStd;
use super::training::Training;
use crate::replay::program::{Builder, Program};

/// The most bytes live in the random workload, over all threads, as in RMM.
const RANDOM_LIVE_MAX: u64 = 16_000 * MIB;
/// The percentage of draws in which the random workload allocates, unless a limit is reached.
const RANDOM_ALLOCATION_PERCENT: u64 = 73;
/// Kernels between two waits of the host in the multi-stream workload, as in RMM.
const KERNELS_PER_SYNCHRONIZE: u64 = 4;
/// Blocks that a consumer keeps before it frees the oldest.
const CONSUMER_KEEPS: usize = 64;

/// The workloads of `kitsune churn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// Allocations of random sizes, freed in random order (RMM's `random_allocations`).
    Random,
    /// A small block for each kernel, on several streams in turn (RMM's `multi_stream_allocations`).
    MultiStream,
    /// Training steps: activations are kept in the forward pass and freed in reverse order in the backward pass.
    Lifo,
    /// One thread allocates blocks; another uses and frees them on its own stream.
    ProducerConsumer,
    /// Blocks of one size, freed at once.
    Hot,
    /// Training steps with a different sequence length each time.
    VaryingLength,
    /// A hundred blocks that together take nine tenths of the device, then their frees (RMM's `async_priming`).
    Priming,
    /// Vectors of 40 kB to 4 GB, each freed before a wait for the device (RMM's `device_uvector`).
    Vectors,
    /// Random blocks of 2 to 20 MiB, random frees, and occasional trims (PyTorch's allocator fuzz test).
    Fuzz,
}

/// A workload with its parameters.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) workload: Workload,
    /// Size of a block, if all have the same size.
    pub(crate) bytes: u64,
    /// Allocations of each thread that allocates; training workloads complete the last step.
    pub(crate) allocations: u64,
    /// Largest random size.
    pub(crate) max_bytes: u64,
    /// Even for producers and consumers.
    pub(crate) threads: u32,
    pub(crate) streams: u32,
    pub(crate) seed: u64,
}

impl Shape {
    /// The program of each thread.
    pub(crate) fn programs(&self) -> Vec<Program> {
        (0..self.threads)
            .map(|thread| self.program(thread))
            .collect()
    }

    fn program(&self, thread: u32) -> Program {
        let stream = thread % self.streams;
        let seed = self.seed.wrapping_add(u64::from(thread));
        match self.workload {
            Workload::Random => self.random(seed, stream),
            Workload::MultiStream => self.multi_stream(stream),
            Workload::Hot => self.hot(stream),
            Workload::ProducerConsumer if thread.is_multiple_of(2) => self.producer(stream),
            Workload::ProducerConsumer => self.consumer(stream),
            Workload::Lifo => Training::new(stream).steps(self.allocations, || 512),
            Workload::VaryingLength => {
                let mut random = MinStd::new(seed);
                Training::new(stream).steps(self.allocations, || random.uniform(128, 1024))
            }
            Workload::Priming => cases::primed(self.allocations, self.bytes, stream),
            Workload::Vectors => cases::vectors(self.allocations, stream),
            Workload::Fuzz => cases::fuzz(self.allocations, seed, stream),
        }
    }

    /// Makes twice as many steps as allocations. Each step draws a size, even if it does not use it. It frees a random
    /// block if the draw says so, if all allocations were made, or if too much would be live.
    fn random(&self, seed: u64, stream: u32) -> Program {
        let mut random = MinStd::new(seed);
        let mut builder = Builder::default();
        let live_bytes_max = RANDOM_LIVE_MAX / u64::from(self.threads);
        let (mut live, mut live_bytes, mut next) = (Vec::new(), 0, 0);
        for _ in 0..2 * self.allocations {
            let bytes = random.uniform(1, self.max_bytes);
            let allocates = live.is_empty()
                || random.uniform(0, 99) < RANDOM_ALLOCATION_PERCENT
                    && next < self.allocations
                    && live_bytes + bytes < live_bytes_max;
            if allocates {
                builder.push(
                    &Event::Allocate {
                        id: next,
                        bytes,
                        stream,
                    },
                    0,
                );
                live.push((next, bytes));
                live_bytes += bytes;
                next += 1;
            } else {
                let drawn = random.uniform(0, self.allocations - 1);
                let index = kitsune::units::to_usize(drawn) % live.len();
                let (id, bytes) = live.swap_remove(index);
                builder.push(&Event::Free { id, stream: None }, 0);
                live_bytes -= bytes;
            }
        }
        builder.finish()
    }

    fn multi_stream(&self, first: u32) -> Program {
        let mut builder = Builder::default();
        for kernel in 0..self.allocations {
            let turn = u32::try_from(kernel % u64::from(self.streams)).unwrap_or(0);
            self.pair(&mut builder, kernel, (first + turn) % self.streams);
            if (kernel + 1).is_multiple_of(KERNELS_PER_SYNCHRONIZE) {
                builder.push(&Event::Synchronize { stream: None }, 0);
            }
        }
        builder.finish()
    }

    fn hot(&self, stream: u32) -> Program {
        let mut builder = Builder::default();
        (0..self.allocations).for_each(|id| self.pair(&mut builder, id, stream));
        builder.finish()
    }

    fn pair(&self, builder: &mut Builder, id: u64, stream: u32) {
        builder.push(
            &Event::Allocate {
                id,
                bytes: self.bytes,
                stream,
            },
            0,
        );
        builder.push(&Event::Free { id, stream: None }, 0);
    }

    fn producer(&self, stream: u32) -> Program {
        let mut builder = Builder::default();
        for id in 0..self.allocations {
            builder.push(
                &Event::Allocate {
                    id,
                    bytes: self.bytes,
                    stream,
                },
                0,
            );
            builder.send(id);
        }
        builder.finish()
    }

    /// Keeps a few blocks, like a consumer that works ahead of its stream.
    fn consumer(&self, stream: u32) -> Program {
        let mut builder = Builder::default();
        let mut kept = VecDeque::new();
        for id in 0..self.allocations {
            builder.receive(id);
            builder.push(&Event::RecordStream { id, stream }, 0);
            kept.push_back(id);
            if kept.len() > CONSUMER_KEEPS {
                let id = kept.pop_front().expect("more than a few are kept");
                builder.push(&Event::Free { id, stream: None }, 0);
            }
        }
        builder.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::program::Operation;

    fn shape(workload: Workload) -> Shape {
        Shape {
            workload,
            bytes: 512,
            allocations: 1000,
            max_bytes: 64 * MIB,
            threads: 1,
            streams: 1,
            seed: 0,
        }
    }

    /// A number that depends on every operation and their order.
    fn digest(program: &Program) -> (usize, u64) {
        let fold = |digest: u64, number: u64| (digest ^ number).wrapping_mul(0x0100_0000_01b3);
        let digest = program
            .operations
            .iter()
            .fold(
                0xcbf2_9ce4_8422_2325,
                |digest, operation| match *operation {
                    Operation::Allocate { slot, bytes, .. } => {
                        fold(fold(digest, u64::from(slot)), bytes)
                    }
                    Operation::Free { slot } => fold(fold(digest, u64::from(slot)), 0),
                    _ => panic!("the workload allocates and frees"),
                },
            );
        (program.operations.len(), digest)
    }

    #[test]
    fn the_random_workload_is_that_of_rmm() {
        // Recorded from a C++ program with RMM's loop and libstdc++'s random numbers.
        let digests = [(64, 0), (4096, 0), (64, 7)].map(|(max_mib, seed)| {
            let max_bytes = max_mib * MIB;
            digest(
                &Shape {
                    max_bytes,
                    seed,
                    ..shape(Workload::Random)
                }
                .programs()[0],
            )
        });
        let expected = [
            0x2ab1_fc36_a842_c7b6,
            0xdc0e_cfd7_0686_8730,
            0x8507_6eb0_d3d7_5ad8,
        ];
        assert_eq!(digests, expected.map(|digest| (2000, digest)));
    }

    #[test]
    fn streams_and_waits_of_the_multi_stream_workload_alternate() {
        let shape = Shape {
            streams: 3,
            allocations: 5,
            ..shape(Workload::MultiStream)
        };
        let program = &shape.programs()[0];
        let streams = program
            .operations
            .iter()
            .filter_map(|operation| match operation {
                Operation::Allocate { stream, .. } => Some(*stream),
                Operation::Synchronize { stream: None } => Some(99),
                _ => None,
            });
        assert_eq!(streams.collect::<Vec<_>>(), [0, 1, 2, 0, 99, 1]);
    }

    #[test]
    fn a_producer_sends_what_its_consumer_receives() {
        let shape = Shape {
            threads: 2,
            streams: 2,
            ..shape(Workload::ProducerConsumer)
        };
        let [producer, consumer] = shape.programs().try_into().unwrap();
        let count = |program: &Program, wanted: fn(&Operation) -> bool| {
            program
                .operations
                .iter()
                .filter(|operation| wanted(operation))
                .count()
        };
        let sent = count(&producer, |operation| {
            matches!(operation, Operation::Send { .. })
        });
        let freed = count(&consumer, |operation| {
            matches!(operation, Operation::Free { .. })
        });
        assert_eq!((sent, freed, consumer.recorded_uses()), (1000, 1000, 1000));
        assert_eq!((producer.slots, consumer.slots), (1, CONSUMER_KEEPS + 1));
    }

    #[test]
    fn training_steps_vary_only_where_they_should() {
        let sizes = |workload| {
            let shape = Shape {
                allocations: 3000,
                ..shape(workload)
            };
            let programs = shape.programs();
            let sizes = programs[0].operations.iter().filter_map(|operation| {
                let Operation::Allocate { bytes, .. } = operation else {
                    return None;
                };
                Some(*bytes)
            });
            sizes.collect::<std::collections::BTreeSet<_>>().len()
        };
        let (fixed, varying) = (sizes(Workload::Lifo), sizes(Workload::VaryingLength));
        assert!(
            fixed < 30 && varying > 2 * fixed,
            "{fixed} and {varying} sizes"
        );
    }
}
