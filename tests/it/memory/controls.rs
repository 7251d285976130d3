//! What bounds and shrinks a pool from outside: limits, trimming, decay.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use kitsune::{Device, Error, HostConfig, HostSchedule, Pool, PoolConfig, ReusePolicy};

const MIB: u64 = 1 << 20;
const CAPACITY: u64 = 64 * MIB;

fn device(schedule: HostSchedule) -> Device {
    Device::host(HostConfig {
        capacity: CAPACITY,
        schedule,
        ..HostConfig::default()
    })
    .unwrap()
}

fn held(pool: &Pool) -> u64 {
    pool.stats().reserved_bytes.current
}

#[test]
fn trimming_returns_what_is_idle_down_to_its_target() {
    for contiguous in [false, true] {
        let device = device(HostSchedule::Threads);
        let config = PoolConfig {
            contiguous,
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        let stream = device.create_stream().unwrap();
        let kept = pool.allocate(12 * MIB, &stream).unwrap();
        let blocks = [(); 3].map(|()| pool.allocate(16 * MIB, &stream).unwrap());
        drop(blocks);
        let full = held(&pool);
        pool.trim(full).unwrap();
        assert_eq!(held(&pool), full, "nothing to do");
        pool.trim(30 * MIB).unwrap();
        let least = if contiguous { 12 } else { 28 };
        assert!(
            (least * MIB..=30 * MIB).contains(&held(&pool)),
            "{}",
            held(&pool)
        );
        pool.trim(MIB).unwrap();
        assert_eq!(held(&pool), 12 * MIB, "a block is in use");
        drop(kept);
        pool.trim(0).unwrap();
        assert_eq!(held(&pool), 0);
        pool.check_invariants();
    }
}

#[test]
fn a_fraction_is_a_limit_and_the_smaller_counts() {
    let device = device(HostSchedule::Threads);
    let stream = device.create_stream().unwrap();
    let of = |limit, fraction| {
        let config = PoolConfig {
            limit,
            fraction,
            ..PoolConfig::default()
        };
        Pool::new(&device, config)
    };
    for (limit, fraction, effective) in [
        (None, Some(1.0), Some(CAPACITY)),
        (None, Some(0.5), Some(32 * MIB)),
        (Some(16 * MIB), Some(0.5), Some(16 * MIB)),
        (Some(48 * MIB), Some(0.5), Some(32 * MIB)),
        (None, None, None),
    ] {
        assert_eq!(of(limit, fraction).unwrap().limit(), effective);
    }
    for fraction in [
        0.0,
        -0.1,
        2.0,
        1.0 + f64::EPSILON,
        f64::NAN,
        f64::INFINITY,
        1e-3,
    ] {
        match of(None, Some(fraction)) {
            Err(Error::InvalidConfig { key, reason }) => {
                assert_eq!(key, "fraction", "{reason}");
            }
            other => panic!("{fraction} gave {other:?}"),
        }
    }
    let half = of(None, Some(0.5)).unwrap();
    drop(half.allocate(CAPACITY / 2, &stream).unwrap());
    assert!(half.allocate(CAPACITY / 2 + 1, &stream).is_err());
    assert!(half.allocate(CAPACITY / 2, &stream).is_ok());
}

#[test]
fn limits_can_be_changed_and_read_back() {
    let device = device(HostSchedule::Threads);
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let stream = device.create_stream().unwrap();
    for limit in [Some(CAPACITY), Some(2 * MIB), Some(3 * MIB + 7), None] {
        pool.set_limit(limit).unwrap();
        assert_eq!(pool.limit(), limit);
    }
    for bad in [0, 2 * MIB - 1, CAPACITY + 1, u64::MAX] {
        assert!(pool.set_limit(Some(bad)).is_err());
        assert_eq!(pool.limit(), None, "nothing was changed");
    }
    let in_use = pool.allocate(20 * MIB, &stream).unwrap();
    drop(pool.allocate(30 * MIB, &stream).unwrap());
    pool.set_limit(Some(10 * MIB)).unwrap();
    assert_eq!(held(&pool), 20 * MIB, "what is idle went back");
    let Err(Error::OutOfMemory(report)) = pool.allocate(4 * MIB, &stream) else {
        panic!("growth is refused")
    };
    assert!(report.limited && report.limit == Some(10 * MIB));
    drop(in_use);
    assert!(pool.allocate(20 * MIB, &stream).is_ok(), "nothing is taken");
    pool.empty_cache().unwrap();
    assert!(pool.allocate(20 * MIB, &stream).is_err());
    pool.set_limit(None).unwrap();
    assert!(pool.allocate(20 * MIB, &stream).is_ok());
    pool.check_invariants();
}

#[test]
fn limits_count_private_memory_and_leave_it_alone() {
    for contiguous in [false, true] {
        let device = device(HostSchedule::Threads);
        let config = PoolConfig {
            contiguous,
            limit: Some(4 * MIB),
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        let stream = device.create_stream().unwrap();
        let private = pool.private().unwrap();
        let allocate = |mib| pool.allocate(mib * MIB, &stream);
        assert!(private.prime(|| allocate(20)).is_err());
        pool.set_limit(Some(24 * MIB)).unwrap();
        drop(private.prime(|| allocate(20)).unwrap());
        assert_eq!(private.reserved_bytes(), 20 * MIB);
        // Free, but set aside.
        pool.set_limit(Some(8 * MIB)).unwrap();
        assert_eq!(held(&pool), 20 * MIB);
        pool.check_invariants();
        assert!(allocate(2).is_err());
        drop(private.prime(|| allocate(20)).unwrap());
        drop(private);
        assert!(allocate(8).is_ok(), "released memory goes back");
        assert!(held(&pool) <= 8 * MIB, "{contiguous}: {}", held(&pool));
        pool.check_invariants();
    }
}

#[test]
fn what_was_idle_for_a_period_goes_back_at_the_next_slow_call() {
    for contiguous in [false, true] {
        let device = device(HostSchedule::Threads);
        let config = PoolConfig {
            contiguous,
            // Every slow call ends a period.
            decay: Some(Duration::ZERO),
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        let stream = device.create_stream().unwrap();
        let kept = pool.allocate(24 * MIB, &stream).unwrap();
        drop(pool.allocate(30 * MIB, &stream).unwrap());
        stream.synchronize().unwrap();
        // Each round is a slow call with a stream that is new to this thread's cache. What the pool asked of
        // the device it may learn one call later.
        let mut rounds = 0;
        while held(&pool) > 32 * MIB {
            let passing = device.create_stream().unwrap();
            drop(pool.allocate(4096, &passing).unwrap());
            rounds += 1;
            assert!(rounds < 10_000, "{} are held", held(&pool));
        }
        assert!(held(&pool) >= 24 * MIB);
        drop(kept);
        pool.check_invariants();
    }
}

#[test]
fn decay_by_hand_needs_no_clock_and_none_is_looked_at_without_one() {
    let device = device(HostSchedule::Threads);
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let stream = device.create_stream().unwrap();
    drop(pool.allocate(30 * MIB, &stream).unwrap());
    for _ in 0..100 {
        let other = device.create_stream().unwrap();
        drop(pool.allocate(4096, &other).unwrap());
    }
    assert!(held(&pool) >= 30 * MIB);
    pool.decay_now();
    assert!(held(&pool) >= 30 * MIB, "it was needed in this period");
    let mut rounds = 0;
    while held(&pool) > 0 {
        pool.decay_now();
        rounds += 1;
        assert!(rounds < 10_000, "{:?}", pool.stats());
        std::thread::yield_now();
    }
    pool.check_invariants();
}

#[test]
fn a_deterministic_pool_has_no_clock_and_a_policy_without_pace() {
    let device = device(HostSchedule::Threads);
    let config = PoolConfig {
        deterministic: true,
        ..PoolConfig::default()
    };
    for (reuse, effective) in [
        (ReusePolicy::OnlyComplete, ReusePolicy::Wait),
        (ReusePolicy::Wait, ReusePolicy::Wait),
        (ReusePolicy::Never, ReusePolicy::Never),
    ] {
        let config = PoolConfig {
            reuse,
            ..config.clone()
        };
        assert_eq!(
            Pool::new(&device, config).unwrap().config().reuse,
            effective
        );
    }
    let second = Some(Duration::from_secs(1));
    let timed = [
        PoolConfig {
            decay: second,
            ..config.clone()
        },
        PoolConfig {
            wait_deadline: second,
            ..config
        },
    ];
    for config in timed {
        let refused = Pool::new(&device, config);
        assert!(matches!(refused, Err(Error::InvalidConfig { .. })));
    }
}
