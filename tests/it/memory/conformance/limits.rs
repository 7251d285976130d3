//! Cases about running out: of the device, of the pool's limit.

use std::sync::mpsc::channel;

use kitsune::{Error, Pool, PoolConfig, Result, ReusePolicy};

use crate::support::driver::{fill, read};
use crate::support::subject::{
    GIB, KIB, MIB, OWN, PAGE, Subject, allocated, limited, report, reserved, setup,
};

pub(crate) fn case_03_a_request_beyond_any_device_fails_alone<S: Subject>() {
    let (_, pool, stream) = setup::<S>(64 * MIB);
    let block = pool.allocate(4096, &stream).unwrap();
    fill(&stream, block.ptr(), 7, 4096);
    for bytes in [800_000_000 * GIB, (1 << 60) + (1 << 59), u64::MAX] {
        let report = report(pool.allocate(bytes, &stream));
        assert_eq!(report.requested, bytes);
        let text = report.to_string();
        assert!(text.starts_with("out of memory"), "{text}");
        assert_eq!(text.contains("more than 1 EiB"), bytes > 1 << 60, "{text}");
    }
    fill(&stream, block.ptr(), 8, 2048);
    let bytes = read(&stream, block.ptr(), 4096);
    assert!(bytes[..2048].iter().all(|byte| *byte == 8));
    assert!(bytes[2048..].iter().all(|byte| *byte == 7));
}

pub(crate) fn case_04_what_failed_succeeds_after_a_free<S: Subject>() {
    let (_, pool, stream) = setup::<S>(64 * MIB);
    let half = pool.allocate(33 * MIB, &stream).unwrap();
    report(pool.allocate(33 * MIB, &stream));
    drop(half);
    let half = pool.allocate(33 * MIB, &stream).unwrap();
    assert_eq!(allocated(&pool), half.allocated());
}

pub(crate) fn case_08_bad_settings_are_refused<S: Subject>() {
    let device = S::device(64 * MIB);
    for limit in [0, 1, PAGE - 1, 64 * MIB + 1, u64::MAX] {
        let config = PoolConfig {
            limit: Some(limit),
            ..PoolConfig::default()
        };
        let refused = Pool::new(&device, config);
        let is_named = matches!(&refused, Err(Error::InvalidConfig { key: "limit", .. }));
        assert!(is_named, "{limit}: {refused:?}");
    }
    for name in ["", "none", "Wait", "sometimes"] {
        let refused = name.parse::<ReusePolicy>();
        assert!(
            matches!(refused, Err(Error::InvalidConfig { .. })),
            "{name}"
        );
    }
    assert_eq!(device.memory_info().unwrap().free, 64 * MIB);
}

pub(crate) fn case_09_a_full_limit_refuses_and_recovers<S: Subject>() {
    let (_, pool, stream) = limited::<S>(GIB, 120 * MIB);
    let held = [(); 3].map(|()| pool.allocate(40 * MIB, &stream).unwrap());
    let report = report(pool.allocate(40 * MIB, &stream));
    assert!(report.limited);
    drop(held);
    let whole = pool.allocate(120 * MIB, &stream).unwrap();
    assert_eq!(reserved(&pool), whole.allocated());
}

pub(crate) fn case_10_idle_memory_makes_room_below_a_limit<S: Subject>() {
    let (_, pool, stream) = limited::<S>(GIB, 120 * MIB);
    let [first, second, third] = [(); 3].map(|()| pool.allocate(40 * MIB, &stream).unwrap());
    drop((first, second));
    let larger = pool.allocate(80 * MIB, &stream).unwrap();
    assert_eq!(allocated(&pool), 120 * MIB);
    drop((third, larger));
    pool.check_invariants();
}

pub(crate) fn case_13_running_out_is_the_same_error_on_every_path<S: Subject>() {
    for contiguous in [false, true] {
        let device = S::device(64 * MIB);
        let config = PoolConfig {
            contiguous,
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        let stream = device.create_stream().unwrap();
        report(pool.allocate(1 << 40, &stream));
        // The device, and not a size, is what is too small.
        report(pool.allocate(65 * MIB, &stream));
        drop(pool.allocate(60 * MIB, &stream).unwrap());
    }
}

/// A limit need not be a multiple of anything: what does not fit it is not taken.
pub(crate) fn case_36_limits_below_a_page_and_off_its_multiples<S: Subject>() {
    let device = S::device(64 * MIB);
    let config = |limit| PoolConfig {
        limit: Some(limit),
        ..PoolConfig::default()
    };
    assert!(Pool::new(&device, config(1024)).is_err());
    let pool = Pool::new(&device, config(5 * MIB + 77)).unwrap();
    let stream = device.create_stream().unwrap();
    let _held = pool.allocate(4 * MIB, &stream).unwrap();
    report(pool.allocate(2 * MIB, &stream));
    assert!(reserved(&pool) <= 5 * MIB + 77);
}

/// RMM's pool doubles, so that a request can fail that would fit; growth here is by what is missing.
pub(crate) fn case_37_growth_is_by_what_is_asked_for<S: Subject>() {
    let unit = OWN;
    let sizes = [2 * unit, 8 * unit, unit, 4 * unit];
    let (_, pool, stream) = limited::<S>(64 * unit, 12 * unit);
    let held = sizes[..3]
        .iter()
        .map(|bytes| pool.allocate(*bytes, &stream));
    let held: Vec<_> = held.map(Result::unwrap).collect();
    report(pool.allocate(sizes[3], &stream));
    drop(held);
    let (_, pool, stream) = limited::<S>(64 * unit, 16 * unit);
    let held = sizes.iter().map(|bytes| pool.allocate(*bytes, &stream));
    let held: Vec<_> = held.map(Result::unwrap).collect();
    assert_eq!(held.len(), 4);
    assert!(reserved(&pool) <= 16 * unit);
}

pub(crate) fn case_39_the_whole_device_can_be_used<S: Subject>() {
    let (_, pool, stream) = limited::<S>(256 * MIB, 256 * MIB);
    drop(pool.allocate(256 * MIB, &stream).unwrap());
    let two = [(); 2].map(|()| pool.allocate(128 * MIB, &stream).unwrap());
    drop(two);
    drop(pool.allocate(256 * MIB / 10 * 9, &stream).unwrap());
    pool.check_invariants();
}

/// RMM needs a defragmentation to be called first; here running short is enough.
pub(crate) fn case_43_what_threads_keep_is_found_when_memory_is_short<S: Subject>() {
    let (_, pool, stream) = setup::<S>(2 * PAGE);
    let (kept, is_kept) = channel();
    let (leave, may_leave) = channel::<()>();
    std::thread::scope(|scope| {
        let (thread_pool, thread_stream) = (pool.clone(), stream.clone());
        scope.spawn(move || {
            // Blocks of 256 KiB in both pages, of which the thread keeps some when it has freed all.
            let blocks: Vec<_> = (0..16)
                .map(|_| thread_pool.allocate(256 * KIB, &thread_stream).unwrap())
                .collect();
            drop(blocks);
            kept.send(()).unwrap();
            // An error means that the other side has failed.
            let _ = may_leave.recv();
        });
        is_kept.recv().unwrap();
        let whole = pool.allocate(2 * PAGE, &stream);
        leave.send(()).unwrap();
        assert_eq!(whole.unwrap().allocated(), 2 * PAGE);
    });
}

pub(crate) fn case_52_a_limit_counts_exactly<S: Subject>() {
    let (_, pool, stream) = limited::<S>(GIB, 10 * MIB);
    let first = pool.allocate(4 * MIB, &stream).unwrap();
    let second = pool.allocate(4 * MIB, &stream).unwrap();
    let before = allocated(&pool);
    assert!(report(pool.allocate(3 * MIB, &stream)).limited);
    assert_eq!(allocated(&pool), before, "a refusal counts nothing");
    drop(first);
    let third = pool.allocate(6 * MIB, &stream).unwrap();
    assert_eq!(reserved(&pool), 10 * MIB);
    drop((second, third));
}

pub(crate) fn case_57_a_fragmented_limit_is_made_whole<S: Subject>() {
    let unit = PAGE;
    let (_, pool, stream) = limited::<S>(GIB, 6 * unit);
    drop(pool.allocate(5 * unit, &stream).unwrap());
    let whole = pool.allocate(6 * unit, &stream).unwrap();
    assert_eq!(whole.allocated(), 6 * unit);
}
