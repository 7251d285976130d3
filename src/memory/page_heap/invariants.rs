//! The walk over a page heap that shows its invariants.

use std::collections::HashMap;

use super::blocks::Claim;
use super::{PageHeap, pages_between};
use crate::memory::free_list::NONE;
use crate::memory::types::PAGE_UNITS;

impl PageHeap {
    /// Asserts the module's invariants; returns (mapped units, taken units).
    pub(crate) fn check_invariants(&self) -> (u64, u64) {
        let mut filed = HashMap::new();
        for (owner, bins) in self.bins.iter().enumerate() {
            bins.check_invariants(&self.blocks);
            filed.extend(
                bins.iter_from(&self.blocks, 1)
                    .map(|(index, _)| (index, owner)),
            );
        }
        let (mut mapped, mut taken, mut walked, mut at) = (0, 0, 0, 0);
        let mut before = NONE;
        // By page: the block that covers its first byte.
        let mut over = Vec::new();
        for (index, block) in self.in_order() {
            assert_eq!(
                (block.start, block.before),
                (at, before),
                "block {index} is out of place"
            );
            assert!(block.link.units > 0, "block {index} is empty");
            match block.claim.owner() {
                Some(owner) => assert_eq!(filed.remove(&index), Some(owner), "filing of {index}"),
                None if block.claim == Claim::TAKEN => taken += u64::from(block.link.units),
                None => {}
            }
            assert!(
                block.claim == Claim::TAKEN || !self.blocks.is_of(before, block.claim),
                "{before} and {index} touch"
            );
            if block.claim != Claim::UNMAPPED {
                mapped += u64::from(block.link.units);
            }
            over.resize(pages_between(at, block.end()).0.end, index);
            walked += 1;
            at = block.end();
            before = index;
        }
        for (page, index) in over.into_iter().enumerate() {
            assert_eq!(self.over(page), index, "block over page {page}");
        }
        assert_eq!(before, self.blocks.at(NONE).before, "the last block");
        assert_eq!(
            u64::from(at),
            self.page_map.len() as u64 * PAGE_UNITS,
            "the blocks end with the pages"
        );
        assert_eq!(
            (walked, filed.len()),
            (self.blocks.len(), 0),
            "a block leaked"
        );
        (mapped, taken)
    }
}
