//! The page map: a block that began in each page, from which a search for the block over a page starts.
//!
//! Blocks come and go with every allocation, but few callers ask what lies over a page. So an entry is written when a
//! block is made and not erased when it goes: entries are hints that may be stale. A lookup drops the stale ones it
//! meets and enters the blocks that it walks over, so a walk is rarely repeated.
//!
//! Must not know: what blocks are, where they end.

use crate::memory::free_list::NONE;
use crate::memory::types::Index;
use std::cell::Cell;

/// Pages whose entries lie side by side.
const SPAN: usize = 64;

/// A block that began in each page.
#[derive(Debug, Default)]
pub(crate) struct PageMap {
    pages: usize,
    spans: Vec<Span>,
}

/// The entries of [`SPAN`] pages.
#[derive(Clone, Debug)]
struct Span {
    /// Bit `p`: page `p` has an entry, which may be stale.
    some: Cell<u64>,
    noted: [Cell<Index>; SPAN],
}

impl PageMap {
    /// Number of pages.
    pub(crate) fn len(&self) -> usize {
        self.pages
    }

    /// Adds pages without an entry, up to `pages` in all.
    pub(crate) fn extend(&mut self, pages: usize) {
        let span = Span {
            some: Cell::new(0),
            noted: [const { Cell::new(NONE) }; SPAN],
        };
        self.spans.resize(pages.div_ceil(SPAN), span);
        self.pages = pages;
    }

    /// Enters that block `index` begins in `page`.
    #[inline]
    pub(super) fn note(&self, page: usize, index: Index) {
        let span = &self.spans[page / SPAN];
        span.noted[page % SPAN].set(index);
        span.some.set(span.some.get() | 1 << (page % SPAN));
    }

    /// The block that was entered last for `page`, if any.
    pub(super) fn noted(&self, page: usize) -> Option<Index> {
        let index = self.spans[page / SPAN].noted[page % SPAN].get();
        (index != NONE).then_some(index)
    }

    /// The block of the last entry before `page` that still `holds`.
    pub(crate) fn before(
        &self,
        page: usize,
        holds: impl Fn(usize, Index) -> bool,
    ) -> Option<Index> {
        let (first, offset) = (page / SPAN, page % SPAN);
        // The page may be one past the end, at the start of a span that does not exist.
        let spans = self.spans.iter().enumerate().take(first + 1);
        for (number, span) in spans.rev() {
            let mut bits = span.some.get();
            if number == first {
                bits &= !(u64::MAX << offset);
            }
            while bits != 0 {
                let last = SPAN - 1 - bits.leading_zeros() as usize;
                let noted = span.noted[last].get();
                if holds(number * SPAN + last, noted) {
                    return Some(noted);
                }
                bits &= !(1 << last);
                span.some.set(span.some.get() & !(1 << last));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_last_page_before_at_every_distance() {
        let mut page_map = PageMap::default();
        page_map.extend(300);
        let before = |page_map: &PageMap, page| page_map.before(page, |_, _| true);
        assert_eq!(before(&page_map, 300), None);
        for (page, index) in [(0, 7), (63, 8), (64, 9), (250, 10)] {
            page_map.note(page, index);
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
            assert_eq!(before(&page_map, page), Some(index), "before page {page}");
        }
        assert_eq!(before(&page_map, 0), None);
        assert_eq!((page_map.noted(64), page_map.noted(65)), (Some(9), None));
    }

    #[test]
    fn what_does_not_hold_is_asked_about_once() {
        let mut page_map = PageMap::default();
        page_map.extend(200);
        for (page, index) in [(3, 1), (70, 2), (150, 3)] {
            page_map.note(page, index);
        }
        let asked = Cell::new(0);
        let first_holds = |page, index| {
            asked.set(asked.get() + 1);
            assert_eq!(page == 3, index == 1);
            index == 1
        };
        for looks in [3, 4] {
            assert_eq!(page_map.before(199, first_holds), Some(1));
            assert_eq!(asked.get(), looks);
        }
        page_map.note(70, 5);
        assert_eq!(page_map.before(199, |_, _| true), Some(5));
    }
}
