//! Tables of chunks, which let one launch process any number of tensors of any element types.
//!
//! A *row* names the same elements of one tensor in up to [`MAX_COLUMNS`] columns: a gradient alone, or a weight with
//! its gradient and its optimizer state. A *chunk* is a piece of a row, at most [`CHUNK_ELEMENTS`] long: the work of
//! one thread block or rayon task. [`ChunkList`] is built from spans and checked on the host. [`ChunkList::upload`]
//! writes it to device memory as a [`ChunkTable`], which kernels read. Uploading takes one copy, so callers keep a
//! table as long as its tensors stay at their addresses.
//!
//! Layout of a chunk, in 64-bit words: its length; its offset in its tensor, in elements; the tensor index in the upper
//! half and a 4-bit type code per column in the lower; then one address per column, 0 if the row has no entry there.
//! After the chunks: for each tensor the number of its first chunk, then the number of chunks. After that, scratch
//! through which the blocks of a device combine their results: a word that is 0 between kernels, then four words per
//! chunk.
//!
//! Invariants: the chunks of a list share no bytes (a kernel may write any of them), all are on one stream, none is
//! empty, the chunks of a tensor are consecutive, and tensors are in order.

use crate::driver::{Arguments, DevicePtr, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::Span;
use crate::launch::device::{push_sizes, push_spans, type_code};
use crate::units::{StreamId, to_usize};

/// The most columns of a row.
pub(crate) const MAX_COLUMNS: usize = 6;

/// The most elements of a chunk: enough to make its bookkeeping negligible, few enough that one large tensor still
/// keeps every core busy.
pub(crate) const CHUNK_ELEMENTS: usize = 64 * 1024;

const HEAD_WORDS: usize = 3;
const TYPE_BITS: usize = 4;

/// Scratch words of one chunk.
pub(crate) const SCRATCH_WORDS: usize = 4;

/// The host side of a table: its rows cut into chunks.
#[derive(Debug)]
pub(crate) struct ChunkList {
    op: &'static str,
    columns: usize,
    tensors: usize,
    elements: u64,
    moved: RowBytes,
    words: Vec<u64>,
    /// First chunk of each tensor, up to the last tensor that has a row.
    firsts: Vec<u64>,
    spans: Vec<Span>,
}

impl ChunkList {
    /// An empty list for rows of `columns` columns; `op` names its user in errors.
    pub(crate) fn new(op: &'static str, columns: usize) -> Self {
        assert!((1..=MAX_COLUMNS).contains(&columns), "{columns} columns");
        Self {
            op,
            columns,
            tensors: 0,
            elements: 0,
            moved: RowBytes::default(),
            words: Vec::new(),
            firsts: Vec::new(),
            spans: Vec::new(),
        }
    }

    /// Removes all rows but keeps their memory for reuse. Rows pushed from now on belong to tensors `0..tensors`.
    pub(crate) fn restart(&mut self, tensors: usize) {
        self.tensors = tensors;
        self.elements = 0;
        self.moved = RowBytes::default();
        self.words.clear();
        self.firsts.clear();
        self.spans.clear();
    }

    /// 64-bit words that the uploaded table takes.
    pub(crate) fn device_words(&self) -> usize {
        let index = self.tensors + 1;
        self.words.len() + index + 1 + self.chunks() * SCRATCH_WORDS
    }

    fn chunks(&self) -> usize {
        self.words.len() / (HEAD_WORDS + self.columns)
    }

    /// Adds all elements of tensor `tensor`, contiguous in each column. Tensors must be added in order.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the columns differ in length.
    pub(crate) fn push(&mut self, tensor: usize, row: &[Option<Span>]) -> Result<()> {
        self.push_run(tensor, 0, row)
    }

    /// Adds the elements of a strided tensor. `span` reaches from the first to the last of them. If they fill it, in
    /// any order, they are one run; otherwise each piece without gaps is a run. For kernels that treat all elements
    /// alike, so that their order does not matter.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if several indices name one element.
    pub(crate) fn push_strided(
        &mut self,
        tensor: usize,
        span: &Span,
        shape: &[usize],
        strides: &[usize],
    ) -> Result<()> {
        if shape.contains(&0) {
            return Ok(());
        }
        let dims = merged_dims(shape, strides);
        let (run, outer) = match dims.split_last() {
            Some((&(size, 1), outer)) => (size, outer),
            _ => (1, &dims[..]),
        };
        // Each dimension must step over everything inside it. With strides in descending order, this ensures that no
        // two indices name one element.
        let mut inside = run;
        for &(size, stride) in outer.iter().rev() {
            if stride < inside {
                return Err(Error::argument(
                    self.op,
                    "several indices of a tensor name the same element",
                ));
            }
            inside += stride * (size - 1);
        }
        let mut index = vec![0; outer.len()];
        loop {
            let start: usize = index
                .iter()
                .zip(outer)
                .map(|(i, (_, stride))| i * stride)
                .sum();
            self.push_run(tensor, start, &[Some(span.sub(start, run))])?;
            let Some(dim) = (0..outer.len())
                .rev()
                .find(|&dim| index[dim] + 1 < outer[dim].0)
            else {
                return Ok(());
            };
            index[dim] += 1;
            index[dim + 1..].fill(0);
        }
    }

    fn push_run(&mut self, tensor: usize, offset: usize, row: &[Option<Span>]) -> Result<()> {
        assert_eq!(row.len(), self.columns, "a row has one entry a column");
        assert!(tensor < self.tensors, "tensor {tensor} of {}", self.tensors);
        assert!(
            tensor + 1 >= self.firsts.len(),
            "tensor {tensor} comes late"
        );
        self.firsts.resize(tensor + 1, self.chunks() as u64);
        let mut present = row.iter().flatten();
        let Some(len) = present.next().map(Span::len) else {
            return Ok(());
        };
        present.try_for_each(|span| span.check_len(self.op, len))?;
        let types = row.iter().enumerate().map(|(column, span)| {
            span.map_or(0, |span| {
                u64::from(type_code(span.dtype())) << (column * TYPE_BITS)
            })
        });
        let types = types.fold((tensor as u64) << 32, |word, code| word | code);
        for start in (0..len).step_by(CHUNK_ELEMENTS) {
            let chunk = CHUNK_ELEMENTS.min(len - start);
            self.words
                .extend([chunk as u64, (offset + start) as u64, types]);
            let address =
                |span: &Option<Span>| span.map_or(0, |span| span.sub(start, chunk).ptr().0);
            self.words.extend(row.iter().map(address));
        }
        if len > 0 {
            self.elements += len as u64;
            self.moved.add(row);
            self.spans.extend(row.iter().flatten());
        }
        Ok(())
    }

    /// Writes the list to `words`, in order with `stream`. `words` is device memory of at least
    /// [`device_words`](Self::device_words) elements of type f64, the 64-bit type that tensors have; only the bits
    /// matter. The table is valid for kernels enqueued before `words` is next written, which only this method may do.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a row is on another stream, or two rows share bytes.
    pub(crate) fn upload(&mut self, stream: &Stream, words: &Span) -> Result<ChunkTable> {
        words.check_stream(self.op, stream)?;
        words.check_dtype(self.op, DType::F64)?;
        for span in &self.spans {
            span.check_stream(self.op, stream)?;
        }
        self.check_disjoint()?;
        let (rows, chunks) = (self.words.len(), self.chunks() as u64);
        self.words.extend(&self.firsts);
        // Tensors after the last one with a row have no chunks. Then comes the word that is 0 between kernels.
        self.words.resize(rows + self.tensors + 1, chunks);
        self.words.push(0);
        let destination = words.sub(0, self.words.len());
        let bytes = bytemuck::cast_slice(&self.words);
        // SAFETY: the destination is live on `stream` and as long as `bytes` (`sub` above); kernels that
        // read an earlier table run before the copy, in stream order.
        let copied = unsafe {
            stream
                .driver()
                .copy_from_host(destination.ptr(), bytes, stream.raw())
        };
        self.words.truncate(rows);
        copied?;
        Ok(self.table(&words.sub(0, self.device_words()), stream.id()))
    }

    fn table(&self, words: &Span, stream: StreamId) -> ChunkTable {
        ChunkTable {
            words: words.sub(0, self.words.len()),
            stream,
            columns: self.columns,
            tensors: self.tensors,
            elements: self.elements,
            moved: self.moved,
        }
    }

    fn check_disjoint(&mut self) -> Result<()> {
        self.spans.sort_unstable_by_key(Span::ptr);
        for pair in self.spans.windows(2) {
            pair[1]
                .check_disjoint("parameters and gradients", &pair[0])
                .map_err(|_| Error::argument(self.op, "two tensors of the list share memory"))?;
        }
        Ok(())
    }

    /// The table in host memory, for tests that run a twin without a device.
    #[cfg(test)]
    pub(crate) fn host_table(&self) -> ChunkTable {
        let len = self.words.len();
        let ptr = DevicePtr(self.words.as_ptr() as u64);
        // SAFETY: the words live in this list, which the test keeps unchanged while it uses the table.
        let words = unsafe { Span::new(ptr, len, DType::F64, StreamId(0)) };
        self.table(&words, StreamId(0))
    }
}

/// Dimensions as (size, stride), largest stride first. Drops those of size 1 and merges adjacent ones that form a
/// single run of steps.
fn merged_dims(shape: &[usize], strides: &[usize]) -> Vec<(usize, usize)> {
    let pairs = shape.iter().copied().zip(strides.iter().copied());
    let mut dims: Vec<_> = pairs.filter(|(size, _)| *size > 1).collect();
    dims.sort_by_key(|&(_, stride)| std::cmp::Reverse(stride));
    let mut merged: Vec<(usize, usize)> = Vec::with_capacity(dims.len());
    for (size, stride) in dims {
        match merged.last_mut() {
            Some(last) if last.1 == size * stride => *last = (last.0 * size, stride),
            _ => merged.push((size, stride)),
        }
    }
    merged
}

/// Bytes of all rows of a table, to compute what kernels over it move.
#[derive(Clone, Copy, Debug, Default)]
struct RowBytes {
    columns: [u64; MAX_COLUMNS],
    /// For each column, the bytes in the first column of rows whose elements in this column are wider.
    beside: [u64; MAX_COLUMNS],
}

impl RowBytes {
    fn add(&mut self, row: &[Option<Span>]) {
        let bytes = |span: &Option<Span>| span.map_or(0, |span| span.bytes());
        let first = row.first().map_or(0, bytes);
        let sums = self.columns.iter_mut().zip(&mut self.beside);
        for (span, (column, beside)) in row.iter().zip(sums) {
            *column += bytes(span);
            *beside += if bytes(span) > first { first } else { 0 };
        }
    }
}

/// A table in device memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkTable {
    words: Span,
    stream: StreamId,
    columns: usize,
    tensors: usize,
    elements: u64,
    moved: RowBytes,
}

impl ChunkTable {
    /// Columns of every row.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// The number of tensors; some may have no row.
    pub(crate) fn tensors(&self) -> usize {
        self.tensors
    }

    /// Elements of all rows.
    pub(crate) fn elements(&self) -> u64 {
        self.elements
    }

    /// Bytes of all elements in a column.
    pub(crate) fn bytes(&self, column: usize) -> u64 {
        self.moved.columns[column]
    }

    /// Bytes in the first column of those rows that have wider elements in column `column`.
    pub(crate) fn bytes_beside_wider(&self, column: usize) -> u64 {
        self.moved.beside[column]
    }

    /// Chunks of all rows.
    pub(crate) fn chunks_len(&self) -> usize {
        self.words.len() / (HEAD_WORDS + self.columns)
    }

    /// Adds the struct through which device code finds the table.
    pub(crate) fn push_to(&self, into: &mut Arguments) {
        push_spans(into, &[&self.words]);
        push_sizes(into, &[self.columns, self.chunks_len(), self.tensors]);
    }

    /// Refuses a table of another stream, or with another number of columns.
    pub(crate) fn check(&self, op: &'static str, stream: &Stream, columns: usize) -> Result<()> {
        assert_eq!(self.columns, columns, "{op} takes {columns} columns");
        self.words.check_stream(op, stream)
    }

    /// The chunks, for a twin.
    ///
    /// # Safety
    /// As [`Span::slice`].
    pub(crate) unsafe fn chunks<'a>(&self) -> impl Iterator<Item = Chunk<'a>> + use<'a> {
        // SAFETY: `upload` filled these words, and the caller promises that nothing writes them.
        let words: &'a [f64] = unsafe { self.words.slice() };
        let (stream, columns) = (self.stream, self.columns);
        bytemuck::cast_slice::<f64, u64>(words)
            .chunks_exact(HEAD_WORDS + columns)
            .map(move |words| Chunk { words, stream })
    }
}

/// One chunk of a table, as a twin sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk<'a> {
    words: &'a [u64],
    stream: StreamId,
}

impl Chunk<'_> {
    pub(crate) fn len(&self) -> usize {
        to_usize(self.words[0])
    }

    /// Elements of the tensor before this chunk, in memory order.
    pub(crate) fn offset(&self) -> u64 {
        self.words[1]
    }

    pub(crate) fn tensor(&self) -> usize {
        to_usize(self.words[2] >> 32)
    }

    /// The elements in one column, or `None` if the row has none there.
    ///
    /// # Safety
    /// The table's rows are live: call this only from a kernel's `run`, in order of the table's stream.
    pub(crate) unsafe fn column(&self, column: usize) -> Option<Span> {
        let ptr = DevicePtr(self.words[HEAD_WORDS + column]);
        let code = (self.words[2] >> (column * TYPE_BITS)) & ((1 << TYPE_BITS) - 1);
        let dtype = DType::ALL[to_usize(code)];
        // SAFETY: address, length and type are those of a part of a span that `ChunkList` was given.
        (ptr.0 != 0).then(|| unsafe { Span::new(ptr, self.len(), dtype, self.stream) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(ptr: u64, len: usize) -> Span {
        // SAFETY: the tests below never read through it.
        unsafe { Span::new(DevicePtr(ptr), len, DType::F32, StreamId(0)) }
    }

    /// (tensor, offset, length, bytes from address 4096) of every chunk of a strided tensor.
    fn strided(shape: &[usize], strides: &[usize], reach: usize) -> Result<Vec<(u64, usize, u64)>> {
        let mut list = ChunkList::new("test", 1);
        list.restart(1);
        list.push_strided(0, &span(4096, reach), shape, strides)?;
        let table = list.host_table();
        // SAFETY: the words are in `list`; the addresses in them are not followed.
        let chunks = unsafe { table.chunks() };
        // SAFETY: as above.
        let address = |chunk: &Chunk<'_>| unsafe { chunk.column(0) }.unwrap().ptr().0 - 4096;
        Ok(chunks
            .map(|chunk| (chunk.offset(), chunk.len(), address(&chunk)))
            .collect())
    }

    #[test]
    fn a_long_tensor_is_cut_and_reassembles() {
        let len = 2 * CHUNK_ELEMENTS + 7;
        let mut list = ChunkList::new("test", 2);
        list.restart(9);
        list.push(8, &[Some(span(1 << 20, len)), None]).unwrap();
        let table = list.host_table();
        assert_eq!(table.elements(), len as u64);
        // SAFETY: the words are in `list`; the addresses in them are not followed.
        let chunks: Vec<_> = unsafe { table.chunks() }.collect();
        assert_eq!(chunks.len(), 3);
        let mut next = 0;
        for chunk in chunks {
            assert_eq!((chunk.tensor(), chunk.offset()), (8, next));
            // SAFETY: the span is not read.
            let first = unsafe { chunk.column(0) }.unwrap();
            // SAFETY: as above.
            let second = unsafe { chunk.column(1) };
            assert_eq!(
                (first.ptr().0, first.dtype()),
                ((1 << 20) + next * 4, DType::F32)
            );
            assert_eq!(second, None);
            next += chunk.len() as u64;
        }
        assert_eq!(next, len as u64);
    }

    #[test]
    fn permuted_dense_tensors_are_one_chunk() {
        for strides in [[12, 4, 1], [1, 2, 6], [4, 8, 1]] {
            assert_eq!(
                strided(&[2, 3, 4], &strides, 24).unwrap(),
                [(0, 24, 0)],
                "{strides:?}"
            );
        }
    }

    #[test]
    fn slices_become_runs_and_gaps_stay_out() {
        // [3, 2] out of [3, 5]: rows of two, five apart.
        let rows = [(0, 2, 0), (5, 2, 20), (10, 2, 40)];
        assert_eq!(strided(&[3, 2], &[5, 1], 12).unwrap(), rows);
        assert_eq!(strided(&[2, 3], &[1, 5], 12).unwrap(), rows);
        // Every other element: runs of one.
        assert_eq!(
            strided(&[3], &[2], 5).unwrap(),
            [(0, 1, 0), (2, 1, 8), (4, 1, 16)]
        );
        assert_eq!(strided(&[], &[], 1).unwrap(), [(0, 1, 0)]);
        assert_eq!(strided(&[4, 0], &[1, 1], 0).unwrap(), []);
    }

    #[test]
    fn an_element_named_twice_is_refused() {
        assert!(strided(&[3, 4], &[0, 1], 4).is_err());
        assert!(strided(&[3, 4], &[2, 1], 8).is_err());
    }

    #[test]
    fn rows_that_share_memory_are_refused() {
        let mut list = ChunkList::new("test", 1);
        list.restart(2);
        list.push(0, &[Some(span(4096, 10))]).unwrap();
        list.push(1, &[Some(span(4096 + 40, 10))]).unwrap();
        assert!(list.check_disjoint().is_ok());
        list.push(1, &[Some(span(4096 + 76, 10))]).unwrap();
        assert!(list.check_disjoint().is_err());
    }
}
