//! Cases about pools, their clones and the threads that use them.

use std::sync::mpsc::channel;

use kitsune::{Pool, PoolConfig};

use crate::support::driver::fill;
use crate::support::subject::{MIB, OWN, Subject, allocated, range, reserved, setup};

/// PyTorch routes what a thread allocates to the innermost pool of a scope; here a pass of a private pool does.
pub(crate) fn case_33_passes_nest_and_pools_are_apart<S: Subject>() {
    let (_, pool, stream) = setup::<S>(256 * MIB);
    let nested = [(); 3].map(|()| pool.private().unwrap());
    let [outer, middle, inner] = &nested;
    let take = || drop(pool.allocate(OWN, &stream).unwrap());
    outer.prime(|| {
        take();
        middle.prime(|| {
            inner.prime(take);
            take();
            // Ordinary memory goes back; what passes took stays for their captures.
            pool.empty_cache().unwrap();
        });
        take();
    });
    assert_eq!(nested.each_ref().map(|p| p.reserved_bytes()), [OWN; 3]);
    let blocks: Vec<_> = std::thread::scope(|scope| {
        let work = || {
            let private = pool.private().unwrap();
            private.prime(|| pool.allocate(OWN, &stream).unwrap())
        };
        let threads = [(); 4].map(|()| scope.spawn(work));
        threads.map(|thread| thread.join().unwrap()).into()
    });
    let mut ranges: Vec<_> = blocks.iter().map(range).collect();
    ranges.sort_by_key(|range| range.start);
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
    let second = Pool::new(pool.device(), PoolConfig::default()).unwrap();
    drop(second.allocate(OWN, &stream).unwrap());
    drop(blocks);
    pool.empty_cache().unwrap();
    assert_eq!(reserved(&pool), 3 * OWN, "three private pools are left");
    assert_eq!(reserved(&second), OWN, "the other pool is left alone");
}

pub(crate) fn case_40_all_clones_are_one_pool<S: Subject>() {
    let (device, pool, stream) = setup::<S>(64 * MIB);
    let block = pool.allocate(9000, &stream).unwrap();
    let clone = pool.clone();
    drop(pool);
    assert_eq!(allocated(&clone), block.allocated());
    let address = block.ptr();
    drop(block);
    assert_eq!(allocated(&clone), 0);
    assert_eq!(clone.allocate(9000, &stream).unwrap().ptr(), address);
    drop(clone);
    assert_eq!(device.memory_info().unwrap().free, 64 * MIB);
}

pub(crate) fn case_44_a_block_finds_its_pool_after_its_thread<S: Subject>() {
    let (_, pool, stream) = setup::<S>(64 * MIB);
    let (other, home) = (pool.clone(), stream.clone());
    let thread = std::thread::spawn(move || {
        drop(other.allocate(2048, &home).unwrap());
        [2048, 3 * MIB].map(|bytes| other.allocate(bytes, &home).unwrap())
    });
    let blocks = thread.join().unwrap();
    assert_eq!(pool.stats().allocation.current, 2);
    std::thread::spawn(move || drop(blocks)).join().unwrap();
    assert_eq!(pool.stats().allocation.current, 0);
    pool.check_invariants();
    pool.empty_cache().unwrap();
    assert_eq!(reserved(&pool), 0);
}

pub(crate) fn case_45_blocks_are_freed_by_a_consumer<S: Subject>() {
    for is_same_stream in [true, false] {
        let (device, pool, produced) = setup::<S>(512 * MIB);
        let consumed = if is_same_stream {
            produced.clone()
        } else {
            device.create_stream().unwrap()
        };
        let (send, receive) = channel::<(kitsune::Block, kitsune::Event)>();
        let consumer = std::thread::spawn(move || {
            for (mut block, ready) in receive {
                consumed.wait(&ready).unwrap();
                fill(&consumed, block.ptr(), 2, block.requested());
                block.record_stream(&consumed);
                drop(block);
            }
        });
        let mut random = fastrand::Rng::with_seed(45);
        for _ in 0..100 {
            let block = pool.allocate(random.u64(1..=MIB), &produced).unwrap();
            fill(&produced, block.ptr(), 1, block.requested());
            let ready = produced.record().unwrap();
            send.send((block, ready)).unwrap();
        }
        drop(send);
        consumer.join().unwrap();
        pool.check_invariants();
        assert_eq!(allocated(&pool), 0);
        pool.empty_cache().unwrap();
        assert_eq!(reserved(&pool), 0, "nothing leaks");
        assert_eq!(device.memory_info().unwrap().free, 512 * MIB);
    }
}

/// CuPy's per-thread default stream has no counterpart: a stream is a value, and each thread may have one.
pub(crate) fn case_61_what_a_thread_frees_another_reuses_on_the_stream<S: Subject>() {
    for bytes in [4096, OWN] {
        let (device, pool, stream) = setup::<S>(64 * MIB);
        let other = device.create_stream().unwrap();
        let (thread_pool, thread_stream) = (pool.clone(), stream.clone());
        let freed =
            std::thread::spawn(move || thread_pool.allocate(bytes, &thread_stream).unwrap().ptr());
        let freed = freed.join().unwrap();
        let open = S::hold(&stream);
        let elsewhere = pool.allocate(bytes, &other).unwrap();
        assert_ne!(elsewhere.ptr(), freed, "the other stream cannot know");
        let same = pool.allocate(bytes, &stream).unwrap();
        assert_eq!(same.ptr(), freed);
        open();
    }
}
