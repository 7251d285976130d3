//! Streams that come and go: a pool lets go of them, and what they left serves others.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the tests enqueue work of their own, and fail by panicking"
)]

use std::sync::Arc;

use crate::support::driver::{Gate, fill};
use kitsune::driver::fault::FaultDriver;
use kitsune::{Device, HostConfig, Pool, PoolConfig, Stream};

const MIB: u64 = 1 << 20;

/// A device that counts the streams that its driver has, and a pool on it.
struct Setup {
    calls: Arc<FaultDriver>,
    device: Device,
    pool: Pool,
}

impl Setup {
    fn new(contiguous: bool, deterministic: bool) -> Self {
        let host = Device::host(HostConfig {
            capacity: 8 << 30,
            ..HostConfig::default()
        })
        .unwrap();
        let calls = Arc::new(FaultDriver::new(host.driver().clone()));
        let device = Device::from_driver(calls.clone());
        let config = PoolConfig {
            contiguous,
            deterministic,
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        Self {
            calls,
            device,
            pool,
        }
    }

    fn stream(&self) -> Stream {
        self.device.create_stream().unwrap()
    }

    /// Streams that the driver has.
    fn live(&self) -> u64 {
        self.calls.calls("create_stream") - self.calls.calls("destroy_stream")
    }

    fn held(&self) -> u64 {
        self.pool.stats().reserved_bytes.current
    }

    /// A small block, a large one and one to be used by `other`, with work on them.
    fn use_blocks(&self, stream: &Stream, other: &Stream) {
        for bytes in [4096, 10 * MIB, 5 * MIB] {
            let mut block = self.pool.allocate(bytes, stream).unwrap();
            fill(stream, block.ptr(), 1, 4096);
            if bytes == 5 * MIB {
                block.record_stream(other);
            }
        }
    }
}

#[test]
fn two_hundred_streams_one_after_the_other_hold_what_one_does() {
    for (contiguous, deterministic) in [(false, false), (true, false), (false, true), (true, true)]
    {
        let setup = Setup::new(contiguous, deterministic);
        let staying = setup.stream();
        let mut held = 0;
        for round in 0..200 {
            let stream = setup.stream();
            setup.use_blocks(&stream, &staying);
            stream.synchronize().unwrap();
            staying.synchronize().unwrap();
            if round == 0 {
                held = setup.held();
            }
            // The one that stays, this one, and one that was left just now.
            assert!(setup.live() <= 3, "{} live in round {round}", setup.live());
            assert_eq!(setup.held(), held, "round {round}, contiguous {contiguous}");
        }
        setup.pool.check_invariants();
        let retries = setup.pool.stats().num_alloc_retries;
        assert_eq!(retries, 0, "memory was never short");
    }
}

#[test]
fn streams_that_are_not_waited_for_are_let_go_of_once_they_have_run() {
    for contiguous in [false, true] {
        let setup = Setup::new(contiguous, false);
        for _ in 0..200 {
            let stream = setup.stream();
            drop(setup.pool.allocate(10 * MIB, &stream).unwrap());
        }
        let mut rounds = 0;
        while setup.live() > 0 {
            let stream = setup.stream();
            drop(setup.pool.allocate(4096, &stream).unwrap());
            drop(stream);
            // The lanes of this thread hold on to the newest.
            setup.pool.decay_now();
            rounds += 1;
            assert!(rounds < 10_000, "{} are live", setup.live());
            std::thread::yield_now();
        }
        setup.pool.check_invariants();
    }
}

#[test]
fn memory_of_a_stream_that_is_gone_but_busy_stays_its_own() {
    for contiguous in [false, true] {
        let setup = Setup::new(contiguous, false);
        let busy = setup.stream();
        let block = setup.pool.allocate(10 * MIB, &busy).unwrap();
        let address = block.ptr();
        let gate = Gate::close(&busy);
        drop(block);
        drop(busy);
        let next = setup.stream();
        let other = setup.pool.allocate(10 * MIB, &next).unwrap();
        assert_ne!(other.ptr(), address);
        assert_eq!(setup.live(), 2);
        gate.open();
        let held = setup.held();
        let mut rounds = 0;
        loop {
            // Each asks for what the first has left, which is there once that has run.
            let newest = setup.stream();
            let found = setup.pool.allocate(10 * MIB, &newest).unwrap();
            // It may have run just after the pool looked for streams to let go of: then the next one finds it gone.
            if setup.held() == held && setup.live() == 2 {
                break;
            }
            drop((found, newest));
            setup.pool.trim(held).unwrap();
            rounds += 1;
            assert!(rounds < 10_000, "{} are live", setup.live());
        }
        drop(other);
        setup.pool.check_invariants();
    }
}

#[test]
fn a_block_keeps_its_stream_and_a_lane_does_until_decay() {
    for contiguous in [false, true] {
        let setup = Setup::new(contiguous, false);
        let stream = setup.stream();
        let block = setup.pool.allocate(10 * MIB, &stream).unwrap();
        let small = setup.pool.allocate(4096, &stream).unwrap();
        stream.synchronize().unwrap();
        drop(stream);
        setup.pool.decay_now();
        assert_eq!(setup.live(), 1, "blocks are out");
        let pool = setup.pool.clone();
        // Another thread's lane has them, and the thread stays.
        let (kept, is_kept) = std::sync::mpsc::channel();
        let (leave, may_leave) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            drop((block, small));
            drop(pool);
            kept.send(()).unwrap();
            may_leave.recv().unwrap();
        });
        is_kept.recv().unwrap();
        assert_eq!(setup.live(), 1, "a lane has them");
        setup.pool.decay_now();
        assert_eq!(setup.live(), 0);
        setup.pool.decay_now();
        assert_eq!(setup.held(), 0);
        leave.send(()).unwrap();
        thread.join().unwrap();
        setup.pool.check_invariants();
    }
}

#[test]
fn a_block_that_comes_back_late_does_not_hide_a_later_free() {
    for contiguous in [false, true] {
        let setup = Setup::new(contiguous, false);
        let [home, other] = [(); 2].map(|()| setup.stream());
        // In one segment, where there are segments.
        let [mut late, early] = [(); 2].map(|()| setup.pool.allocate(6 * MIB, &home).unwrap());
        late.record_stream(&other);
        let of_other = Gate::close(&other);
        drop(late);
        // An event on the home stream: what is freed from now on is freed later than that block.
        let mut foreign = setup.pool.allocate(4096, &other).unwrap();
        foreign.record_use(&home);
        let of_home = Gate::close(&home);
        drop(early);
        of_other.open();
        other.synchronize().unwrap();
        drop(foreign);
        for _ in 0..5 {
            setup.pool.decay_now();
        }
        let least = if contiguous { 20 * MIB } else { 2 * MIB };
        assert!(setup.held() >= least, "{} are held", setup.held());
        of_home.open();
        setup.pool.empty_cache().unwrap();
        assert_eq!(setup.held(), 0);
        setup.pool.check_invariants();
    }
}
