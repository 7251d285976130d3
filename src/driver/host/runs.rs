//! Which parts of the page file are free.
//!
//! Works on offsets only: no file, no memory. Invariants: free runs are disjoint and never adjacent (adjacent runs are
//! joined), and none reaches the end of the used part of the file, beyond which everything is free.

use std::collections::BTreeMap;

/// The free parts of a file that can grow.
#[derive(Debug, Default)]
pub(super) struct Runs {
    /// Free runs below `end`, as offset and bytes.
    free: BTreeMap<u64, u64>,
    /// The end of the used part of the file.
    end: u64,
    /// The end of the run taken last.
    cursor: u64,
}

impl Runs {
    /// Takes `bytes` bytes; `None` if the offsets overflow. Prefers the run after the one taken last: pages mapped one
    /// after the other are then a single mapping for the system, which limits the number of mappings.
    pub(super) fn take(&mut self, bytes: u64) -> Option<u64> {
        let fits = |(_, free): &(&u64, &u64)| **free >= bytes;
        let found = self
            .free
            .get_key_value(&self.cursor)
            .filter(fits)
            .or_else(|| self.free.iter().find(fits));
        let offset = match found {
            Some((&offset, &free)) => {
                self.free.remove(&offset);
                if free > bytes {
                    self.free.insert(offset + bytes, free - bytes);
                }
                offset
            }
            None => {
                let offset = self.end;
                self.end = self.end.checked_add(bytes)?;
                offset
            }
        };
        self.cursor = offset + bytes;
        Some(offset)
    }

    /// The end of the used part of the file.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Returns a run and joins it with adjacent free runs.
    pub(super) fn give(&mut self, offset: u64, bytes: u64) {
        let (mut start, mut stop) = (offset, offset + bytes);
        assert!(stop <= self.end, "a run is in the used part of the file");
        if let Some((&before, &free)) = self.free.range(..offset).next_back() {
            assert!(before + free <= offset, "a run is given back once");
            if before + free == offset {
                self.free.remove(&before);
                start = before;
            }
        }
        if let Some(free) = self.free.remove(&stop) {
            stop += free;
        }
        if stop == self.end {
            self.end = start;
        } else {
            self.free.insert(start, stop - start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Runs;

    #[test]
    fn runs_follow_each_other_and_join_again() {
        let mut runs = Runs::default();
        assert_eq!(
            [runs.take(2), runs.take(4), runs.take(2)],
            [Some(0), Some(2), Some(6)]
        );
        runs.give(0, 2);
        runs.give(2, 4);
        assert_eq!(runs.take(5), Some(0), "both runs joined");
        assert_eq!(runs.take(1), Some(5), "the rest, right behind");
        assert_eq!(runs.take(1), Some(8), "then the end");
        for (offset, bytes) in [(6, 2), (0, 5), (8, 1), (5, 1)] {
            runs.give(offset, bytes);
        }
        assert_eq!((runs.end(), runs.free.len()), (0, 0));
    }

    #[test]
    fn offsets_running_out_change_nothing() {
        let mut runs = Runs::default();
        assert_eq!(runs.take(8), Some(0));
        assert_eq!(runs.take(u64::MAX), None);
        assert_eq!(runs.end(), 8);
        assert_eq!(runs.take(8), Some(8));
    }
}
