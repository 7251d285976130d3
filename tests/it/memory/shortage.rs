//! What happens when memory is short: who is asked, who is waited for, what is told.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the tests enqueue work of their own, and fail by panicking"
)]

use crate::support;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::support::driver::Gate;
use kitsune::driver::fault::FaultDriver;
use kitsune::{
    Block, Device, Error, HostConfig, HostSchedule, OutOfMemory, Pool, PoolConfig, ReusePolicy,
    Stream,
};
use parking_lot::Mutex;

const MIB: u64 = 1 << 20;
const CAPACITY: u64 = 64 * MIB;

fn device() -> Device {
    Device::host(HostConfig {
        capacity: CAPACITY,
        ..HostConfig::default()
    })
    .unwrap()
}

fn pool(device: &Device) -> Pool {
    Pool::new(device, PoolConfig::default()).unwrap()
}

fn report(outcome: kitsune::Result<Block>) -> OutOfMemory {
    match outcome {
        Err(Error::OutOfMemory(report)) => *report,
        other => panic!("a shortage was expected, not {other:?}"),
    }
}

/// Blocks that a callback may give up.
type Spare = Arc<Mutex<Vec<Block>>>;

#[test]
fn callbacks_are_asked_in_order_until_enough_is_free() {
    let device = device();
    let pool = pool(&device);
    let stream = device.create_stream().unwrap();
    let log: Arc<Mutex<Vec<(usize, u64)>>> = Arc::default();
    let spares: [Spare; 3] = Default::default();
    let registrations: Vec<_> = spares
        .iter()
        .enumerate()
        .map(|(index, spare)| {
            spare.lock().push(pool.allocate(20 * MIB, &stream).unwrap());
            let (spare, log) = (Arc::clone(spare), Arc::clone(&log));
            pool.on_shortage(move |wanted| {
                log.lock().push((index, wanted));
                spare.lock().clear();
            })
        })
        .collect();
    let block = pool.allocate(30 * MIB + 1, &stream).unwrap();
    let wanted = 30 * MIB + 512;
    assert_eq!(*log.lock(), [(0, wanted), (1, wanted)]);
    assert_eq!(spares[2].lock().len(), 1, "the third was not needed");
    drop(block);
    // Those that are taken out are asked no more.
    drop(registrations);
    assert!(pool.allocate(50 * MIB, &stream).is_err());
    assert_eq!(log.lock().len(), 2);
    pool.check_invariants();
}

#[test]
fn a_shortage_inside_a_callback_asks_nobody() {
    let device = device();
    let pool = pool(&device);
    let stream = device.create_stream().unwrap();
    let _held = pool.allocate(40 * MIB, &stream).unwrap();
    let asked = Arc::new(AtomicU64::new(0));
    let told = Arc::new(AtomicU64::new(0));
    let (of_callback, of_stream, count) = (pool.clone(), stream.clone(), Arc::clone(&asked));
    let asking = pool.on_shortage(move |wanted| {
        count.fetch_add(1, Ordering::Relaxed);
        assert!(of_callback.allocate(wanted, &of_stream).is_err());
        drop(of_callback.allocate(4 * MIB, &of_stream).unwrap());
    });
    let count = Arc::clone(&told);
    let _telling = pool.on_out_of_memory(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    assert!(pool.allocate(40 * MIB, &stream).is_err());
    let counts = (asked.load(Ordering::Relaxed), told.load(Ordering::Relaxed));
    assert_eq!(counts, (1, 1));
    assert_eq!(pool.stats().num_ooms, 2);
    drop(asking);
    pool.check_invariants();
}

#[test]
fn a_callback_may_panic_or_drop_a_handle_and_the_pool_goes_on() {
    let device = device();
    let pool = pool(&device);
    let stream = device.create_stream().unwrap();
    let held = pool.allocate(40 * MIB, &stream).unwrap();
    let handle = Mutex::new(Some(pool.clone()));
    let dropping = pool.on_shortage(move |_| drop(handle.lock().take()));
    let panicking = pool.on_shortage(|_| panic!("a program's fault"));
    let outcome = catch_unwind(AssertUnwindSafe(|| pool.allocate(40 * MIB, &stream)));
    assert!(outcome.is_err(), "the panic is the caller's to see");
    pool.check_invariants();
    drop(panicking);
    // Callbacks are asked again after one panicked.
    let spare = Mutex::new(Some(held));
    let _giving = pool.on_shortage(move |_| drop(spare.lock().take()));
    assert!(pool.allocate(40 * MIB, &stream).is_ok());
    drop(dropping);
    pool.empty_cache().unwrap();
    pool.check_invariants();
    assert_eq!(pool.stats().reserved_bytes.current, 0);
}

#[test]
fn observers_get_the_report_before_the_error_is_returned() {
    let device = device();
    let pool = pool(&device);
    let stream = device.create_stream().unwrap();
    let reports: Arc<Mutex<Vec<OutOfMemory>>> = Arc::default();
    let (told, of_observer) = (Arc::clone(&reports), pool.clone());
    let registration = pool.on_out_of_memory(move |report| {
        // Without the pool's lock.
        assert_eq!(of_observer.stats().num_ooms, 1);
        told.lock().push(report.clone());
    });
    let returned = report(pool.allocate(1 << 40, &stream));
    assert_eq!(*reports.lock(), [returned]);
    drop(registration);
    assert!(pool.allocate(1 << 40, &stream).is_err());
    assert_eq!(reports.lock().len(), 1);
}

#[test]
fn sizes_beyond_the_device_are_refused_before_anyone_is_asked() {
    let device = device();
    let pool = pool(&device);
    let stream = device.create_stream().unwrap();
    let _asking = pool.on_shortage(|_| panic!("asked in vain"));
    drop(pool.allocate(8 * MIB, &stream).unwrap());
    let message = |bytes| report(pool.allocate(bytes, &stream)).to_string();
    assert_eq!(
        message(100 * MIB),
        "out of memory for 100.0 MiB: the device has 64.0 MiB in all"
    );
    assert_eq!(
        message((1 << 60) + 1),
        "out of memory: 1152921504606846977 bytes is more than 1 EiB; is the size right?"
    );
    assert!(message(1 << 60).ends_with("the device has 64.0 MiB in all"));
    let kept = pool.stats().reserved_bytes.current;
    assert!(kept >= 8 * MIB, "the cache was left alone");
    pool.set_limit(Some(16 * MIB)).unwrap();
    let refused = report(pool.allocate(17 * MIB, &stream));
    assert!(refused.limited && refused.tried.is_empty());
    assert_eq!(pool.stats().num_alloc_retries, 0);
}

#[test]
fn the_report_says_who_is_waited_for_and_what_others_hold() {
    let device = device();
    let config = PoolConfig {
        wait_deadline: Some(Duration::ZERO),
        ..PoolConfig::default()
    };
    let pool = Pool::new(&device, config).unwrap();
    let [home, slow] = [(); 2].map(|()| device.create_stream().unwrap());
    let mut block = pool.allocate(24 * MIB, &home).unwrap();
    let gate = Gate::close(&slow);
    block.record_stream(&slow);
    drop(block);
    let elsewhere = device.driver().allocate(6 * MIB).unwrap();
    let refused = report(pool.allocate(50 * MIB, &home));
    assert_eq!(refused.pending_by_stream, [(slow.id(), 24 * MIB)]);
    assert_eq!((refused.pending, refused.reserved), (24 * MIB, 24 * MIB));
    assert_eq!(refused.held_by_others, Some(6 * MIB));
    let message = refused.to_string();
    assert!(
        message.contains("waiting for streams 24.0 MiB")
            && message.contains("held by others 6.0 MiB"),
        "{message}"
    );
    assert!(!message.contains('\n'));
    gate.open();
    // SAFETY: nothing was enqueued on it.
    unsafe { device.driver().free(elsewhere) }.unwrap();
}

#[test]
fn no_more_streams_are_waited_for_than_it_takes() {
    for contiguous in [false, true] {
        let device = device();
        let config = PoolConfig {
            contiguous,
            reuse: ReusePolicy::OnlyComplete,
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        let streams = [(); 4].map(|()| device.create_stream().unwrap());
        // By stream: too little, enough, more than enough. The work of the first and the third never ends
        // until the gates are opened, which is after the allocation.
        let blocks = [12, 20, 24].map(|mib| mib * MIB);
        let held: Vec<_> = (0..3)
            .map(|index| pool.allocate(blocks[index], &streams[index]).unwrap())
            .collect();
        let gates = [Gate::close(&streams[0]), Gate::close(&streams[2])];
        let busy = support::driver::try_act(&streams[1], std::thread::yield_now);
        busy.unwrap();
        drop(held);
        let block = pool.allocate(18 * MIB, &streams[3]).unwrap();
        gates.into_iter().for_each(Gate::open);
        drop(block);
        pool.empty_cache().unwrap();
        pool.check_invariants();
    }
}

#[test]
fn the_host_waits_no_longer_than_its_deadline() {
    for patience in [0, 2] {
        let device = device();
        let config = PoolConfig {
            wait_deadline: Some(Duration::from_millis(patience)),
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        let [slow, other] = [(); 2].map(|()| device.create_stream().unwrap());
        let held = pool.allocate(40 * MIB, &slow).unwrap();
        let gate = Gate::close(&slow);
        drop(held);
        // With a wait that has no end this would hang.
        report(pool.allocate(40 * MIB, &other));
        gate.open();
        slow.synchronize().unwrap();
        assert!(pool.allocate(40 * MIB, &other).is_ok());
        pool.check_invariants();
    }
}

#[test]
fn another_threads_cache_is_found_before_anything_fails() {
    let device = device();
    let pool = pool(&device);
    let stream = device.create_stream().unwrap();
    let (kept, is_kept) = std::sync::mpsc::channel();
    let (leave, may_leave) = std::sync::mpsc::channel();
    let (of_thread, on) = (pool.clone(), stream.clone());
    let thread = std::thread::spawn(move || {
        drop(of_thread.allocate(60 * MIB, &on).unwrap());
        kept.send(()).unwrap();
        may_leave.recv().unwrap();
    });
    is_kept.recv().unwrap();
    assert!(pool.allocate(60 * MIB, &stream).is_ok());
    leave.send(()).unwrap();
    thread.join().unwrap();
}

/// All memory is in small blocks of one stream, most of them free; another stream is lent some.
#[test]
fn small_blocks_of_other_streams_are_lent_when_nothing_else_is_left() {
    for (contiguous, poison) in [(false, false), (false, true), (true, false), (true, true)] {
        let device = device();
        let config = PoolConfig {
            contiguous,
            poison,
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        let [lender, borrower] = [(); 2].map(|()| device.create_stream().unwrap());
        let (small, page) = (64 << 10, 2 * MIB);
        let mut blocks: Vec<_> = (0..CAPACITY / small)
            .map(|_| pool.allocate(small, &lender).unwrap())
            .collect();
        assert_eq!(pool.stats().reserved_bytes.current, CAPACITY);
        let pages = usize::try_from(page / small).unwrap();
        let mut index = 0;
        blocks.retain(|_| {
            index += 1;
            index % pages == 0
        });
        pool.check_invariants();
        pool.reset_peaks();
        let lent = pool.allocate(small, &borrower).unwrap();
        let gate = Gate::close(&borrower);
        let before = pool.stats();
        drop(lent);
        let after = pool.stats();
        let freed = before.allocated_bytes.current - after.allocated_bytes.current;
        assert_eq!(freed, small, "the caller has it no more");
        // The lender waits for the borrower: no lane keeps it, and nothing counts it twice.
        assert_eq!(after.active_bytes.current, before.active_bytes.current);
        assert_eq!(after.active_bytes.peak, before.active_bytes.peak);
        assert_eq!(after.active.peak, before.active.peak);
        pool.check_invariants();
        gate.open();
        borrower.synchronize().unwrap();
        drop(blocks);
        pool.empty_cache().unwrap();
        pool.check_invariants();
        let stats = pool.stats();
        assert_eq!(
            (stats.active_bytes.current, stats.reserved_bytes.current),
            (0, 0)
        );
    }
}

/// A device of a schedule of its own and a pool that looks before it waits.
fn counted(seed: u64, config: PoolConfig) -> (Arc<FaultDriver>, Pool, [Stream; 2]) {
    let host = HostConfig {
        capacity: CAPACITY,
        schedule: HostSchedule::Seeded(seed),
        ..HostConfig::default()
    };
    let calls = Arc::new(FaultDriver::new(
        Device::host(host).unwrap().driver().clone(),
    ));
    let device = Device::from_driver(calls.clone());
    let pool = Pool::new(&device, config).unwrap();
    let streams = [(); 2].map(|()| device.create_stream().unwrap());
    (calls, pool, streams)
}

#[test]
fn the_waits_of_a_deterministic_pool_are_counted_too() {
    for contiguous in [false, true] {
        let config = PoolConfig {
            contiguous,
            deterministic: true,
            ..PoolConfig::default()
        };
        let (calls, pool, [busy, other]) = counted(0, config);
        let halves = [(); 2].map(|()| pool.allocate(20 * MIB, &busy).unwrap());
        drop(halves);
        assert!(pool.allocate(40 * MIB, &other).is_ok());
        // Pages are waited for on the device. Plain allocations that do not fit go back to the driver, before which
        // the host waits.
        let waits = calls.calls("synchronize_event") + calls.calls("synchronize_stream");
        assert_eq!(waits > 0, contiguous);
        let stats = pool.stats();
        assert_eq!(stats.num_sync_all_streams, u64::from(contiguous));
        assert_eq!(stats.num_ooms, 0);
    }
}

#[test]
fn waits_are_counted_where_there_was_something_to_wait_for() {
    let config = |contiguous, wait_deadline| PoolConfig {
        contiguous,
        wait_deadline,
        ..PoolConfig::default()
    };
    for contiguous in [false, true] {
        let mut waits = 0;
        for seed in 0..20 {
            let (calls, pool, [busy, other]) = counted(seed, config(contiguous, None));
            let held = pool.allocate(40 * MIB, &busy).unwrap();
            report(pool.allocate(40 * MIB, &other));
            assert_eq!(calls.calls("synchronize_stream"), 0, "all is in use");
            support::driver::fill(&busy, held.ptr(), 1, 4096);
            drop(held);
            // The device may have passed the end of the stream by now, or it has to be waited for.
            assert!(pool.allocate(40 * MIB, &other).is_ok());
            let stats = pool.stats();
            let waited = calls.calls("synchronize_stream").min(1);
            assert_eq!(stats.num_sync_all_streams, waited, "seed {seed}");
            waits += waited;
        }
        assert!((1..20).contains(&waits), "{waits} of 20 waited");
        let (_, pool, [busy, other]) = counted(0, config(contiguous, Some(Duration::ZERO)));
        let held = pool.allocate(40 * MIB, &busy).unwrap();
        for _ in 0..100 {
            support::driver::fill(&busy, held.ptr(), 1, 4096);
        }
        drop(held);
        report(pool.allocate(40 * MIB, &other));
        assert_eq!(pool.stats().num_sync_all_streams, 0, "without patience");
    }
}

#[test]
fn the_own_stream_is_not_waited_for_where_another_suffices() {
    for contiguous in [false, true] {
        let device = device();
        let config = PoolConfig {
            contiguous,
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        let [own, other] = [(); 2].map(|()| device.create_stream().unwrap());
        let held = [
            pool.allocate(21 * MIB, &own).unwrap(),
            pool.allocate(40 * MIB, &other).unwrap(),
        ];
        // Waiting for the own stream would hang.
        let gate = Gate::close(&own);
        drop(held);
        let block = pool.allocate(36 * MIB, &own).unwrap();
        gate.open();
        drop(block);
        pool.empty_cache().unwrap();
        pool.check_invariants();
    }
}

#[test]
fn in_a_capture_nobody_is_asked_or_told_and_in_a_pass_they_are() {
    for contiguous in [false, true] {
        let device = device();
        let config = PoolConfig {
            contiguous,
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        let stream = device.create_stream().unwrap();
        let private = pool.private().unwrap();
        let spare = Mutex::new(Some(pool.allocate(40 * MIB, &stream).unwrap()));
        let calls = Arc::new(AtomicU64::new(0));
        let (asked, told) = (Arc::clone(&calls), Arc::clone(&calls));
        let _asking = pool.on_shortage(move |_| {
            asked.fetch_add(1, Ordering::Relaxed);
            drop(spare.lock().take());
        });
        let _telling = pool.on_out_of_memory(move |_| {
            told.fetch_add(100, Ordering::Relaxed);
        });
        let work = || pool.allocate(40 * MIB, &stream).map(drop);
        let captured = private.capture(&stream, work);
        assert!(matches!(captured, Err(Error::OutOfMemory(_))));
        assert_eq!(calls.load(Ordering::Relaxed), 0);
        private.prime(work).unwrap();
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        assert!(private.capture(&stream, work).is_ok());
        let _held = pool.allocate(4 * MIB, &stream).unwrap();
        let more = || pool.allocate(63 * MIB, &stream).map(drop);
        assert!(private.prime(more).is_err());
        assert_eq!(calls.load(Ordering::Relaxed), 102, "once more, and told");
        pool.check_invariants();
    }
}

/// A program at the brink, with a second thread whose lanes keep blocks. Whatever fails would fail as well
/// after everything idle went back to the driver.
fn nothing_fails_beside_room(seed: u64, reuse: ReusePolicy, contiguous: bool, lends: bool) {
    let device = Device::host(HostConfig {
        capacity: CAPACITY,
        schedule: HostSchedule::Seeded(seed),
        ..HostConfig::default()
    })
    .unwrap();
    let config = PoolConfig {
        reuse,
        contiguous,
        ..PoolConfig::default()
    };
    let pool = Pool::new(&device, config).unwrap();
    let streams = [(); 3].map(|()| device.create_stream().unwrap());
    let (order, orders) = std::sync::mpsc::channel::<(u64, Stream)>();
    let (done, is_done) = std::sync::mpsc::channel();
    let of_thread = pool.clone();
    let thread = std::thread::spawn(move || {
        for (bytes, stream) in orders {
            // Into the lane of this thread, if there is room at all.
            drop(of_thread.allocate(bytes, &stream));
            done.send(()).unwrap();
        }
    });
    let mut random = fastrand::Rng::with_seed(seed);
    let mut blocks = Vec::new();
    let mut failures = 0;
    for _ in 0..250 {
        let bytes = match random.u32(0..10) {
            0..5 if lends => random.u64(1..600 << 10),
            0..5 => random.u64(1..3 * MIB),
            5..8 => random.u64(1..6 * MIB),
            _ => random.u64(1..24 * MIB),
        };
        let stream = random.choice(&streams).unwrap().clone();
        match random.u32(0..10) {
            0..2 => {
                order.send((bytes, stream)).unwrap();
                is_done.recv().unwrap();
            }
            2..7 => match pool.allocate(bytes, &stream) {
                Ok(block) => blocks.push(block),
                Err(Error::OutOfMemory(report)) => {
                    failures += 1;
                    assert!(report.largest_free < bytes, "{report}");
                    assert_eq!(report.pending, 0, "{report}");
                    pool.empty_cache().unwrap();
                    assert!(pool.allocate(bytes, &stream).is_err(), "{report}");
                }
                Err(error) => panic!("{error}"),
            },
            7 => {
                if let Some(block) = random.choice(blocks.iter_mut()) {
                    block.record_stream(&stream);
                }
            }
            _ if !blocks.is_empty() => drop(blocks.swap_remove(random.usize(0..blocks.len()))),
            _ => {}
        }
    }
    assert!(failures > 0, "memory was never short");
    drop(order);
    thread.join().unwrap();
    pool.check_invariants();
}

#[test]
fn nothing_fails_beside_a_free_block_that_fits() {
    for seed in support::seeds::seeds(30) {
        support::seeds::with_seed(seed, |seed| {
            for reuse in [
                ReusePolicy::Never,
                ReusePolicy::OnlyComplete,
                ReusePolicy::Wait,
            ] {
                for contiguous in [false, true] {
                    nothing_fails_beside_room(seed, reuse, contiguous, seed % 2 == 0);
                }
            }
        });
    }
}
