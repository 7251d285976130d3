//! When each page was freed last, and by which streams.
//!
//! A free block grows by frees of different times, and its own epoch is the latest of them. While other streams lack
//! memory, its pages keep their own epochs, so that those that have been free for long can be taken. Nearly every page
//! was last freed by one stream. That takes one number a page, so a large free writes a row of equal numbers. Pages
//! that several streams freed parts of have a list.
//!
//! Must not know: blocks.

use std::ops::Range;

use crate::memory::types::{EPOCH_BITS, Fence, StreamIndex};
use smallvec::SmallVec;

/// A fence in one number. The greatest number is [`LISTED`](Self::LISTED).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp(u64);

impl Stamp {
    const NONE: Self = Self(0);
    /// Several streams freed parts of the page: see its list.
    const LISTED: Self = Self(u64::MAX);

    #[inline]
    fn new(fence: Fence) -> Self {
        Self((fence.owner as u64) << EPOCH_BITS | fence.epoch)
    }

    /// Whether this is a stamp of the same stream as `before`, and no earlier.
    #[inline]
    fn covers(self, before: Self) -> bool {
        self != Self::LISTED && self.0 >> EPOCH_BITS == before.0 >> EPOCH_BITS && self.0 >= before.0
    }

    #[inline]
    fn fence(self) -> Fence {
        Fence {
            owner: crate::units::to_usize(self.0 >> EPOCH_BITS),
            epoch: self.0 & ((1 << EPOCH_BITS) - 1),
        }
    }
}

/// By page: the latest free of each stream that touched it.
#[derive(Debug, Default)]
pub(crate) struct PageEpochs {
    stamps: Vec<Stamp>,
    /// By page, for pages whose stamp is `LISTED`. Empty while there are none.
    listed: Vec<SmallVec<[Fence; 2]>>,
}

impl PageEpochs {
    /// Adds pages that nobody has freed, up to `pages` in all.
    pub(crate) fn extend(&mut self, pages: usize) {
        self.stamps.resize(pages, Stamp::NONE);
    }

    /// Records a free that touches the pages `touched`. `whole` is `touched` without partially covered end pages; a
    /// wholly covered page drops its earlier stamps.
    pub(super) fn note(&mut self, touched: Range<usize>, whole: Range<usize>, fence: Fence) {
        let stamp = Stamp::new(fence);
        let (first, last) = (touched.start, touched.end - 1);
        if first < whole.start {
            self.note_part(first, stamp, fence);
        }
        if last >= whole.end && (last > first || first >= whole.start) {
            self.note_part(last, stamp, fence);
        }
        if !whole.is_empty() {
            self.stamps[whole].fill(stamp);
        }
    }

    /// Records a free of a part of `page`.
    #[inline]
    fn note_part(&mut self, page: usize, stamp: Stamp, fence: Fence) {
        let before = &mut self.stamps[page];
        if *before == Stamp::NONE || stamp.covers(*before) {
            *before = stamp;
        } else if !before.covers(stamp) {
            self.note_listed(page, fence);
        }
    }

    #[cold]
    fn note_listed(&mut self, page: usize, fence: Fence) {
        let before = std::mem::replace(&mut self.stamps[page], Stamp::LISTED);
        let listed = self.list_of(page);
        if before != Stamp::LISTED {
            // The list is from before the last whole free: it is superseded.
            listed.clear();
            if before != Stamp::NONE {
                listed.push(before.fence());
            }
        }
        match listed.iter_mut().find(|freed| freed.owner == fence.owner) {
            Some(freed) => freed.epoch = freed.epoch.max(fence.epoch),
            None => listed.push(fence),
        }
    }

    fn list_of(&mut self, page: usize) -> &mut SmallVec<[Fence; 2]> {
        if self.listed.len() <= page {
            self.listed.resize(self.stamps.len(), SmallVec::new());
        }
        &mut self.listed[page]
    }

    /// The epoch of the latest free by `owner` in `page`, if one was recorded.
    pub(crate) fn epoch(&self, page: usize, owner: StreamIndex) -> Option<u64> {
        let stamp = self.stamps[page];
        let one = [stamp.fence()];
        let all = match stamp {
            Stamp::NONE => &[],
            Stamp::LISTED => &self.listed[page][..],
            _ => &one[..],
        };
        let freed = all.iter().find(|freed| freed.owner == owner)?;
        Some(freed.epoch)
    }
}

#[cfg(test)]
mod tests {
    use crate::memory::types::OWNER_BITS;
    use std::collections::BTreeMap;

    use super::*;

    /// The last is the greatest of all.
    const OWNERS: [StreamIndex; 4] = [0, 1, 2, (1 << OWNER_BITS) - 3];

    #[test]
    fn random_frees_are_remembered_by_page_and_stream() {
        let mut random = fastrand::Rng::with_seed(3);
        let (mut freed, mut naive) = (PageEpochs::default(), vec![BTreeMap::new(); 12]);
        freed.extend(12);
        for epoch in 2..20_000 {
            let owner = OWNERS[random.usize(0..4)];
            // Frees of one stream may come back late, with an earlier epoch.
            let fence = Fence {
                owner,
                epoch: epoch - random.u64(0..2),
            };
            let first = random.usize(0..12);
            let touched = first..random.usize(first + 1..=12);
            // Either end, or both ends of the only page, may be cut.
            let whole = first + random.usize(0..2)..touched.end - random.usize(0..2);
            freed.note(touched.clone(), whole.clone(), fence);
            for page in touched {
                if whole.contains(&page) {
                    naive[page] = BTreeMap::from([(owner, fence.epoch)]);
                } else {
                    let latest = naive[page].entry(owner).or_insert(0);
                    *latest = fence.epoch.max(*latest);
                }
            }
            for (page, known) in naive.iter().enumerate() {
                for owner in OWNERS {
                    let expected = known.get(&owner).copied();
                    assert_eq!(freed.epoch(page, owner), expected, "page {page} of {owner}");
                }
            }
        }
    }
}
