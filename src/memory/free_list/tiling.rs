//! Blocks that tile segments: split on allocation, merged on free.
//!
//! A tiling manages *segments*, contiguous ranges that it is given, as blocks that tile them. It works on offsets and
//! indices only. [`Bins`] find the best fit, the remainder is split off if it is at least one unit, and a freed block
//! merges with its free neighbors at once.
//!
//! Invariants: blocks tile their segment in address order, and each keeps its start as long as it lives; no two
//! neighbors are free; exactly the free blocks are filed in the bins.

use super::bins::{Bins, Link, NONE};
use super::slab::{Linked, Slab};
use crate::memory::types::{GRANULARITY, Index, SegmentIndex, Units};

fn bytes_of(units: Units) -> u64 {
    u64::from(units) * GRANULARITY
}

/// A block as the tiling sees it, in half a cache line.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
struct Tile {
    link: Link,
    /// Start within the segment, in units.
    start: Units,
    segment: SegmentIndex,
    /// Neighbors in address order within the segment.
    before: Index,
    after: Index,
    is_free: bool,
}

/// Where an allocated block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TiledBlock {
    pub(crate) index: Index,
    pub(crate) segment: SegmentIndex,
    /// Offset within the segment, in bytes.
    pub(crate) offset: u64,
}

/// A segment as the tiling sees it.
#[derive(Clone, Copy, Debug)]
struct Segment {
    units: Units,
    first: Index,
}

impl Linked for Tile {
    #[inline]
    fn link(&self) -> &Link {
        &self.link
    }
    #[inline]
    fn link_mut(&mut self) -> &mut Link {
        &mut self.link
    }
}

/// The blocks of one stream in one size range.
#[derive(Debug)]
pub(crate) struct Tiling {
    blocks: Slab<Tile>,
    bins: Bins,
    segments: Vec<Option<Segment>>,
}

impl Tiling {
    pub(crate) fn new() -> Self {
        Self {
            blocks: Slab::new(Tile {
                link: Link::new(0),
                start: 0,
                segment: SegmentIndex::MAX,
                before: NONE,
                after: NONE,
                is_free: false,
            }),
            bins: Bins::new(),
            segments: Vec::new(),
        }
    }

    /// Takes over a segment of `bytes` (a positive multiple of [`GRANULARITY`] below 2 TiB), free as a whole.
    pub(crate) fn add_segment(&mut self, bytes: u64) -> SegmentIndex {
        assert!(
            bytes > 0 && bytes.is_multiple_of(GRANULARITY),
            "a segment of {bytes} bytes"
        );
        let units = Units::try_from(bytes / GRANULARITY).expect("a segment below 2 TiB");
        let vacant = self.segments.iter().position(Option::is_none);
        let index = vacant.unwrap_or_else(|| {
            self.segments.push(None);
            self.segments.len() - 1
        });
        let segment = SegmentIndex::try_from(index).expect("fewer than 2^32 segments");
        let first = self.blocks.insert(Tile {
            link: Link::new(units),
            start: 0,
            segment,
            before: NONE,
            after: NONE,
            is_free: true,
        });
        self.bins.insert(&mut self.blocks, first);
        self.segments[index] = Some(Segment { units, first });
        segment
    }

    /// Gives up a segment if all of it is free; whether it was.
    pub(crate) fn remove_segment_if_free(&mut self, segment: SegmentIndex) -> bool {
        let Some(Segment { units, first }) = self.segments[segment as usize] else {
            return false;
        };
        let block = *self.blocks.at(first);
        if !block.is_free || block.link.units != units {
            return false;
        }
        self.bins.remove(&mut self.blocks, first);
        self.blocks.remove(first);
        self.segments[segment as usize] = None;
        true
    }

    /// Places a block of `bytes` (a positive multiple of [`GRANULARITY`]), or finds no room.
    pub(crate) fn allocate(&mut self, bytes: u64) -> Option<TiledBlock> {
        let units = Units::try_from(bytes / GRANULARITY).ok()?;
        let index = self.bins.find(&self.blocks, units)?;
        self.bins.remove(&mut self.blocks, index);
        let block = self.blocks.at_mut(index);
        block.is_free = false;
        let Tile {
            link,
            start,
            segment,
            after,
            ..
        } = *block;
        if link.units > units {
            block.link.units = units;
            let rest = self.blocks.insert(Tile {
                link: Link::new(link.units - units),
                start: start + units,
                segment,
                before: index,
                after,
                is_free: true,
            });
            self.blocks.at_mut(index).after = rest;
            self.blocks.at_mut(after).before = rest;
            self.bins.insert(&mut self.blocks, rest);
        }
        Some(TiledBlock {
            index,
            segment,
            offset: u64::from(start) * GRANULARITY,
        })
    }

    /// Frees block `index` and merges it with free neighbors.
    ///
    /// # Panics
    /// If the block is not allocated: a double free inside the crate.
    pub(crate) fn free(&mut self, index: Index) {
        let block = self.blocks.at_mut(index);
        assert!(!block.is_free, "block {index} is freed twice");
        block.is_free = true;
        let Tile { before, after, .. } = *block;
        if self.blocks.at(after).is_free {
            self.bins.remove(&mut self.blocks, after);
            let units = self.absorb_next(index);
            self.blocks.at_mut(index).link.units = units;
        }
        if self.blocks.at(before).is_free {
            let units = self.absorb_next(before);
            self.bins.resize(&mut self.blocks, before, units);
        } else {
            self.bins.insert(&mut self.blocks, index);
        }
    }

    /// Makes block `index` span its next neighbor too; returns its units then, which are the caller's to write.
    fn absorb_next(&mut self, index: Index) -> Units {
        let block = *self.blocks.at(index);
        let gone = *self.blocks.at(block.after);
        self.blocks.at_mut(index).after = gone.after;
        self.blocks.at_mut(gone.after).before = index;
        self.blocks.remove(block.after);
        block.link.units + gone.link.units
    }

    /// Bytes of the largest free block; 0 if there is none.
    pub(crate) fn largest_free(&self) -> u64 {
        let largest = self.bins.largest(&self.blocks);
        largest.map_or(0, bytes_of)
    }

    /// The segment that block `index` lies in.
    pub(crate) fn segment_of(&self, index: Index) -> SegmentIndex {
        self.blocks.at(index).segment
    }

    /// Whether no block of `segment` is allocated.
    pub(crate) fn is_segment_free(&self, segment: SegmentIndex) -> bool {
        self.segments[segment as usize].is_some_and(|Segment { units, first }| {
            let block = self.blocks.at(first);
            block.is_free && block.link.units == units
        })
    }

    /// Free bytes in segments that are partly in use, and the number of such free blocks.
    pub(crate) fn inactive_split(&self) -> (u64, u64) {
        let in_use = |index: &Index| !self.is_segment_free(self.segment_of(*index));
        let blocks = self
            .bins
            .iter(&self.blocks)
            .filter(|(index, _)| in_use(index));
        blocks.fold((0, 0), |(bytes, count), (_, units)| {
            (bytes + bytes_of(units), count + 1)
        })
    }

    /// Free bytes and free blocks.
    pub(crate) fn free_blocks(&self) -> (u64, u64) {
        let blocks = self.bins.iter(&self.blocks);
        blocks.fold((0, 0), |(bytes, count), (_, units)| {
            (bytes + bytes_of(units), count + 1)
        })
    }

    /// Asserts the module's invariants; returns (bytes in segments, bytes in allocated blocks).
    pub(crate) fn check_invariants(&self) -> (u64, u64) {
        self.bins.check_invariants(&self.blocks);
        let filed: std::collections::HashSet<Index> = self
            .bins
            .iter(&self.blocks)
            .map(|(index, _)| index)
            .collect();
        let (mut held, mut allocated, mut walked) = (0, 0, 0);
        for (number, segment) in self.segments.iter().enumerate() {
            let Some(Segment { units, first }) = *segment else {
                continue;
            };
            let (mut at, mut before, mut index) = (0, NONE, first);
            while index != NONE {
                let block = self.blocks.at(index);
                assert_eq!(
                    block.segment as usize, number,
                    "block {index} is in another segment"
                );
                assert_eq!(block.start, at, "block {index} leaves a gap or an overlap");
                assert_eq!(block.before, before, "block {index} has a wrong neighbor");
                assert!(block.link.units > 0, "block {index} is empty");
                assert_eq!(
                    filed.contains(&index),
                    block.is_free,
                    "filing of block {index}"
                );
                let neighbor_free = before != NONE && self.blocks.at(before).is_free;
                assert!(
                    !(block.is_free && neighbor_free),
                    "free neighbors {before} and {index}"
                );
                if !block.is_free {
                    allocated += bytes_of(block.link.units);
                }
                walked += 1;
                at += block.link.units;
                before = index;
                index = block.after;
            }
            assert_eq!(
                at, units,
                "the blocks of segment {number} do not reach its end"
            );
            held += bytes_of(units);
        }
        assert_eq!(walked, self.blocks.len(), "a block leaked");
        (held, allocated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = GRANULARITY;

    #[test]
    fn splits_and_merges_back_in_either_order() {
        for order in [[0, 1], [1, 0]] {
            let mut tiling = Tiling::new();
            tiling.add_segment(4 * UNIT);
            let blocks = [
                tiling.allocate(2 * UNIT).unwrap(),
                tiling.allocate(2 * UNIT).unwrap(),
            ];
            assert_eq!(blocks.map(|block| block.offset), [0, 2 * UNIT]);
            assert_eq!(tiling.allocate(UNIT), None);
            for which in order {
                tiling.free(blocks[which].index);
                tiling.check_invariants();
            }
            assert_eq!(tiling.allocate(4 * UNIT).unwrap().offset, 0);
        }
    }

    #[test]
    fn a_segment_in_use_is_not_given_up() {
        let mut tiling = Tiling::new();
        let segment = tiling.add_segment(4 * UNIT);
        let block = tiling.allocate(UNIT).unwrap();
        assert!(!tiling.remove_segment_if_free(segment));
        tiling.free(block.index);
        assert!(tiling.remove_segment_if_free(segment));
        assert_eq!(tiling.check_invariants(), (0, 0));
        assert_eq!(tiling.allocate(UNIT), None);
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn a_double_free_is_caught() {
        let mut tiling = Tiling::new();
        tiling.add_segment(4 * UNIT);
        let block = tiling.allocate(UNIT).unwrap();
        tiling.free(block.index);
        tiling.free(block.index);
    }
}
