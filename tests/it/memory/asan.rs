//! In a build for AddressSanitizer (`.ci/run asan`) freed blocks of the host device are forbidden memory: what touches
//! one ends the process with a report, and what is right goes on. Each program runs in a process of its own.
#![cfg(asan)]
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the tests touch freed memory, and fail by panicking"
)]

use crate::support::driver::{Gate, act};
use crate::support::process;
use kitsune::driver::DevicePtr;
use kitsune::{Device, HostConfig, HostSchedule, Pool, PoolConfig, Stream};

/// Names the program that a child runs.
const PROGRAM: &str = "KITSUNE_ASAN_PROGRAM";
/// Stands for all sizes, one after the other.
const ALL: &str = "all";
const REPORT: &str = "AddressSanitizer: use-after-poison";
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Sizes that lanes keep, that the pool keeps, and that take pages of their own.
const SIZES: [u64; 5] = [4 * KIB, 3 * MIB, 1, 300 * KIB, 20 * MIB];

struct Bench {
    pool: Pool,
    stream: Stream,
    other: Stream,
}

impl Bench {
    fn new(schedule: HostSchedule, config: PoolConfig) -> Self {
        let device = Device::host(HostConfig {
            schedule,
            ..HostConfig::default()
        })
        .unwrap();
        let pool = Pool::new(&device, config).unwrap();
        let [stream, other] = [(); 2].map(|()| device.create_stream().unwrap());
        Self {
            pool,
            stream,
            other,
        }
    }

    /// The address of a block of `bytes` that was used and freed, and whose work has run.
    fn freed(&self, bytes: u64) -> DevicePtr {
        let block = self.pool.allocate(bytes, &self.stream).unwrap();
        let ptr = block.ptr();
        fill(&self.stream, ptr, bytes);
        drop(block);
        self.stream.synchronize().unwrap();
        ptr
    }
}

fn fill(stream: &Stream, ptr: DevicePtr, bytes: u64) {
    // SAFETY: the addresses stay mapped while the pool lives; the sanitizer stops what is wrong.
    unsafe { stream.driver().fill(ptr, 3, bytes, stream.raw()) }.unwrap();
}

/// Enqueues a kernel that reads the last of some bytes.
fn read(stream: &Stream, ptr: DevicePtr, bytes: u64) {
    let last = (ptr.0 + bytes - 1) as usize;
    act(stream, move || {
        // SAFETY: as in `fill`.
        let _ = unsafe { std::ptr::with_exposed_provenance::<u8>(last).read_volatile() };
    });
}

fn to_host(stream: &Stream, ptr: DevicePtr, bytes: u64) {
    let mut copy = vec![0; bytes as usize];
    // SAFETY: as in `fill`.
    unsafe { stream.driver().copy_to_host(&mut copy, ptr, stream.raw()) }.unwrap();
}

/// What is done with a freed block.
const WRONG: [(&str, fn(&Bench, u64)); 7] = [
    ("a kernel reads", |bench, bytes| {
        read(&bench.stream, bench.freed(bytes), bytes);
    }),
    ("the device copies", |bench, bytes| {
        let to = bench.pool.allocate(bytes, &bench.other).unwrap();
        let from = bench.freed(bytes);
        let driver = bench.stream.driver();
        // SAFETY: as in `fill`.
        unsafe { driver.copy(to.ptr(), from, bytes, bench.stream.raw()) }.unwrap();
        bench.stream.synchronize().unwrap();
    }),
    ("the host copies", |bench, bytes| {
        to_host(&bench.stream, bench.freed(bytes), bytes);
    }),
    ("the device writes", |bench, bytes| {
        fill(&bench.stream, bench.freed(bytes), bytes);
    }),
    ("a kernel of another stream reads", |bench, bytes| {
        let from = bench.freed(bytes);
        read(&bench.other, from, bytes);
        bench.other.synchronize().unwrap();
    }),
    ("a kernel reads what others used", |bench, bytes| {
        let mut block = bench.pool.allocate(bytes, &bench.stream).unwrap();
        bench.other.wait_for(&bench.stream).unwrap();
        read(&bench.other, block.ptr(), bytes);
        block.record_stream(&bench.other);
        let ptr = block.ptr();
        drop(block);
        bench.other.synchronize().unwrap();
        // The pool finds out when it looks.
        bench.pool.check_invariants();
        drop(bench.pool.allocate(30 * MIB, &bench.stream).unwrap());
        read(&bench.stream, ptr, bytes);
    }),
    ("a kernel is enqueued behind the free", |bench, bytes| {
        let block = bench.pool.allocate(bytes, &bench.stream).unwrap();
        let gate = (bytes > MIB).then(|| Gate::close(&bench.stream));
        read(&bench.stream, block.ptr(), bytes);
        let ptr = block.ptr();
        drop(block);
        read(&bench.stream, ptr, bytes);
        gate.map(Gate::open);
    }),
];

/// What a program may do.
const RIGHT: [(&str, fn(&Bench, u64)); 5] = [
    ("work before the free", |bench, bytes| {
        for _ in 0..3 {
            let gate = Gate::close(&bench.stream);
            let block = bench.pool.allocate(bytes, &bench.stream).unwrap();
            fill(&bench.stream, block.ptr(), bytes);
            read(&bench.stream, block.ptr(), bytes);
            drop(block);
            gate.open();
        }
    }),
    ("reuse", |bench, bytes| {
        for stream in [&bench.stream, &bench.other, &bench.stream] {
            let blocks: Vec<_> = (0..4)
                .map(|_| bench.pool.allocate(bytes, stream).unwrap())
                .collect();
            for block in &blocks {
                fill(stream, block.ptr(), bytes);
                to_host(stream, block.ptr(), bytes);
            }
        }
    }),
    ("reuse at other addresses", |bench, bytes| {
        for size in [bytes, 2 * bytes, 5 * bytes, bytes] {
            let blocks: Vec<_> = (0..3)
                .map(|_| bench.pool.allocate(size, &bench.stream).unwrap())
                .collect();
            for block in &blocks {
                fill(&bench.stream, block.ptr(), size);
            }
            // Every second one is freed first.
            drop(blocks.into_iter().step_by(2).collect::<Vec<_>>());
        }
        bench.pool.empty_cache().unwrap();
        let block = bench.pool.allocate(3 * bytes, &bench.other).unwrap();
        fill(&bench.other, block.ptr(), 3 * bytes);
    }),
    ("two streams", |bench, bytes| {
        for _ in 0..5 {
            let mut block = bench.pool.allocate(bytes, &bench.stream).unwrap();
            fill(&bench.stream, block.ptr(), bytes);
            bench.other.wait_for(&bench.stream).unwrap();
            read(&bench.other, block.ptr(), bytes);
            block.record_stream(&bench.other);
        }
    }),
    ("graphs", |bench, bytes| {
        let private = bench.pool.private().unwrap();
        let graph = private
            .capture(&bench.stream, || {
                let block = bench.pool.allocate(bytes, &bench.stream)?;
                fill(&bench.stream, block.ptr(), bytes);
                drop(block);
                let again = bench.pool.allocate(bytes, &bench.stream)?;
                read(&bench.stream, again.ptr(), bytes);
                Ok(())
            })
            .unwrap();
        for _ in 0..3 {
            // SAFETY: the graph touches memory of its private pool alone, and runs on one stream.
            unsafe { graph.launch(&bench.stream) }.unwrap();
        }
    }),
];

fn benches() -> impl Iterator<Item = (String, Bench)> {
    let schedules = [
        ("threads", HostSchedule::Threads),
        ("seeded", HostSchedule::Seeded(3)),
    ];
    schedules.into_iter().flat_map(|(name, schedule)| {
        [(false, false), (true, false), (false, true)].map(|(contiguous, poison)| {
            let config = PoolConfig {
                contiguous,
                poison,
                ..PoolConfig::default()
            };
            let name = format!("{name}, contiguous: {contiguous}, poison: {poison}");
            (name, Bench::new(schedule, config))
        })
    })
}

/// Runs the program that the parent names. By itself it is no test.
#[test]
fn child() {
    let Ok(program) = std::env::var(PROGRAM) else {
        return;
    };
    let (name, rest) = program.split_once('/').unwrap();
    let (bytes, bench) = rest.split_once('/').unwrap();
    let (_, bench) = benches().find(|(name, _)| name == bench).unwrap();
    let (_, run) = WRONG
        .iter()
        .chain(&RIGHT)
        .find(|(known, _)| *known == name)
        .unwrap();
    let sizes: Vec<u64> = match bytes {
        ALL => SIZES.to_vec(),
        bytes => vec![bytes.parse().unwrap()],
    };
    for bytes in sizes {
        run(&bench, bytes);
        for stream in [&bench.stream, &bench.other] {
            stream.synchronize().unwrap();
        }
    }
}

/// Whether the program ended with a report.
fn is_reported(name: &str, bytes: &str, bench: &str) -> bool {
    let program = format!("{name}/{bytes}/{bench}");
    let output = process::again(process::test_name!("child"), [(PROGRAM, program)]);
    let told = String::from_utf8_lossy(&output.stderr);
    let is_reported = told.contains(REPORT);
    // Nothing else goes wrong.
    assert_ne!(
        is_reported,
        output.status.success(),
        "{name}, {bytes} bytes, {bench}: {told}"
    );
    is_reported
}

#[test]
fn what_touches_a_freed_block_is_reported() {
    for (number, (bench, _)) in benches().enumerate() {
        // All sizes once; of the other benches what a lane keeps, and what the pool keeps.
        let sizes = if number == 0 { &SIZES[..] } else { &SIZES[..2] };
        for (name, _) in WRONG {
            if needs_threads(name) && bench.starts_with("seeded") {
                continue;
            }
            for bytes in sizes {
                let is_reported = is_reported(name, &bytes.to_string(), &bench);
                assert!(is_reported, "{name}, {bytes} bytes, {bench}");
            }
        }
    }
}

#[test]
fn what_is_right_is_not_reported() {
    for (bench, _) in benches() {
        for (name, _) in RIGHT {
            if needs_threads(name) && bench.starts_with("seeded") {
                continue;
            }
            assert!(!is_reported(name, ALL, &bench), "{name}, {bench}");
        }
    }
}

/// Whether a gate holds a stream in the program.
fn needs_threads(name: &str) -> bool {
    name.contains("behind") || name.contains("before")
}
