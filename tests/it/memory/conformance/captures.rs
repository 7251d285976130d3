//! Cases about captured graphs and the private pools that they keep.

use kitsune::driver::DevicePtr;
use kitsune::memory::{Allocate, Track};
use kitsune::{Block, Device, Pool, PrivatePool, Stream};

use crate::support::driver::{copy, fill};
use crate::support::subject::{KIB, MIB, OWN, PAGE, Subject, allocated, range, reserved, setup};

/// Passes until one takes nothing more from the driver.
fn prime(pool: &Pool, private: &PrivatePool, work: impl Fn()) {
    loop {
        let taken = pool.stats().num_device_alloc;
        private.prime(&work);
        if pool.stats().num_device_alloc == taken {
            return;
        }
    }
}

/// PyTorch takes the state of a private pool and restores it, so that branches of a tree of graphs find what
/// was there. Here a capture finds the private pool as the one before it did, and lays it out alike.
pub(crate) fn case_22_captures_on_one_private_pool_are_laid_out_alike<S: Subject>() {
    let (_, pool, stream) = setup::<S>(256 * MIB);
    let private = pool.private().unwrap();
    let work = || {
        let sizes = [OWN, 700, 300 * KIB, 700, 3 * PAGE, 5 * MIB];
        let mut blocks = sizes.map(|bytes| Some(pool.allocate(bytes, &stream).unwrap()));
        let mut seen: Vec<_> = blocks.iter().flatten().map(range).collect();
        blocks[2] = None;
        seen.push(range(&pool.allocate(200 * KIB, &stream).unwrap()));
        seen
    };
    prime(&pool, &private, || drop(work()));
    let (held, segments) = (private.reserved_bytes(), pool.stats().segment.current);
    let layout = || {
        let mut seen = Vec::new();
        let graph = private.capture(&stream, || {
            seen = work();
            Ok(())
        });
        (graph.unwrap(), seen)
    };
    let (first, expected) = layout();
    let (second, seen) = layout();
    assert_eq!(seen, expected);
    assert_eq!(private.reserved_bytes(), held);
    assert_eq!(pool.stats().segment.current, segments);
    drop((first, second));
}

/// As in case 22, without a state to go back to.
pub(crate) fn case_23_blocks_that_outlive_their_graph_die_one_by_one<S: Subject>() {
    let (device, pool, stream) = setup::<S>(256 * MIB);
    let private = pool.private().unwrap();
    let mut kept = Vec::new();
    let graph = private.capture(&stream, || {
        kept.push(pool.allocate(OWN, &stream)?);
        kept.push(pool.allocate(700, &stream)?);
        drop(pool.allocate(3 * PAGE, &stream)?);
        Ok(())
    });
    drop((graph.unwrap(), private));
    pool.empty_cache().unwrap();
    for live in [2, 1, 0] {
        assert_eq!(pool.stats().allocation.current, live);
        assert_eq!(reserved(&pool) > 0, live > 0);
        assert_eq!(pool.stats().private_reserved_bytes, 0, "the pool is gone");
        pool.check_invariants();
        kept.pop();
        pool.empty_cache().unwrap();
    }
    assert_eq!(device.memory_info().unwrap().free, 256 * MIB);
}

/// PyTorch compares the live blocks of a private pool with a set. Here a table around the pool has them.
pub(crate) fn case_24_the_live_blocks_of_a_capture_are_known<S: Subject>() {
    let (_, pool, stream) = setup::<S>(256 * MIB);
    let track = Track::new(pool.clone());
    let private = pool.private().unwrap();
    let mut kept = Vec::new();
    let graph = private.capture(&stream, || {
        for bytes in [OWN, 700, 300 * KIB] {
            kept.push(track.allocate(bytes, &stream)?);
        }
        drop(track.allocate(PAGE, &stream)?);
        Ok(())
    });
    let live = || -> Vec<DevicePtr> { track.report().blocks.iter().map(|b| b.ptr).collect() };
    assert_eq!(live(), kept.iter().map(Block::ptr).collect::<Vec<_>>());
    drop(kept.remove(1));
    assert_eq!(live(), [kept[0].ptr(), kept[1].ptr()]);
    kept.clear();
    assert_eq!(live(), []);
    drop(graph.unwrap());
}

pub(crate) fn case_25_a_pass_routes_its_own_thread_alone<S: Subject>() {
    let (_, pool, stream) = setup::<S>(256 * MIB);
    let private = pool.private().unwrap();
    let work = |bytes: u64| {
        let both = [bytes, bytes].map(|bytes| pool.allocate(bytes, &stream).unwrap());
        drop(both);
    };
    private.prime(|| {
        std::thread::scope(|scope| scope.spawn(|| work(OWN)).join().unwrap());
        assert_eq!(pool.stats().private_reserved_bytes, 0);
        work(3 * OWN);
    });
    let stats = pool.stats();
    assert_eq!(stats.private_reserved_bytes, 6 * OWN);
    assert_eq!(stats.reserved_bytes.current, 8 * OWN);
    let graph = private.capture(&stream, || {
        work(3 * OWN);
        Ok(())
    });
    drop(private);
    pool.empty_cache().unwrap();
    assert_eq!(reserved(&pool), 6 * OWN, "the graph keeps what it needs");
    drop(graph.unwrap());
    pool.empty_cache().unwrap();
    assert_eq!(reserved(&pool), 0);
}

/// Captures a block that `forks` read and that is freed at once; after each join, it is not given out again.
fn is_kept_until_the_end<S: Subject>(forks: usize) {
    let (device, pool, stream) = setup::<S>(512 * MIB);
    let sides: Vec<Stream> = (0..forks)
        .map(|_| device.create_stream().unwrap())
        .collect();
    let results = pool.allocate(OWN, &stream).unwrap();
    let private = pool.private().unwrap();
    let mut freed = DevicePtr(0);
    let graph = private.capture(&stream, || {
        let mut block = pool.allocate(OWN, &stream)?;
        freed = block.ptr();
        fill(&stream, freed, 3, OWN);
        for (at, side) in (0..).zip(&sides) {
            side.wait_for(&stream)?;
            copy(side, results.ptr().offset(at * KIB), freed, KIB);
            block.record_stream(side);
        }
        drop(block);
        assert_ne!(pool.allocate(OWN, &stream)?.ptr(), freed, "before a join");
        for side in &sides {
            stream.wait_for(side)?;
            assert_ne!(pool.allocate(OWN, &stream)?.ptr(), freed, "after a join");
        }
        Ok(())
    });
    assert_eq!(private.reserved_bytes(), 2 * OWN);
    let again = private.capture(&stream, || {
        let both = [pool.allocate(OWN, &stream)?, pool.allocate(OWN, &stream)?];
        assert!(both.iter().any(|block| block.ptr() == freed), "afterwards");
        Ok(())
    });
    drop((graph.unwrap(), again.unwrap()));
    pool.check_invariants();
}

/// PyTorch follows the joins of a capture. Here no stream of a capture is known to have passed another until
/// the capture is over: its events cannot be asked.
pub(crate) fn case_26_a_forked_stream_holds_a_block_until_the_capture_ends<S: Subject>() {
    is_kept_until_the_end::<S>(1);
}

/// As case 26.
pub(crate) fn case_27_three_forks_hold_a_block_until_the_capture_ends<S: Subject>() {
    is_kept_until_the_end::<S>(3);
}

fn two_streams<S: Subject>() -> (Device, Pool, Stream, Stream) {
    let (device, pool, stream) = setup::<S>(256 * MIB);
    let other = device.create_stream().unwrap();
    (device, pool, stream, other)
}

pub(crate) fn case_64_a_graph_pins_what_it_touched_and_nothing_else<S: Subject>() {
    let (_, pool, stream, other) = two_streams::<S>();
    let before = pool.allocate(OWN, &other).unwrap().ptr();
    let private = pool.private().unwrap();
    let mut touched = 0..0;
    let graph = private.capture(&stream, || {
        touched = range(&pool.allocate(OWN, &stream)?);
        assert_eq!(pool.allocate(OWN, &stream)?.ptr().0, touched.start);
        let ordinary = pool.allocate(OWN, &other)?;
        assert_eq!(ordinary.ptr(), before, "what was free before is not pinned");
        Ok(())
    });
    assert_eq!(private.reserved_bytes(), OWN);
    assert_eq!(pool.allocate(OWN, &other).unwrap().ptr(), before);
    let ordinary: Vec<_> = (0..20)
        .map(|n| pool.allocate(OWN, if n % 2 == 0 { &stream } else { &other }))
        .map_while(Result::ok)
        .collect();
    assert!(ordinary.len() > 5);
    let is_apart =
        |block: &Block| block.ptr().0 >= touched.end || range(block).end <= touched.start;
    assert!(ordinary.iter().all(is_apart));
    drop(ordinary);
    pool.empty_cache().unwrap();
    assert_eq!((reserved(&pool), allocated(&pool)), (OWN, 0));
    drop((graph.unwrap(), private));
    pool.empty_cache().unwrap();
    assert_eq!(reserved(&pool), 0);
}
