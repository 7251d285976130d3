//! A chunk table that stays on the device while its tensors stay where they are.

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::Result;
use crate::launch::Span;
use crate::launch::chunk_table::{ChunkList, ChunkTable};
use crate::memory;
use crate::storage::{Context, Layout, Meter, Metered, Tensor};

/// What the table was built from: a tensor's index, its memory and its layout. Spans, not tensors, so that
/// the table does not keep a gradient's memory from being reused. If other memory comes to lie at the same
/// address with the same layout, the table fits it as well.
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
    /// A table of rows with `columns` columns, not uploaded yet; `op` names its user in errors.
    pub(super) fn new(op: &'static str, columns: usize) -> Self {
        Self::metered(op, columns, Arc::default())
    }

    /// [`new`](Self::new) with device memory that `meter` counts.
    pub(super) fn metered(op: &'static str, columns: usize, meter: Arc<Meter>) -> Self {
        Self {
            list: ChunkList::new(op, columns),
            keys: Vec::new(),
            uploaded: None,
            meter,
        }
    }

    /// The table for `moving`, the tensors that may lie elsewhere than at the last call. If none does, it is the
    /// one of the last call; else `push` adds the row of each of them. The device memory is kept unless it becomes
    /// too small.
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
        // Until the new table is complete there is none: a failure must not leave keys without it.
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
