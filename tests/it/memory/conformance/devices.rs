//! Cases about what a pool asks of its driver, and when it lets go.

use std::sync::Arc;

use kitsune::driver::fault::FaultDriver;
use kitsune::{Device, Error, Pool, PoolConfig, Stream};

use crate::support::driver::{fill, read};
use crate::support::subject::{MIB, PAGE, Subject, limited, range, setup};

/// A pool whose driver counts calls.
fn counted<S: Subject>(capacity: u64) -> (Arc<FaultDriver>, Device, Pool, Stream) {
    let calls = Arc::new(FaultDriver::new(S::device(capacity).driver().clone()));
    let device = Device::from_driver(calls.clone());
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let stream = device.create_stream().unwrap();
    (calls, device, pool, stream)
}

/// Segments taken and given back, as the driver has seen it.
fn segments(calls: &FaultDriver) -> (u64, u64) {
    let sum = |names: [&'static str; 2]| names.map(|name| calls.calls(name)).iter().sum();
    (
        sum(["allocate", "create_page"]),
        sum(["free", "destroy_page"]),
    )
}

/// PyTorch plugs an allocator below a pool; here that is a driver.
pub(crate) fn case_28_a_pool_takes_all_its_memory_from_its_driver<S: Subject>() {
    let (calls, device, pool, stream) = counted::<S>(64 * MIB);
    let mut held = Vec::new();
    for expected in [1, 1, 2] {
        held.push(pool.allocate(MIB, &stream).unwrap());
        assert_eq!(segments(&calls), (expected, 0));
        assert_eq!(pool.stats().segment.current, expected);
    }
    drop(held);
    drop(pool);
    assert_eq!(segments(&calls), (2, 2));
    assert_eq!(device.memory_info().unwrap().free, 64 * MIB);
}

pub(crate) fn case_29_a_block_keeps_the_driver_after_its_pool<S: Subject>() {
    let (calls, device, pool, stream) = counted::<S>(64 * MIB);
    let block = pool.allocate(MIB, &stream).unwrap();
    let weak = Arc::downgrade(&calls);
    drop((pool, device));
    assert_eq!(segments(&calls), (1, 0));
    fill(&stream, block.ptr(), 5, MIB);
    assert_eq!(read(&stream, block.ptr(), 4), [5; 4]);
    drop(block);
    assert_eq!(segments(&calls), (1, 1));
    drop((calls, stream));
    assert!(weak.upgrade().is_none(), "the driver is closed");
}

pub(crate) fn case_38_a_destroyed_stream_leaves_its_memory_usable<S: Subject>() {
    let (device, pool, stream) = setup::<S>(64 * MIB);
    for bytes in [5000, 5 * MIB] {
        let other = device.create_stream().unwrap();
        let block = pool.allocate(bytes, &other).unwrap();
        fill(&other, block.ptr(), 1, bytes);
        drop(block);
        drop(other);
        let again = pool.allocate(bytes, &stream).unwrap();
        fill(&stream, again.ptr(), 2, bytes);
        let shown = read(&stream, again.ptr(), 4096);
        assert!(shown.iter().all(|byte| *byte == 2));
    }
    pool.check_invariants();
}

/// cubecl's pools are tried one after another by their owner; here the caller has two and does so.
pub(crate) fn case_62_a_full_pool_refuses_and_another_serves<S: Subject>() {
    let (device, pool, stream) = limited::<S>(64 * MIB, 2 * PAGE);
    let behind = Pool::new(&device, PoolConfig::default()).unwrap();
    let held = [(); 2].map(|()| pool.allocate(PAGE, &stream).unwrap());
    let refused = pool.allocate(PAGE, &stream);
    let Err(Error::OutOfMemory(report)) = refused else {
        panic!("the limit holds: {refused:?}");
    };
    assert_eq!((report.limited, report.limit), (true, Some(2 * PAGE)));
    let spilled = behind.allocate(PAGE, &stream).unwrap();
    assert_eq!(
        pool.stats().reserved_bytes.peak,
        2 * PAGE,
        "the cap is held"
    );
    let [first, _second] = held;
    let address = first.ptr();
    drop(first);
    assert_eq!(pool.allocate(PAGE, &stream).unwrap().ptr(), address);
    drop(spilled);
}

/// cubecl looks blocks up by numbers, which go stale. A block here is where it was, whatever goes around it.
pub(crate) fn case_63_a_live_block_is_unmoved_by_returning_others<S: Subject>() {
    let (_, pool, stream) = setup::<S>(256 * MIB);
    let mut held: Vec<_> = (0..20_u8)
        .map(|n| {
            let block = pool.allocate(3 * MIB, &stream).unwrap();
            fill(&stream, block.ptr(), n, 3 * MIB);
            (n, block)
        })
        .collect();
    let before: Vec<_> = held.iter().map(|(_, block)| range(block)).collect();
    held.retain(|(n, _)| n % 3 == 0);
    pool.empty_cache().unwrap();
    drop(pool.allocate(40 * MIB, &stream).unwrap());
    for (n, block) in &held {
        assert_eq!(range(block), before[usize::from(*n)]);
        let shown = read(&stream, block.ptr(), 3 << 20);
        assert!(shown.iter().all(|byte| byte == n), "block {n}");
    }
}

/// A first pass leaves all memory in the pool that the passes after it need.
pub(crate) fn case_65_a_warm_pool_asks_the_driver_for_nothing<S: Subject>() {
    let (calls, _, pool, stream) = counted::<S>(256 * MIB);
    let pass = || {
        let sizes = [3 * MIB, 700, 12 * MIB, 90_000, MIB];
        for pair in sizes.windows(2) {
            let both = [pair[0], pair[1]].map(|bytes| pool.allocate(bytes, &stream).unwrap());
            fill(&stream, both[0].ptr(), 1, pair[0]);
            drop(both);
        }
    };
    pass();
    let warm = segments(&calls);
    for _ in 0..5 {
        pass();
    }
    assert_eq!(segments(&calls), warm);
}
