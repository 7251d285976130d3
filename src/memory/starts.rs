//! Which block begins first in each page of a territory: what finds the block over a page.
//!
//! Blocks come and go with every allocation, and most span many pages. So a page knows only of blocks that begin
//! in it, which costs the same for blocks of any size; the block over a page without one is the last that begins
//! before, which a bitmap finds 64 pages at a time.
//!
//! Must not know: what blocks are, where they end.

use super::bins::{Index, NONE};

/// Pages for which one word of the bitmap stands.
const WORD: usize = 64;

/// The first block that begins in each page.
#[derive(Debug, Default)]
pub(super) struct Starts {
    first: Vec<Index>,
    /// Bit `p % 64` of word `p / 64`: some block begins in page `p`.
    some: Vec<u64>,
}

impl Starts {
    /// Pages there are.
    pub(super) fn len(&self) -> usize {
        self.first.len()
    }

    /// Adds pages in which nothing begins, up to `pages` in all.
    pub(super) fn extend(&mut self, pages: usize) {
        self.first.resize(pages, NONE);
        self.some.resize(pages.div_ceil(WORD), 0);
    }

    /// The first block that begins in `page`.
    #[inline]
    pub(super) fn first(&self, page: usize) -> Option<Index> {
        let index = self.first[page];
        (index != NONE).then_some(index)
    }

    /// Notes `index` as the first block that begins in `page`, or that none does.
    #[inline]
    pub(super) fn set(&mut self, page: usize, index: Option<Index>) {
        self.first[page] = index.unwrap_or(NONE);
        let bit = 1 << (page % WORD);
        let word = &mut self.some[page / WORD];
        *word = if index.is_some() {
            *word | bit
        } else {
            *word & !bit
        };
    }

    /// The first block of the last page before `page` in which one begins.
    pub(super) fn before(&self, page: usize) -> Option<Index> {
        let mut word = page / WORD;
        // Nothing of this word, where `page` may be one past the end, but what lies before the page.
        let mut bits = self
            .some
            .get(word)
            .map_or(0, |bits| bits & !(u64::MAX << (page % WORD)));
        while bits == 0 {
            word = word.checked_sub(1)?;
            bits = self.some[word];
        }
        let last = word * WORD + (WORD - 1 - bits.leading_zeros() as usize);
        self.first(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_last_page_before_at_every_distance() {
        let mut starts = Starts::default();
        starts.extend(300);
        assert_eq!(starts.before(300), None);
        for (page, index) in [(0, 7), (63, 8), (64, 9), (250, 10)] {
            starts.set(page, Some(index));
        }
        for (page, index) in [
            (1, 7),
            (63, 7),
            (64, 8),
            (65, 9),
            (250, 9),
            (251, 10),
            (300, 10),
        ] {
            assert_eq!(starts.before(page), Some(index), "before page {page}");
        }
        assert_eq!(starts.before(0), None);
        starts.set(64, None);
        assert_eq!((starts.first(64), starts.before(250)), (None, Some(8)));
    }
}
