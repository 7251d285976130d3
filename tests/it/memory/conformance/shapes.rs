//! Cases about splitting, merging and what lies in memory.

use kitsune::{Block, Pool, Stream};

use crate::support::driver::{fill, read};
use crate::support::subject::{
    GIB, KIB, MIB, PAGE, Subject, allocated, merge, range, reserved, setup,
};

/// The three places of a block that are marked and looked at: filling all of it would test the memory.
fn marks(block: &Block) -> [kitsune::driver::DevicePtr; 3] {
    let last = block.requested() - 4 * KIB;
    [0, last / 2, last].map(|at| block.ptr().offset(at))
}

fn mark(stream: &Stream, block: &Block, id: u8) {
    for at in marks(block) {
        fill(stream, at, id, 4 * KIB);
    }
}

fn assert_marked(stream: &Stream, block: &Block, id: u8) {
    for at in marks(block) {
        let shown = read(stream, at, 4096);
        assert!(shown.iter().all(|byte| *byte == id), "a block marked {id}");
    }
}

pub(crate) fn case_11_contents_survive_random_sequences<S: Subject>() {
    const STEPS: usize = 10_000;
    let (_, pool, stream) = setup::<S>(GIB);
    let mut random = fastrand::Rng::with_seed(123);
    let mut live: Vec<(u8, Block)> = Vec::new();
    for step in 0..STEPS {
        let id = u8::try_from(step % 251).unwrap();
        match random.u32(0..210) {
            0..100 => {
                let bytes = random.u64(2 * MIB..20 * MIB);
                let block = pool.allocate(bytes, &stream).unwrap();
                mark(&stream, &block, id);
                live.push((id, block));
            }
            100..200 if !live.is_empty() => {
                let (id, block) = live.swap_remove(random.usize(0..live.len()));
                assert_marked(&stream, &block, id);
            }
            200.. => pool.empty_cache().unwrap(),
            _ => {}
        }
        while live.iter().map(|(_, block)| block.requested()).sum::<u64>() > 102 * MIB {
            let (id, block) = live.swap_remove(0);
            assert_marked(&stream, &block, id);
        }
    }
    pool.check_invariants();
}

pub(crate) fn case_41_neighbors_coalesce_in_every_order<S: Subject>() {
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    for order in orders {
        let (_, pool, stream) = setup::<S>(256 * MIB);
        let mut parts = [(); 3].map(|()| Some(pool.allocate(PAGE, &stream).unwrap()));
        let base = parts[0].as_ref().unwrap().ptr();
        for part in order {
            parts[part] = None;
        }
        merge(&pool);
        let whole = pool.allocate(3 * PAGE, &stream).unwrap();
        assert_eq!(whole.ptr(), base, "freed in order {order:?}");
        pool.check_invariants();
    }
}

pub(crate) fn case_42_a_region_freed_in_mixed_order_is_whole<S: Subject>() {
    let (_, pool, stream) = setup::<S>(256 * MIB);
    let mut parts: Vec<_> = (0..10)
        .map(|_| pool.allocate(PAGE, &stream).unwrap())
        .collect();
    let base = parts[0].ptr();
    let mut random = fastrand::Rng::with_seed(42);
    random.shuffle(&mut parts);
    drop(parts);
    merge(&pool);
    let held = reserved(&pool);
    let whole = pool.allocate(10 * PAGE, &stream).unwrap();
    assert_eq!(whole.ptr(), base);
    assert_eq!(reserved(&pool), held);
}

pub(crate) fn case_55_a_split_block_merges_back<S: Subject>() {
    let unit = MIB;
    for order in [[0, 1], [1, 0]] {
        let (_, pool, stream) = setup::<S>(64 * MIB);
        let whole = pool.allocate(4 * unit, &stream).unwrap();
        let base = whole.ptr();
        drop(whole);
        merge(&pool);
        let mut halves = [(); 2].map(|()| Some(pool.allocate(2 * unit, &stream).unwrap()));
        let starts = halves.each_ref().map(|half| half.as_ref().unwrap().ptr());
        assert_eq!(starts, [base, base.offset(2 * unit)]);
        for half in order {
            halves[half] = None;
        }
        merge(&pool);
        assert_eq!(pool.allocate(4 * unit, &stream).unwrap().ptr(), base);
    }
}

/// CuPy can return what one stream has cached; here all of a pool's idle memory is returned at once.
pub(crate) fn case_58_a_block_in_use_keeps_its_segment<S: Subject>() {
    let (_, pool, stream) = setup::<S>(64 * MIB);
    // Both in one page, and in one segment.
    let whole = pool.allocate(MIB, &stream).unwrap();
    let base = whole.ptr();
    drop(whole);
    merge(&pool);
    let [kept, freed] = [(); 2].map(|()| pool.allocate(512 * KIB, &stream).unwrap());
    assert_eq!(kept.ptr(), base);
    let address = freed.ptr();
    mark(&stream, &kept, 9);
    drop(freed);
    pool.empty_cache().unwrap();
    assert!(reserved(&pool) > 0);
    assert_marked(&stream, &kept, 9);
    let again = pool.allocate(512 * KIB, &stream).unwrap();
    assert_eq!(again.ptr(), address, "the freed half is still there");
    assert_eq!(allocated(&pool), MIB);
    drop((kept, again));
    pool.empty_cache().unwrap();
    assert_eq!(reserved(&pool), 0);
}

/// Frees every second block and allocates somewhat larger and smaller ones in turn.
fn churn(pool: &Pool, stream: &Stream, blocks: &mut [Option<Block>], random: &mut fastrand::Rng) {
    for block in blocks.iter_mut().step_by(2) {
        *block = None;
    }
    for block in blocks.iter_mut().step_by(2) {
        let bytes = random.u64(900 * KIB..=1100 * KIB);
        *block = Some(pool.allocate(bytes, stream).unwrap());
    }
}

/// Plain segments cannot be put together from parts, which costs a few more of them.
pub(crate) fn case_66_fragmentation_is_bounded<S: Subject>() {
    let (_, pool, stream) = setup::<S>(4 * GIB);
    let mut random = fastrand::Rng::with_seed(66);
    let mut blocks: Vec<_> = (0..200)
        .map(|_| Some(pool.allocate(MIB, &stream).unwrap()))
        .collect();
    churn(&pool, &stream, &mut blocks, &mut random);
    let before = reserved(&pool);
    for _ in 0..20 {
        blocks.rotate_left(1);
        churn(&pool, &stream, &mut blocks, &mut random);
    }
    let after = reserved(&pool);
    let most = if S::IS_PAGED { 11 } else { 13 };
    assert!(10 * after <= most * before, "{before} bytes became {after}");
    let live: Vec<_> = blocks.iter().flatten().map(range).collect();
    assert_eq!(live.len(), 200);
}
