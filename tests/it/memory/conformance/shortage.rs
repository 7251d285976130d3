//! Cases about who is asked and told when memory is short, and about parts of a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kitsune::{Error, Pool, PoolConfig};
use parking_lot::Mutex;

use crate::support::subject::{MIB, Subject, report, reserved, setup, setup_with};

/// What is left to other types where a setting is a number of 64 bits: fractions that are none.
pub(crate) fn case_05_a_fraction_of_the_device_is_a_limit<S: Subject>() {
    let device = S::device(256 * MIB);
    for fraction in [-0.1, 2.0, 0.0, f64::NAN, f64::INFINITY] {
        let config = PoolConfig {
            fraction: Some(fraction),
            ..PoolConfig::default()
        };
        let refused = Pool::new(&device, config);
        let is_named = matches!(
            &refused,
            Err(Error::InvalidConfig {
                key: "fraction",
                ..
            })
        );
        assert!(is_named, "{fraction}: {refused:?}");
    }
    let half = PoolConfig {
        fraction: Some(0.5),
        ..PoolConfig::default()
    };
    let (_, pool, stream) = setup_with::<S>(256 * MIB, half);
    drop(pool.allocate(256 * MIB / 1000 * 499, &stream).unwrap());
    assert!(report(pool.allocate(128 * MIB + 1, &stream)).limited);
    drop(pool.allocate(128 * MIB, &stream).unwrap());
}

/// PyTorch reads a fraction from the environment as well; settings here come from the caller alone. A pool
/// for nothing of a device is refused (case 5).
pub(crate) fn case_06_a_fraction_reads_back<S: Subject>() {
    let device = S::device(256 * MIB);
    let mut random = fastrand::Rng::with_seed(6);
    for fraction in [
        1.0,
        0.5,
        0.25 + random.f64() / 2.0,
        0.25 + random.f64() / 2.0,
    ] {
        let config = PoolConfig {
            fraction: Some(fraction),
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        assert_eq!(pool.config().fraction, Some(fraction));
        let (limit, whole) = (pool.limit().unwrap() as f64, (256 * MIB) as f64);
        assert!(limit <= fraction * whole && fraction * whole < limit + 1.0);
    }
}

pub(crate) fn case_12_running_out_is_told_to_observers<S: Subject>() {
    let (device, pool, stream) = setup::<S>(64 * MIB);
    let told = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&told);
    let observer = pool.on_out_of_memory(move |report| sink.lock().push(report.clone()));
    let _held = pool.allocate(20 * MIB, &stream).unwrap();
    let most = report(pool.allocate(4 << 40, &stream));
    assert_eq!((most.requested, most.allocated), (4 << 40, 20 * MIB));
    assert_eq!(most.reserved, reserved(&pool));
    assert_eq!(most.device_total, 64 * MIB);
    assert_eq!(most.device_free, device.memory_info().unwrap().free);
    assert!(most.exceeds_device());
    let more = report(pool.allocate(50 * MIB, &stream));
    assert!(!more.tried.is_empty());
    drop(observer);
    report(pool.allocate(50 * MIB, &stream));
    assert_eq!(pool.stats().num_ooms, 3);
    let told: Vec<_> = told.lock().iter().map(|report| report.requested).collect();
    assert_eq!(told, [4 << 40, 50 * MIB], "not after it was taken out");
}

/// A pool that holds 40 MiB, all of it idle.
fn lender<S: Subject>(like: &Pool) -> Pool {
    let pool = Pool::new(like.device(), PoolConfig::default()).unwrap();
    let stream = like.device().create_stream().unwrap();
    drop(pool.allocate(40 * MIB, &stream).unwrap());
    pool
}

/// PyTorch's pools lend when they were told so. Here the program says what happens when memory is short, and
/// may have one pool make room for another.
pub(crate) fn case_30_one_pool_makes_room_for_another<S: Subject>() {
    let (_, pool, stream) = setup::<S>(80 * MIB);
    let [lending, other] = [(); 2].map(|()| lender::<S>(&pool));
    let from = lending.clone();
    let _registration = pool.on_shortage(move |_| from.empty_cache().unwrap());
    let block = pool.allocate(30 * MIB, &stream).unwrap();
    assert_eq!(block.requested(), 30 * MIB);
    assert_eq!((reserved(&lending), reserved(&other)), (0, 40 * MIB));
}

pub(crate) fn case_31_who_is_gone_is_not_asked<S: Subject>() {
    let (_, pool, stream) = setup::<S>(80 * MIB);
    let asked = Arc::new(AtomicU64::new(0));
    for _ in 0..10 {
        let (lending, asked) = (lender::<S>(&pool), Arc::clone(&asked));
        let registration = pool.on_shortage(move |_| {
            asked.fetch_add(1, Ordering::Relaxed);
            lending.empty_cache().unwrap();
        });
        drop(registration);
    }
    let _held = pool.allocate(60 * MIB, &stream).unwrap();
    report(pool.allocate(30 * MIB, &stream));
    assert_eq!(asked.load(Ordering::Relaxed), 0);
}

/// RMM's callback says whether to try again, and is asked as often as it says yes. Here trying again costs
/// nothing beside what was tried before, so each is asked once.
pub(crate) fn case_53_each_callback_is_asked_once_and_of_shortage_alone<S: Subject>() {
    let (_, pool, stream) = setup::<S>(80 * MIB);
    let spare = Arc::new(Mutex::new(Some(pool.allocate(60 * MIB, &stream).unwrap())));
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (mine, wanted) = (Arc::clone(&spare), Arc::clone(&asked));
    let _registration = pool.on_shortage(move |bytes| {
        wanted.lock().push(bytes);
        // The second time there is nothing to give up.
        drop(mine.lock().take());
    });
    let kept = pool.allocate(30 * MIB, &stream).unwrap();
    assert_eq!(*asked.lock(), [30 * MIB]);
    report(pool.allocate(60 * MIB, &stream));
    assert_eq!(*asked.lock(), [30 * MIB, 60 * MIB]);
    let host = kitsune::Device::host(kitsune::HostConfig::default()).unwrap();
    let foreign = host.create_stream().unwrap();
    let refused = pool.allocate(60 * MIB, &foreign);
    assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    assert_eq!(asked.lock().len(), 2, "that is no shortage");
    drop(kept);
}
