//! A chunk table that is uploaded again only if one of its tensors moved.

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::Result;
use crate::launch::Span;
use crate::launch::chunk_table::{ChunkList, ChunkTable};
use crate::memory;
use crate::storage::{Context, Layout, Meter, Metered, Tensor};

/// The inputs of the table: a tensor's index, memory and layout. Spans rather than tensors, so that the table does
/// not keep a gradient's memory from being reused. The table is also valid for a later tensor at the same address
/// with the same layout.
type Key = (usize, Span, Layout);

/// A list of chunks and its copy in device memory.
#[derive(Debug)]
pub(super) struct DeviceTable {
    list: ChunkList,
    keys: Vec<Key>,
    uploaded: Option<(Metered, ChunkTable)>,
    meter: Arc<Meter>,
}

impl DeviceTable {
    /// A table of rows with `columns` columns, not uploaded yet; `op` names the caller in errors.
    pub(super) fn new(op: &'static str, columns: usize) -> Self {
        Self::metered(op, columns, Arc::default())
    }

    /// [`new`](Self::new), with `meter` counting the device memory.
    pub(super) fn metered(op: &'static str, columns: usize, meter: Arc<Meter>) -> Self {
        Self {
            list: ChunkList::new(op, columns),
            keys: Vec::new(),
            uploaded: None,
            meter,
        }
    }

    /// The table for `moving`, the tensors that may have moved since the last call. If none has, returns the previous
    /// table. Otherwise rebuilds it, calling `push` for the row of each tensor. The device memory is kept unless it
    /// becomes too small.
    pub(super) fn refresh(
        &mut self,
        context: &Context,
        tensors: usize,
        moving: &[(usize, Tensor)],
        mut push: impl FnMut(&mut ChunkList, usize, &Tensor) -> Result<()>,
    ) -> Result<ChunkTable> {
        let key =
            |(index, tensor): &(usize, Tensor)| (*index, tensor.place(), tensor.layout().clone());
        let same = self.keys.len() == moving.len()
            && self
                .keys
                .iter()
                .zip(moving)
                .all(|(old, new)| *old == key(new));
        if let Some((_, table)) = self
            .uploaded
            .as_ref()
            .filter(|(_, table)| same && table.tensors() == tensors)
        {
            return Ok(*table);
        }
        // There is no table until the new one is complete: a failure must not leave keys without a table.
        self.keys.clear();
        let words = self.uploaded.take().map(|(words, _)| words);
        self.list.restart(tensors);
        for (index, tensor) in moving {
            push(&mut self.list, *index, tensor)?;
        }
        let words = match words {
            Some(words) if words.len() >= self.list.device_words() => words,
            _ => {
                let _tag = memory::tag("amp");
                let len = self.list.device_words().next_power_of_two();
                Metered::new(Tensor::uninit(context, [len], DType::F64)?, &self.meter)
            }
        };
        let table = self.list.upload(context.stream(), &words.span()?)?;
        self.keys.extend(moving.iter().map(key));
        self.uploaded = Some((words, table));
        Ok(table)
    }
}
