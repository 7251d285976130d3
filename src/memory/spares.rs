//! Records of blocks that came back from other streams, for later blocks of their own.
//!
//! They hold their streams, not their pool. Must not know: the lock, who asks.

use super::lane::{self, List};
use super::record::Record;
use super::territory::Owner;

/// Most records that are kept for a stream.
const MAX: u32 = 64;

/// By stream: records of blocks that are gone.
#[derive(Debug, Default)]
pub(super) struct Spares {
    lists: Vec<(List, u32)>,
}

impl Spares {
    /// Keeps a record of ordinary memory, or drops it.
    pub(super) fn keep(&mut self, record: Record) {
        let owner = record.location.owner();
        if self.lists.len() <= owner {
            self.lists.resize_with(owner + 1, Default::default);
        }
        let (list, len) = &mut self.lists[owner];
        if *len < MAX {
            *len += 1;
            lane::push(list, record);
        }
    }

    /// A record of the stream `owner`.
    pub(super) fn take(&mut self, owner: Owner) -> Option<Record> {
        let (list, len) = self.lists.get_mut(owner)?;
        let record = lane::pop(list)?;
        *len -= 1;
        Some(record)
    }

    /// Lets go of all streams.
    pub(super) fn clear(&mut self) {
        for (list, _) in std::mem::take(&mut self.lists) {
            lane::drop_all(list);
        }
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        self.clear();
    }
}
