//! Arrays for the tests of twins: memory for spans, without a device.

use crate::driver::{DevicePtr, Kernel};
use crate::dtype::{DType, Element};
use crate::launch::Span;
use crate::launch::compute::with_element;
use crate::units::StreamId;

/// Lengths that cover every path: empty, one, odd, a whole chunk, one more than a chunk, several threads.
pub(super) const LENGTHS: [usize; 6] = [0, 1, 7, 1024, 1025, 100_003];

/// Written around the elements; a kernel that writes past the ends changes it.
const GUARD: u64 = 0x5ca1_ab1e_5ca1_ab1e;

/// Elements in memory, aligned to their size and to nothing larger.
pub(super) struct Array {
    storage: Vec<u64>,
    base: u64,
    len: usize,
    dtype: DType,
}

impl Array {
    /// `values`, rounded to `dtype`.
    pub(super) fn new(dtype: DType, values: &[f64]) -> Self {
        let array = Self::filled(dtype, values.len());
        with_element!(dtype, T => {
            // SAFETY: the memory was just made, and no other slice of it exists.
            let elements = unsafe { array.span().slice_mut::<T>() };
            for (element, value) in elements.iter_mut().zip(values) {
                *element = Element::from_f64(*value);
            }
        });
        array
    }

    /// `len` elements of garbage, for a kernel to overwrite.
    pub(super) fn filled(dtype: DType, len: usize) -> Self {
        let bytes = (len + 1) * usize::try_from(dtype.bits() / 8).unwrap();
        let mut storage = vec![GUARD; bytes.div_ceil(8) + 1];
        let base = storage.as_mut_ptr() as u64 + dtype.bits() / 8;
        Self {
            storage,
            base,
            len,
            dtype,
        }
    }

    pub(super) fn span(&self) -> Span {
        // SAFETY: the elements lie in `storage`, and tests run kernels while the array lives.
        unsafe { Span::new(DevicePtr(self.base), self.len, self.dtype, StreamId(0)) }
    }

    /// The elements, after checking that the memory around them is unchanged.
    #[track_caller]
    pub(super) fn values(&self) -> Vec<f64> {
        let bytes: &[u8] = bytemuck::cast_slice(&self.storage);
        let lead = usize::try_from(self.dtype.bits() / 8).unwrap();
        let end = lead * (self.len + 1);
        let guard = GUARD.to_ne_bytes();
        for idx in (0..lead).chain(end..bytes.len()) {
            assert_eq!(
                bytes[idx],
                guard[idx % 8],
                "byte {idx} around the elements was written"
            );
        }
        with_element!(self.dtype, T => {
            // SAFETY: no kernel runs now.
            unsafe { self.span().slice::<T>() }.iter().map(|value| value.to_f64()).collect()
        })
    }
}

/// Runs a twin whose spans are all of live [`Array`]s.
pub(super) fn run(kernel: &impl Kernel) {
    // SAFETY: the arrays live, and nothing else touches them.
    unsafe { kernel.run() };
}

/// `len` numbers spread over (-`range`, `range`), the same on every run.
pub(super) fn numbers(seed: u64, len: usize, range: f64) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        // SplitMix64 (Steele, Lea and Flood, 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..len)
        .map(|_| {
            #[expect(clippy::cast_precision_loss, reason = "random bits")]
            let unit = (next() >> 11) as f64 / (1u64 << 53) as f64;
            (2.0 * unit - 1.0) * range
        })
        .collect()
}

/// `values` as they are after rounding to `dtype`.
pub(super) fn rounded(dtype: DType, values: &[f64]) -> Vec<f64> {
    fn through<T: Element>(values: &[f64]) -> Vec<f64> {
        values
            .iter()
            .map(|value| T::from_f64(*value).to_f64())
            .collect()
    }
    with_element!(dtype, T => through::<T>(values))
}
