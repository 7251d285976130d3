//! The page heap under scripted and random operations.

use super::*;
use crate::memory::types::GRANULARITY;
use crate::units::to_usize;

fn one_owner(pages: usize) -> PageHeap {
    let mut page_heap = PageHeap::starting_at(0);
    page_heap.append(pages, 0);
    page_heap
}

fn allocate(page_heap: &mut PageHeap, owner: StreamIndex, units: u64) -> Option<Index> {
    let free_block = page_heap.best_fit(owner, units)?;
    Some(page_heap.take(&free_block, free_block.start, units))
}

#[test]
fn growth_continues_the_last_hole_of_the_same_owner_only() {
    let mut page_heap = one_owner(2);
    let block = allocate(&mut page_heap, 0, PAGE_UNITS).unwrap();
    page_heap.append(1, 0);
    assert_eq!(page_heap.largest(0), 2 * PAGE_UNITS);
    page_heap.append(1, 1);
    assert_eq!(
        (page_heap.largest(0), page_heap.largest(1)),
        (2 * PAGE_UNITS, PAGE_UNITS)
    );
    page_heap.free(block, 0, 7);
    assert_eq!(page_heap.best_fit(0, 3 * PAGE_UNITS).unwrap().epoch, 7);
    assert_eq!(page_heap.check_invariants(), (4 * PAGE_UNITS, 0));
}

#[test]
fn large_blocks_of_whole_pages_begin_on_a_page_if_the_hole_allows_it() {
    const LARGE: u64 = ON_PAGE_MIN as u64;
    let mut page_heap = one_owner(9);
    let mut start = |units| page_heap.allocate(0, units).map(|(_, start)| start);
    assert_eq!(start(7), Some(0));
    assert_eq!(start(PAGE_UNITS), Some(7));
    assert_eq!(start(LARGE), Some(2 * PAGE_UNITS));
    // What fits before it goes there.
    assert_eq!(start(PAGE_UNITS - 8), Some(PAGE_UNITS + 7));
    assert_eq!(start(PAGE_UNITS), Some(LARGE + 2 * PAGE_UNITS));
    page_heap.check_invariants();

    // A bit more than whole pages, and whole pages without room for it.
    let mut page_heap = one_owner(7);
    let first = page_heap.allocate(0, 7).unwrap();
    let rest = page_heap.allocate(0, LARGE + 9).unwrap();
    assert_eq!(rest.1, 7);
    let last = page_heap.allocate(0, PAGE_UNITS - 16).unwrap();
    page_heap.free(rest.0, 0, 1);
    assert_eq!(page_heap.allocate(0, LARGE).unwrap().1, 7);
    page_heap.free(first.0, 0, 2);
    page_heap.free(last.0, 0, 3);
    page_heap.check_invariants();
}

#[test]
fn a_page_in_the_middle_of_a_hole_can_be_taken() {
    let mut page_heap = one_owner(5);
    let free_block = page_heap.free_block_over_page(2).unwrap();
    let page = page_heap.take(&free_block, 2 * PAGE_UNITS, PAGE_UNITS);
    page_heap.check_invariants();
    assert_eq!(page_heap.free_block_over_page(2), None);
    assert_eq!(
        page_heap.free_block_over_page(1).unwrap().whole_pages(),
        0..2
    );
    assert_eq!(
        page_heap.free_block_over_front(3, 9).unwrap().whole_pages(),
        3..5
    );
    page_heap.free(page, 1, 4);
    let free_block = page_heap.free_block_over_page(2).unwrap();
    assert_eq!(
        (free_block.owner, free_block.epoch, free_block.units),
        (1, 4, PAGE_UNITS)
    );
    assert_eq!(page_heap.check_invariants(), (5 * PAGE_UNITS, 0));
}

#[test]
fn returned_homes_are_used_again() {
    let mut page_heap = one_owner(4);
    let free_block = page_heap.free_block_over_page(1).unwrap();
    let pages = page_heap.take(&free_block, PAGE_UNITS, 2 * PAGE_UNITS);
    page_heap.unmap(pages);
    assert_eq!(page_heap.check_invariants().0, 2 * PAGE_UNITS);
    assert_eq!(page_heap.unmapped(3), None);
    for page in [1, 2] {
        assert_eq!(page_heap.unmapped(1), Some(page));
        page_heap.remap(page, 1, 0);
    }
    assert_eq!(page_heap.largest(0), 4 * PAGE_UNITS);
    page_heap.check_invariants();
}

#[test]
fn the_way_to_a_block_is_gone_once() {
    let mut page_heap = one_owner(100);
    let blocks: Vec<Index> = (0..400)
        .map(|_| page_heap.allocate(0, PAGE_UNITS / 4).unwrap().0)
        .collect();
    // Two blocks of each page become one: the one behind was noted last and is gone.
    for page in blocks.chunks(4) {
        page_heap.free(page[2], 0, 1);
        page_heap.free(page[3], 0, 1);
    }
    let holds = |page_heap: &PageHeap, page: PageIndex| {
        let noted = page_heap.page_map.noted(page).unwrap();
        page_of(page_heap.blocks.at(noted).start) == page
    };
    assert!((0..100).all(|page| !holds(&page_heap, page)));
    assert_eq!(page_heap.over(50), blocks[200]);
    assert!((0..=50).all(|page| holds(&page_heap, page)));
    assert_eq!(page_heap.over(99), blocks[396]);
    assert!((0..100).all(|page| holds(&page_heap, page)));
    page_heap.check_invariants();
}

#[test]
fn random_operations_keep_the_invariants() {
    let mut random = fastrand::Rng::with_seed(11);
    let mut page_heap = one_owner(6);
    let mut live: Vec<Index> = Vec::new();
    let mut inside = 0;
    for _ in 0..20_000 {
        let owner = random.usize(0..3);
        match random.u32(0..20) {
            0 => drop(page_heap.append(random.usize(1..12), owner)),
            1..8 => live.extend(allocate(&mut page_heap, owner, random.u64(1..9000))),
            8..10 => {
                // Whole pages, and a bit more or less.
                let units = random.u64(5..9) * PAGE_UNITS + random.u64(0..3) - 1;
                let free_block = page_heap.best_fit(owner, units);
                let taken = page_heap.allocate(owner, units);
                assert_eq!(taken.is_some(), free_block.is_some());
                if let (Some(free_block), Some((index, start))) = (free_block, taken) {
                    assert_eq!(page_heap.start(index), start);
                    inside += u32::from(start > free_block.start);
                    live.push(index);
                }
            }
            10..12 => {
                let page = random.usize(0..page_heap.pages());
                if let Some(free_block) = page_heap.free_block_over_page(page) {
                    live.push(page_heap.take(&free_block, page as u64 * PAGE_UNITS, PAGE_UNITS));
                }
            }
            _ if live.is_empty() => {}
            _ => {
                let index = live.swap_remove(random.usize(0..live.len()));
                page_heap.free(index, owner, random.u64(0..9));
            }
        }
        if page_heap.pages() > 200 {
            page_heap = one_owner(6);
            live.clear();
        }
        if random.u32(0..8) == 0 {
            page_heap.check_invariants();
        }
    }
    assert!(
        inside > 30,
        "{inside} blocks behind the front of a free block"
    );
}

/// With homes that are given up and used again, and free blocks that change their owner in parts.
#[test]
fn what_lies_over_a_page_is_found_whatever_came_and_went() {
    let mut random = fastrand::Rng::with_seed(7);
    let mut page_heap = one_owner(60);
    let mut live: Vec<Index> = Vec::new();
    for step in 0..40_000_u64 {
        let owner = random.usize(0..3);
        let page = random.usize(0..60);
        match random.u32(0..50) {
            0 => page_heap.tracks_page_epochs = random.bool(),
            1 => {
                if let Some(free_block) = page_heap.free_block_over_page(page) {
                    let block = page_heap.take(&free_block, page as u64 * PAGE_UNITS, PAGE_UNITS);
                    page_heap.unmap(block);
                }
            }
            2 => {
                let count = random.usize(1..3);
                if let Some(first) = page_heap.unmapped(count) {
                    page_heap.remap(first, count, owner);
                }
            }
            3 => {
                let to = (owner + 1) % 3;
                let (fence, reached) = (
                    Fence {
                        owner: to,
                        epoch: step,
                    },
                    random.u64(0..step + 1),
                );
                let free_blocks: Vec<FreeBlock> = page_heap.free_blocks_from(owner, 1).collect();
                for mut free_block in free_blocks {
                    let parts = page_heap.parts(&free_block, |part| part.epoch <= reached);
                    for part in parts.iter().rev() {
                        page_heap.give(&free_block, *part, fence);
                        free_block.units = part.0 - free_block.start;
                    }
                }
            }
            4 => page_heap.merge_complete(|fence| fence.epoch % 3 == 0),
            5..30 => live.extend(allocate(&mut page_heap, owner, random.u64(1..5_000))),
            _ if live.is_empty() => {}
            _ => {
                let index = live.swap_remove(random.usize(0..live.len()));
                page_heap.free(index, owner, step);
            }
        }
        if step % 3 == 0 {
            let at = begin_of(page);
            let mut blocks = page_heap.in_order();
            let over = blocks.find(|(_, block)| block.start <= at && at < block.end());
            assert_eq!(Some(page_heap.over(page)), over.map(|(index, _)| index));
        }
        if step % 500 == 0 {
            page_heap.check_invariants();
        }
    }
    let taken = page_heap
        .in_order()
        .filter(|(_, block)| block.claim == Claim::TAKEN);
    assert_eq!(taken.count(), live.len());
}

/// What a page says of its part of a free block is no earlier than any free there, and where frees are remembered often
/// earlier than the latest of the whole free block: a test that saw too few of these shows nothing.
#[test]
fn pages_remember_their_frees() {
    let mut random = fastrand::Rng::with_seed(23);
    let pages = 40;
    let mut page_heap = one_owner(pages);
    let mut freed_at = vec![0; pages * to_usize(PAGE_UNITS)];
    let mut live: Vec<Index> = Vec::new();
    let mut is_exact = [0, 0];
    for step in 1..6_000_u64 {
        if step % 600 == 0 {
            page_heap.tracks_page_epochs = random.bool();
        }
        if live.len() < 30 && random.bool() {
            let free_blocks: Vec<FreeBlock> = page_heap.free_blocks().collect();
            let free_block = free_blocks[random.usize(0..free_blocks.len())];
            let start = free_block.start + random.u64(0..free_block.units);
            let units = random.u64(1..=(free_block.start + free_block.units - start).min(9_000));
            live.push(page_heap.take(&free_block, start, units));
        } else if !live.is_empty() {
            let index = live.swap_remove(random.usize(0..live.len()));
            let block = page_heap.blocks.at(index);
            // Some come back late, with an earlier epoch.
            let epoch = step - random.u64(0..step.min(3));
            freed_at[block.start as usize..block.end() as usize].fill(epoch);
            page_heap.free(index, 1 + random.usize(0..2), epoch);
        }
        if step % 40 != 0 {
            continue;
        }
        for free_block in page_heap.free_blocks() {
            let end = free_block.start + free_block.units;
            for page in free_block.pages() {
                let (first, last) = (page as u64 * PAGE_UNITS, (page as u64 + 1) * PAGE_UNITS);
                let part = free_block.start.max(first)..end.min(last);
                let part = to_usize(part.start)..to_usize(part.end);
                let latest = freed_at[part].iter().max().copied().unwrap();
                let told = page_heap.fence_of_page(&free_block, page).epoch;
                assert!(
                    told >= latest,
                    "page {page} of {free_block:?} at step {step}"
                );
                is_exact[usize::from(told < free_block.epoch)] += 1;
            }
        }
    }
    assert!(is_exact[1] > 200, "{is_exact:?}");
}

#[test]
fn what_no_territory_holds_finds_no_hole() {
    let mut page_heap = one_owner(2);
    for units in [3 * PAGE_UNITS, (1 << 32) + 1, u64::MAX / GRANULARITY] {
        assert_eq!(page_heap.allocate(0, units), None);
        assert_eq!(page_heap.best_fit(0, units), None);
        assert_eq!(page_heap.free_blocks_from(0, units).count(), 0);
    }
    assert!(page_heap.allocate(0, 2 * PAGE_UNITS).is_some());
}
