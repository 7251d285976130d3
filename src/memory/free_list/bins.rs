//! Free blocks filed by size, found by best fit.
//!
//! Sizes are in *units* of the allocator's granularity. Below [`EXACT`] units each size has a bin of its
//! own, so the first occupied bin at or above a request holds an exact best fit. Above, each doubling has
//! [`PER_DOUBLING`] bins, and the best of at most [`SCAN_MAX`] blocks of the bin is taken. A two-level
//! bitmap finds the next occupied bin in a few instructions: no cost here grows with the number of free
//! blocks.
//!
//! Invariants: a block is in at most one bin, the one its size names; a bitmap bit is set if and only if
//! its bin is occupied. Must not know: addresses, streams, why a block is free.

use std::cmp::Reverse;
use std::hint::select_unpredictable;

use smallvec::SmallVec;

use crate::memory::types::{Index, Units};

/// No block. A slab has a slot for it, whose links may be written as any: so nobody looks whether there is a neighbor.
pub(crate) const NONE: Index = 0;

/// Units below which every size has its own bin: 1 MiB at 512 bytes a unit, the range in which programs
/// have many blocks of many sizes.
const EXACT: Units = 2048;
const EXACT_LOG: u32 = EXACT.trailing_zeros();
/// Bins for each doubling from `EXACT` on; a bin then spans at most 1.6 % of its size.
const PER_DOUBLING: Units = 64;
const PER_DOUBLING_LOG: u32 = PER_DOUBLING.trailing_zeros();
/// Doublings from `EXACT` to the largest size.
const DOUBLINGS: Units = Units::BITS - EXACT_LOG;
/// More than there are sizes for: a bin's number is masked to be below, which spares the check.
const BINS: usize = (EXACT + DOUBLINGS * PER_DOUBLING).next_power_of_two() as usize;
const WORDS: usize = BINS / 64;
const _: () = assert!(WORDS == 64, "one word sums them up");
/// Blocks of one bin looked at before the best so far is taken.
const SCAN_MAX: usize = 16;

/// How sizes with the same highest bit fall into bins: the size shifted right by `shift`, plus `base`.
#[derive(Clone, Copy)]
struct Scale {
    base: u16,
    shift: u16,
}

/// By the position of the highest bit.
static SCALES: [Scale; Units::BITS as usize] = scales();

#[expect(
    clippy::cast_possible_truncation,
    reason = "there are fewer bins than 2^16"
)]
const fn scales() -> [Scale; Units::BITS as usize] {
    let mut scales = [Scale { base: 0, shift: 0 }; Units::BITS as usize];
    let mut log = EXACT_LOG;
    while log < Units::BITS {
        let first = EXACT + (log - EXACT_LOG) * PER_DOUBLING;
        scales[log as usize] = Scale {
            // The highest bit itself stays, shifted to `PER_DOUBLING`.
            base: (first - PER_DOUBLING) as u16,
            shift: (log - PER_DOUBLING_LOG) as u16,
        };
        log += 1;
    }
    scales
}

/// Links of a free block within its bin. The tiling stores one for every block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    pub(crate) units: Units,
    next: Index,
    previous: Index,
}

impl Link {
    pub(crate) const fn new(units: Units) -> Self {
        Self {
            units,
            next: NONE,
            previous: NONE,
        }
    }
}

/// Where the bins find the links: the tiling's slab. That of [`NONE`] may be written and says nothing.
pub(crate) trait Links {
    fn link(&self, index: Index) -> &Link;
    fn link_mut(&mut self, index: Index) -> &mut Link;
}

/// The bins' heads and the bitmap over them.
#[derive(Debug)]
pub(crate) struct Bins {
    heads: Box<[Index; BINS]>,
    /// Bit `b % 64` of word `b / 64`: bin `b` is occupied.
    occupied: [u64; WORDS],
    /// Bit `w`: word `w` of `occupied` is not zero.
    summary: u64,
}

impl Bins {
    pub(crate) fn new() -> Self {
        Self {
            heads: Box::new([NONE; BINS]),
            occupied: [0; WORDS],
            summary: 0,
        }
    }

    /// The bin that blocks of `units` are filed in.
    // By a table, as sizes come in no order by which a branch could be predicted.
    #[inline]
    fn bin_of(units: Units) -> usize {
        let scale = SCALES[(units | 1).ilog2() as usize];
        (Units::from(scale.base) + (units >> scale.shift)) as usize % BINS
    }

    /// Files block `index`, whose size its link gives. The block filed last is found first.
    #[inline]
    pub(crate) fn insert(&mut self, links: &mut impl Links, index: Index) {
        let bin = Self::bin_of(links.link(index).units);
        self.insert_in(links, index, bin);
    }

    #[inline]
    fn insert_in(&mut self, links: &mut impl Links, index: Index, bin: usize) {
        let head = std::mem::replace(&mut self.heads[bin], index);
        let link = links.link_mut(index);
        link.next = head;
        link.previous = NONE;
        links.link_mut(head).previous = index;
        self.occupied[bin / 64] |= 1 << (bin % 64);
        self.summary |= 1 << (bin / 64);
    }

    /// Takes block `index` out of its bin.
    #[inline]
    pub(crate) fn remove(&mut self, links: &mut impl Links, index: Index) {
        let link = *links.link(index);
        self.remove_from(links, index, link, Self::bin_of(link.units));
    }

    #[inline]
    fn remove_from(&mut self, links: &mut impl Links, index: Index, link: Link, bin: usize) {
        let Link { next, previous, .. } = link;
        links.link_mut(next).previous = previous;
        if previous != NONE {
            links.link_mut(previous).next = next;
            return;
        }
        debug_assert_eq!(
            self.heads[bin], index,
            "a block without predecessor heads its bin"
        );
        self.begin_with(bin, next);
    }

    /// Makes `head` the first block of a bin.
    #[inline(always)]
    fn begin_with(&mut self, bin: usize, head: Index) {
        self.heads[bin] = head;
        if head == NONE {
            let word = &mut self.occupied[bin / 64];
            *word &= !(1 << (bin % 64));
            if *word == 0 {
                self.summary &= !(1 << (bin / 64));
            }
        }
    }

    /// Gives a filed block another size. It moves only if that is another bin's.
    #[inline]
    pub(crate) fn resize(&mut self, links: &mut impl Links, index: Index, units: Units) {
        let link = links.link_mut(index);
        let before = *link;
        link.units = units;
        let (from, to) = (Self::bin_of(before.units), Self::bin_of(units));
        if from != to {
            self.remove_from(links, index, before, from);
            self.insert_in(links, index, to);
        }
    }

    /// The block that fits `units` best, still filed; `None` if no block is large enough.
    pub(crate) fn find(&self, links: &impl Links, units: Units) -> Option<Index> {
        if units >= EXACT {
            return self.find_large(links, units);
        }
        let bin = self.next_occupied(units as usize)?;
        if bin < EXACT as usize {
            return Some(self.heads[bin]);
        }
        self.best_of_bin(links, bin, units)
    }

    /// As [`find`](Self::find), and takes the block out of its bin.
    // Always: where all blocks of a bin are of one size, it is a few instructions.
    #[inline(always)]
    pub(crate) fn take(&mut self, links: &mut impl Links, units: Units) -> Option<Index> {
        if units >= EXACT {
            return self.take_large(links, units);
        }
        let bin = self.next_occupied(units as usize)?;
        if bin >= EXACT as usize {
            return self.take_large(links, units);
        }
        let index = self.heads[bin];
        let next = links.link(index).next;
        links.link_mut(next).previous = NONE;
        self.begin_with(bin, next);
        Some(index)
    }

    #[inline(never)]
    fn take_large(&mut self, links: &mut impl Links, units: Units) -> Option<Index> {
        let index = self.find(links, units)?;
        self.remove(links, index);
        Some(index)
    }

    fn find_large(&self, links: &impl Links, units: Units) -> Option<Index> {
        let own = Self::bin_of(units);
        // That bin may hold blocks that are too small.
        if let Some(index) = self.best_of_bin(links, own, units) {
            return Some(index);
        }
        self.best_of_bin(links, self.next_occupied(own + 1)?, units)
    }

    fn best_of_bin(&self, links: &impl Links, bin: usize, units: Units) -> Option<Index> {
        let mut index = self.heads[bin];
        let mut best: Option<(Units, Index)> = None;
        let mut looked_at = 0;
        while index != NONE {
            let link = links.link(index);
            if link.units >= units && best.is_none_or(|(smallest, _)| link.units < smallest) {
                best = Some((link.units, index));
                if link.units == units {
                    break;
                }
            }
            looked_at += 1;
            // Past the scan limit any fit will do, but a fit that exists is never missed.
            if looked_at >= SCAN_MAX && best.is_some() {
                break;
            }
            index = link.next;
        }
        best.map(|(_, index)| index)
    }

    /// The first occupied bin from `bin` on.
    fn next_occupied(&self, bin: usize) -> Option<usize> {
        if bin >= BINS {
            return None;
        }
        let word = bin / 64;
        let here = self.occupied[word] & (u64::MAX << (bin % 64));
        // The words behind it. Two shifts, as one by all bits is none.
        let behind = self.summary & (u64::MAX << word << 1);
        if here | behind == 0 {
            return None;
        }
        let next = behind.trailing_zeros() as usize % WORDS;
        let is_here = here != 0;
        let word = select_unpredictable(is_here, word, next);
        let bits = select_unpredictable(is_here, here, self.occupied[next]);
        Some(word * 64 + bits.trailing_zeros() as usize)
    }

    /// Size of the largest filed block, in units.
    pub(crate) fn largest(&self, links: &impl Links) -> Option<Units> {
        let bin = self.last_occupied(BINS - 1)?;
        self.members(links, bin).map(|(_, units)| units).max()
    }

    /// Every filed block with its size.
    pub(crate) fn iter<'a, L: Links>(
        &'a self,
        links: &'a L,
    ) -> impl Iterator<Item = (Index, Units)> + 'a {
        self.iter_from(links, 0)
    }

    /// Filed blocks of at least `units`, with their sizes, smallest bins first.
    pub(crate) fn iter_from<'a, L: Links>(
        &'a self,
        links: &'a L,
        units: Units,
    ) -> impl Iterator<Item = (Index, Units)> + 'a {
        let first = self.next_occupied(Self::bin_of(units));
        std::iter::successors(first, |bin| self.next_occupied(bin + 1))
            .flat_map(move |bin| self.members(links, bin))
            .filter(move |(_, size)| *size >= units)
    }

    /// Filed blocks of at least `units`, the largest first.
    pub(crate) fn largest_first<'a, L: Links>(
        &'a self,
        links: &'a L,
        units: Units,
    ) -> impl Iterator<Item = (Index, Units)> + 'a {
        let least = Self::bin_of(units);
        let last = self.last_occupied(BINS - 1);
        let bins = std::iter::successors(last, |bin| self.last_occupied(bin.checked_sub(1)?));
        bins.take_while(move |bin| *bin >= least)
            .flat_map(move |bin| {
                let members = self.members(links, bin);
                let mut members: SmallVec<[_; 8]> = members.collect();
                members.sort_by_key(|(_, size)| Reverse(*size));
                members
            })
            .take_while(move |(_, size)| *size >= units)
    }

    /// The last occupied bin up to `bin`.
    fn last_occupied(&self, bin: usize) -> Option<usize> {
        let last = |bits: u64| 63 - bits.leading_zeros() as usize;
        let word = bin / 64;
        let here = self.occupied[word] & (u64::MAX >> (63 - bin % 64));
        if here != 0 {
            return Some(word * 64 + last(here));
        }
        let before = self.summary & !(u64::MAX << word);
        let word = (before != 0).then(|| last(before))?;
        Some(word * 64 + last(self.occupied[word]))
    }

    fn members<'a, L: Links>(
        &'a self,
        links: &'a L,
        bin: usize,
    ) -> impl Iterator<Item = (Index, Units)> + 'a {
        let first = self.heads[bin];
        std::iter::successors((first != NONE).then_some(first), move |index| {
            let next = links.link(*index).next;
            (next != NONE).then_some(next)
        })
        .map(move |index| (index, links.link(index).units))
    }

    /// Asserts the module's invariants.
    pub(crate) fn check_invariants(&self, links: &impl Links) {
        for bin in 0..BINS {
            let bit = self.occupied[bin / 64] >> (bin % 64) & 1 == 1;
            assert_eq!(bit, self.heads[bin] != NONE, "bitmap bit of bin {bin}");
            for (index, units) in self.members(links, bin) {
                assert_eq!(
                    Self::bin_of(units),
                    bin,
                    "block {index} of {units} units is misfiled"
                );
            }
        }
        for word in 0..WORDS {
            let bit = self.summary >> word & 1 == 1;
            assert_eq!(bit, self.occupied[word] != 0, "summary bit of word {word}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Slab(Vec<Link>);

    impl Links for Slab {
        fn link(&self, index: Index) -> &Link {
            &self.0[index as usize]
        }
        fn link_mut(&mut self, index: Index) -> &mut Link {
            &mut self.0[index as usize]
        }
    }

    /// The blocks have numbers from 1 on.
    fn filed(sizes: &[Units]) -> (Bins, Slab) {
        let sizes = [&[0], sizes].concat();
        let mut slab = Slab(sizes.iter().map(|units| Link::new(*units)).collect());
        let mut bins = Bins::new();
        for index in 1..sizes.len() {
            bins.insert(&mut slab, Index::try_from(index).unwrap());
        }
        bins.check_invariants(&slab);
        (bins, slab)
    }

    #[test]
    fn bins_are_monotonic_and_cover_all_sizes() {
        let mut sizes: Vec<Units> = (1..5000).collect();
        sizes.extend((12..32).flat_map(|log| [(1 << log) - 1, 1 << log, (1 << log) + 1]));
        sizes.push(Units::MAX);
        sizes.sort_unstable();
        for pair in sizes.windows(2) {
            assert!(Bins::bin_of(pair[0]) <= Bins::bin_of(pair[1]), "{pair:?}");
        }
        assert!(Bins::bin_of(Units::MAX) < BINS);
    }

    #[test]
    fn best_fit_is_exact_for_small_sizes() {
        let (bins, slab) = filed(&[5, 9, 7, 2000, 4_000_000]);
        let found = |units| bins.find(&slab, units).map(|index| slab.link(index).units);
        assert_eq!(found(6), Some(7));
        assert_eq!(found(7), Some(7));
        assert_eq!(found(8), Some(9));
        assert_eq!(found(10), Some(2000));
        assert_eq!(found(2001), Some(4_000_000));
        assert_eq!(found(4_000_001), None);
        assert_eq!(bins.largest(&slab), Some(4_000_000));
    }

    #[test]
    fn the_largest_come_first() {
        let sizes = [9, 70_001, 70_000, 2048, 70_001, 64, 63, 5_000_000];
        let (bins, slab) = filed(&sizes);
        let mut sorted = sizes.to_vec();
        sorted.sort_unstable_by_key(|size| Reverse(*size));
        for least in [1, 63, 64, 65, 2048, 70_001, 5_000_000, 5_000_001] {
            let found = bins.largest_first(&slab, least).map(|(_, size)| size);
            let expected = sorted.iter().copied().filter(|size| *size >= least);
            assert!(found.eq(expected), "at least {least}");
        }
    }

    #[test]
    fn a_fit_in_a_crowded_bin_is_found_behind_smaller_blocks() {
        // 100,000..100,863 share bins; the only block that fits was filed first, so it is last in line.
        let mut sizes = vec![100_400];
        sizes.extend(std::iter::repeat_n(100_352, 100));
        let (bins, slab) = filed(&sizes);
        assert_eq!(bins.find(&slab, 100_399), Some(1));
    }

    #[test]
    fn removing_every_block_empties_the_bitmap() {
        let (mut bins, mut slab) = filed(&[1, 1, 2047, 2048, 2049, 1 << 30]);
        for index in [4, 1, 6, 2, 3, 5] {
            bins.remove(&mut slab, index);
            bins.check_invariants(&slab);
        }
        assert_eq!(bins.find(&slab, 1), None);
        assert_eq!(bins.largest(&slab), None);
    }
}
