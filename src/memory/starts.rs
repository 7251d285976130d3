//! Where the search for the block over a page of a territory begins.
//!
//! Blocks come and go with every allocation, and hardly anyone asks what lies over a page. So a page has a note of one
//! block that began in it when the block was made, and nothing is done when one goes. Who asks says which notes still
//! hold, and the others are forgotten then.
//!
//! Must not know: what blocks are, where they end.

use std::cell::Cell;

use super::bins::{Index, NONE};

/// Pages for which one word of the bitmap stands.
const WORD: usize = 64;

/// A block that began in each page.
#[derive(Debug, Default)]
pub(super) struct Starts {
    noted: Vec<Index>,
    /// Bit `p % 64` of word `p / 64`: page `p` has a note that may hold.
    some: Vec<Cell<u64>>,
}

impl Starts {
    /// Pages there are.
    pub(super) fn len(&self) -> usize {
        self.noted.len()
    }

    /// Adds pages without a note, up to `pages` in all.
    pub(super) fn extend(&mut self, pages: usize) {
        self.noted.resize(pages, NONE);
        self.some.resize_with(pages.div_ceil(WORD), Cell::default);
    }

    /// Notes that block `index` begins in `page`.
    #[inline]
    pub(super) fn note(&mut self, page: usize, index: Index) {
        self.noted[page] = index;
        let word = self.some[page / WORD].get_mut();
        *word |= 1 << (page % WORD);
    }

    /// The block that was noted last in `page`, if any was.
    pub(super) fn noted(&self, page: usize) -> Option<Index> {
        let index = self.noted[page];
        (index != NONE).then_some(index)
    }

    /// The noted block of the last page before `page` whose note `holds`.
    pub(super) fn before(
        &self,
        page: usize,
        holds: impl Fn(usize, Index) -> bool,
    ) -> Option<Index> {
        // Of the first word nothing but what lies before the page, which may be one past the end.
        let mut word = page / WORD;
        let mut mask = !(u64::MAX << (page % WORD));
        loop {
            let bits = self.some.get(word).map_or(0, Cell::get) & mask;
            if bits == 0 {
                word = word.checked_sub(1)?;
                mask = u64::MAX;
                continue;
            }
            let last = WORD - 1 - bits.leading_zeros() as usize;
            let page = word * WORD + last;
            if holds(page, self.noted[page]) {
                return Some(self.noted[page]);
            }
            let some = &self.some[word];
            some.set(some.get() & !(1 << last));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_last_page_before_at_every_distance() {
        let mut starts = Starts::default();
        starts.extend(300);
        let before = |starts: &Starts, page| starts.before(page, |_, _| true);
        assert_eq!(before(&starts, 300), None);
        for (page, index) in [(0, 7), (63, 8), (64, 9), (250, 10)] {
            starts.note(page, index);
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
            assert_eq!(before(&starts, page), Some(index), "before page {page}");
        }
        assert_eq!(before(&starts, 0), None);
        assert_eq!((starts.noted(64), starts.noted(65)), (Some(9), None));
    }

    #[test]
    fn what_does_not_hold_is_asked_about_once() {
        let mut starts = Starts::default();
        starts.extend(200);
        for (page, index) in [(3, 1), (70, 2), (150, 3)] {
            starts.note(page, index);
        }
        let asked = Cell::new(0);
        let first_holds = |page, index| {
            asked.set(asked.get() + 1);
            assert_eq!(page == 3, index == 1);
            index == 1
        };
        for looks in [3, 4] {
            assert_eq!(starts.before(199, first_holds), Some(1));
            assert_eq!(asked.get(), looks);
        }
        starts.note(70, 5);
        assert_eq!(starts.before(199, |_, _| true), Some(5));
    }
}
