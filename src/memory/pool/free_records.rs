//! Free records of blocks that were returned from other streams, for later blocks of their own stream.
//!
//! They keep their streams alive, not their pool.

use crate::memory::thread_cache::{Home, List, Record, list};
use crate::memory::types::StreamIndex;

/// Most records that are kept for a stream.
const MAX: u32 = 64;

/// By stream: records of blocks that are gone.
#[derive(Debug)]
pub(crate) struct FreeRecords<H: Home> {
    lists: Vec<(List<H>, u32)>,
}

impl<H: Home> Default for FreeRecords<H> {
    fn default() -> Self {
        Self { lists: Vec::new() }
    }
}

impl<H: Home> FreeRecords<H> {
    /// Keeps a record of the default heap, or drops it.
    pub(crate) fn keep(&mut self, record: Record<H>) {
        let owner = record.location.owner();
        if self.lists.len() <= owner {
            self.lists.resize_with(owner + 1, || (None, 0));
        }
        let (list, len) = &mut self.lists[owner];
        if *len < MAX {
            *len += 1;
            list::push(list, record);
        }
    }

    /// A record of the stream `owner`.
    pub(crate) fn take(&mut self, owner: StreamIndex) -> Option<Record<H>> {
        let (list, len) = self.lists.get_mut(owner)?;
        let record = list::pop(list)?;
        *len -= 1;
        Some(record)
    }

    /// Lets go of all streams.
    pub(crate) fn clear(&mut self) {
        for (list, _) in std::mem::take(&mut self.lists) {
            list::drop_all(list);
        }
    }
}

impl<H: Home> Drop for FreeRecords<H> {
    fn drop(&mut self) {
        self.clear();
    }
}
