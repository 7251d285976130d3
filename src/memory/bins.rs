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

use crate::units::to_usize;

/// A block's index in its arena's slab.
pub(super) type Index = u32;
/// No block.
pub(super) const NONE: Index = Index::MAX;

/// Units below which every size has its own bin: 1 MiB at 512 bytes a unit, the range in which programs
/// have many blocks of many sizes.
const EXACT: u64 = 2048;
const EXACT_LOG: u32 = EXACT.trailing_zeros();
/// Bins for each doubling from `EXACT` on; a bin then spans at most 1.6 % of its size.
const PER_DOUBLING: u64 = 64;
const PER_DOUBLING_LOG: u32 = PER_DOUBLING.trailing_zeros();
/// Doublings from `EXACT` to the largest size, 2^55 units (2^64 bytes of 512).
const DOUBLINGS: u64 = 55 - EXACT_LOG as u64;
/// More than there are sizes for: a bin's number is masked to be below, which spares the check.
const BINS: usize = to_usize(EXACT + DOUBLINGS * PER_DOUBLING).next_power_of_two();
const WORDS: usize = BINS / 64;
/// Blocks of one bin looked at before the best so far is taken.
const SCAN_MAX: usize = 16;

/// Links of a free block within its bin. The arena stores one for every block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    pub(super) units: u64,
    next: Index,
    previous: Index,
    /// Where the block is filed.
    bin: u32,
}

impl Link {
    pub(super) const fn new(units: u64) -> Self {
        Self {
            units,
            next: NONE,
            previous: NONE,
            bin: 0,
        }
    }
}

/// Where the bins find the links: the arena's slab.
pub(super) trait Links {
    fn link(&self, index: Index) -> &Link;
    fn link_mut(&mut self, index: Index) -> &mut Link;
}

/// The bins' heads and the bitmap over them.
#[derive(Debug)]
pub(super) struct Bins {
    heads: Box<[Index; BINS]>,
    /// Bit `b % 64` of word `b / 64`: bin `b` is occupied.
    occupied: [u64; WORDS],
    /// Bit `w % 64` of word `w / 64`: word `w` of `occupied` is not zero.
    summary: [u64; WORDS / 64],
}

impl Bins {
    pub(super) fn new() -> Self {
        Self {
            heads: Box::new([NONE; BINS]),
            occupied: [0; WORDS],
            summary: [0; WORDS / 64],
        }
    }

    /// The bin that blocks of `units` are filed in.
    #[inline]
    const fn bin_of(units: u64) -> usize {
        if units < EXACT {
            return to_usize(units);
        }
        let log = units.ilog2();
        let doubling = (log - EXACT_LOG) as u64;
        let step = (units >> (log - PER_DOUBLING_LOG)) & (PER_DOUBLING - 1);
        to_usize(EXACT + doubling * PER_DOUBLING + step) % BINS
    }

    /// Files block `index`, whose size its link gives. The block filed last is found first.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "bins are few")]
    pub(super) fn insert(&mut self, links: &mut impl Links, index: Index) {
        let link = links.link_mut(index);
        let bin = Self::bin_of(link.units);
        let head = std::mem::replace(&mut self.heads[bin], index);
        link.bin = bin as u32;
        link.next = head;
        link.previous = NONE;
        if head == NONE {
            self.occupied[bin / 64] |= 1 << (bin % 64);
            self.summary[bin / 4096] |= 1 << (bin / 64 % 64);
        } else {
            links.link_mut(head).previous = index;
        }
    }

    /// Takes block `index` out of its bin.
    #[inline]
    pub(super) fn remove(&mut self, links: &mut impl Links, index: Index) {
        let Link {
            next,
            previous,
            bin,
            ..
        } = *links.link(index);
        if next != NONE {
            links.link_mut(next).previous = previous;
        }
        if previous != NONE {
            links.link_mut(previous).next = next;
            return;
        }
        let bin = bin as usize % BINS;
        debug_assert_eq!(
            self.heads[bin], index,
            "a block without predecessor heads its bin"
        );
        self.heads[bin] = next;
        if next == NONE {
            self.occupied[bin / 64] &= !(1 << (bin % 64));
            if self.occupied[bin / 64] == 0 {
                self.summary[bin / 4096] &= !(1 << (bin / 64 % 64));
            }
        }
    }

    /// Gives a filed block another size. It moves only if that is another bin's.
    #[inline]
    pub(super) fn resize(&mut self, links: &mut impl Links, index: Index, units: u64) {
        let link = links.link_mut(index);
        if link.bin as usize == Self::bin_of(units) {
            link.units = units;
            return;
        }
        self.remove(links, index);
        links.link_mut(index).units = units;
        self.insert(links, index);
    }

    /// The block that fits `units` best, still filed; `None` if no block is large enough.
    pub(super) fn find(&self, links: &impl Links, units: u64) -> Option<Index> {
        let bin = Self::bin_of(units);
        if units >= EXACT {
            // The request's own bin may hold blocks that are too small.
            if let Some(index) = self.best_of_bin(links, bin, units) {
                return Some(index);
            }
            return self.best_of_bin(links, self.next_occupied(bin + 1)?, units);
        }
        let bin = self.next_occupied(bin)?;
        if bin < to_usize(EXACT) {
            // All are of one size.
            return Some(self.heads[bin]);
        }
        self.best_of_bin(links, bin, units)
    }

    fn best_of_bin(&self, links: &impl Links, bin: usize, units: u64) -> Option<Index> {
        let mut index = self.heads[bin];
        let mut best: Option<(u64, Index)> = None;
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
        if here != 0 {
            return Some(word * 64 + here.trailing_zeros() as usize);
        }
        let mut group = (word + 1) / 64;
        let mut mask = u64::MAX << ((word + 1) % 64);
        while group < self.summary.len() {
            let words = self.summary[group] & mask;
            if words != 0 {
                let word = group * 64 + words.trailing_zeros() as usize;
                return Some(word * 64 + self.occupied[word].trailing_zeros() as usize);
            }
            group += 1;
            mask = u64::MAX;
        }
        None
    }

    /// Size of the largest filed block, in units.
    pub(super) fn largest(&self, links: &impl Links) -> Option<u64> {
        let word = self.occupied.iter().rposition(|word| *word != 0)?;
        let bin = word * 64 + (63 - self.occupied[word].leading_zeros() as usize);
        self.members(links, bin).map(|(_, units)| units).max()
    }

    /// Every filed block with its size.
    pub(super) fn iter<'a, L: Links>(
        &'a self,
        links: &'a L,
    ) -> impl Iterator<Item = (Index, u64)> + 'a {
        self.iter_from(links, 0)
    }

    /// Filed blocks of at least `units`, with their sizes, smallest bins first.
    pub(super) fn iter_from<'a, L: Links>(
        &'a self,
        links: &'a L,
        units: u64,
    ) -> impl Iterator<Item = (Index, u64)> + 'a {
        let first = self.next_occupied(Self::bin_of(units));
        std::iter::successors(first, |bin| self.next_occupied(bin + 1))
            .flat_map(move |bin| self.members(links, bin))
            .filter(move |(_, size)| *size >= units)
    }

    fn members<'a, L: Links>(
        &'a self,
        links: &'a L,
        bin: usize,
    ) -> impl Iterator<Item = (Index, u64)> + 'a {
        let first = self.heads[bin];
        std::iter::successors((first != NONE).then_some(first), move |index| {
            let next = links.link(*index).next;
            (next != NONE).then_some(next)
        })
        .map(move |index| (index, links.link(index).units))
    }

    /// Asserts the module's invariants.
    pub(super) fn check_invariants(&self, links: &impl Links) {
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
            let bit = self.summary[word / 64] >> (word % 64) & 1 == 1;
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

    fn filed(sizes: &[u64]) -> (Bins, Slab) {
        let mut slab = Slab(sizes.iter().map(|units| Link::new(*units)).collect());
        let mut bins = Bins::new();
        for index in 0..sizes.len() {
            bins.insert(&mut slab, Index::try_from(index).unwrap());
        }
        bins.check_invariants(&slab);
        (bins, slab)
    }

    #[test]
    fn bins_are_monotonic_and_cover_all_sizes() {
        let mut sizes: Vec<u64> = (1..5000).collect();
        sizes.extend((12..55).flat_map(|log| [(1 << log) - 1, 1 << log, (1 << log) + 1]));
        sizes.push((1 << 55) - 1);
        sizes.sort_unstable();
        for pair in sizes.windows(2) {
            assert!(Bins::bin_of(pair[0]) <= Bins::bin_of(pair[1]), "{pair:?}");
        }
        assert!(Bins::bin_of((1 << 55) - 1) < BINS);
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
    fn a_fit_in_a_crowded_bin_is_found_behind_smaller_blocks() {
        // 100,000..100,863 share bins; the only block that fits was filed first, so it is last in line.
        let mut sizes = vec![100_400];
        sizes.extend(std::iter::repeat_n(100_352, 100));
        let (bins, slab) = filed(&sizes);
        assert_eq!(bins.find(&slab, 100_399), Some(0));
    }

    #[test]
    fn removing_every_block_empties_the_bitmap() {
        let (mut bins, mut slab) = filed(&[1, 1, 2047, 2048, 2049, 1 << 40]);
        for index in [3, 0, 5, 1, 2, 4] {
            bins.remove(&mut slab, index);
            bins.check_invariants(&slab);
        }
        assert_eq!(bins.find(&slab, 1), None);
        assert_eq!(bins.largest(&slab), None);
    }
}
